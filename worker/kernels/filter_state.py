"""What one pass of a search for a row's filter leaves to the next (`filter_threshold.py`)."""

from __future__ import annotations

from worker.kernels._triton import constant, tl, triton

# Of a row: 6 int32, padded so that each pass's part is aligned to 16 bytes and one compiled kernel serves all; 4 fp32.
KEY_FIELDS = 8
LEVEL_FIELDS = 4
_KEY_FIELDS = constant(KEY_FIELDS)
_LEVEL_FIELDS = constant(LEVEL_FIELDS)


@triton.jit
def _state_of(keys_ptr, levels_ptr, row):
    """Where a row's fields are."""
    return keys_ptr + row * _KEY_FIELDS, levels_ptr + row * _LEVEL_FIELDS


@triton.jit
def load_state(keys_ptr, levels_ptr, row):
    """A row's search: it is in low..high-1; `kind` is 1 while it counts tokens, 2 while it adds up probability, more
    while it does that at guessed pivots, 0 when it is over and the answer is `low`; `fresh` is 1 before its first pass,
    guesses aside; `wanted` is what is to be reached, -1 if that is a share of a total that the next sums will tell; the
    maximum is the row's highest logit."""
    keys, levels = _state_of(keys_ptr, levels_ptr, row)
    return (
        tl.load(keys), tl.load(keys + 1), tl.load(keys + 2), tl.load(keys + 3), tl.load(levels), tl.load(levels + 1),
    )  # fmt: skip


@triton.jit
def store_state(keys_ptr, levels_ptr, row, low, high, kind, fresh, wanted, maximum):
    keys, levels = _state_of(keys_ptr, levels_ptr, row)
    tl.store(keys, low)
    tl.store(keys + 1, high)
    tl.store(keys + 2, kind)
    tl.store(keys + 3, fresh)
    tl.store(levels, wanted)
    tl.store(levels + 1, maximum)


@triton.jit
def load_guess(keys_ptr, levels_ptr, row):
    """The first of the guessed pivots and how far they are apart; the sums at `low` and `high`, negative if unknown."""
    keys, levels = _state_of(keys_ptr, levels_ptr, row)
    return tl.load(keys + 4), tl.load(keys + 5), tl.load(levels + 2), tl.load(levels + 3)


@triton.jit
def store_guess(keys_ptr, levels_ptr, row, first, step, at_low, at_high):
    keys, levels = _state_of(keys_ptr, levels_ptr, row)
    tl.store(keys + 4, first)
    tl.store(keys + 5, step)
    tl.store(levels + 2, at_low)
    tl.store(levels + 3, at_high)
