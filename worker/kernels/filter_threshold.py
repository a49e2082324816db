"""Finds, for each row, the smallest logit that min-p, top-k and top-p leave: the sampler draws from there up.

No sort. Tokens are kept by value, so a row's filters come down to one logit, found by search: at once where it lies
in few groups of logits (`filter_groups.py`), as that of a small top-k does, and else in passes over the row. A pass
adds up, at 16 pivots, the number or the probability of the tokens at or above it, and goes on between the two pivots
that enclose what is wanted; at 4 where a top-p of logits of 16 bits can be guessed (`filter_guess.py`). Pivots are
keys, integers in the order of the logits, so the search ends at an exact one. A row is split over programs, and sums
are added in an order that no batch changes.
"""

from __future__ import annotations

import torch

from worker.kernels import filter_groups, filter_guess
from worker.kernels._logit_keys import KEY_SHIFT, key_of, value_of
from worker.kernels._triton import (
    cdiv,
    constant,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)
from worker.kernels.filter_groups import bound_by_groups, load_groups, search_loaded
from worker.kernels.filter_guess import enclosing_keys, guess_again, guessed_pivots
from worker.kernels.filter_state import KEY_FIELDS, LEVEL_FIELDS, load_guess, load_state, store_guess, store_state
from worker.kernels.gumbel_sample import load_stretch, measure_stretches, stretch_size

PIVOTS = 16
# Kinds of a search: the first and the last of the passes that guess.
_FIRST_GUESS = constant(3)
_LAST_GUESS = constant(5)
# Programs that a pass wants: a few for each multiprocessor. More would read the pivots' sums more often.
_PROGRAMS = 2048


@triton.jit
def _pivots_of(low, high, fresh, maximum, PIVOTS: tl.constexpr, SHIFT: tl.constexpr):
    """[PIVOTS] int32 keys in low..high-1, the first of them `low`, the others evenly spaced.

    The first pass of a search, or the first after guesses, spaces them by value: half of all keys belong to logits next
    to 0.
    """
    j = tl.arange(0, PIVOTS)
    wide = low.to(tl.int64)
    by_key = (wide + (high.to(tl.int64) - wide) * j // PIVOTS).to(tl.int32)
    start = value_of(low, SHIFT)
    end = tl.minimum(value_of(high, SHIFT), maximum)
    by_value = key_of(start + (end - start) * (j.to(tl.float32) * (1.0 / PIVOTS)), SHIFT)
    pivots = tl.where(fresh == 1, by_value, by_key)
    return tl.where(j == 0, low, tl.maximum(tl.minimum(pivots, high - 1), low))


@triton.jit
def _advance(low, high, kind, fresh, wanted, maximum, sums, top_p, PIVOTS: tl.constexpr, SHIFT: tl.constexpr):
    """The search after a pass: between the highest pivot whose sum reaches what is wanted and the next one.

    A count that is found is followed by the search for probability, if the row has a top-p.
    """
    pivots = _pivots_of(low, high, fresh, maximum, PIVOTS, SHIFT)
    wanted = tl.where(wanted < 0.0, tl.maximum(top_p, 1e-6) * tl.max(sums, axis=0), wanted)
    reached = sums >= wanted
    low = tl.maximum(tl.max(tl.where(reached, pivots, low), axis=0), low)
    high = tl.minimum(tl.min(tl.where(reached, high, pivots), axis=0), high)
    # No other key keeps less and still enough: it is the last one, or keeps exactly what is wanted.
    found = (high.to(tl.int64) - low <= 1) | (tl.min(tl.where(reached, sums, float("inf")), axis=0) == wanted)
    share_next = found & (kind == 1) & (top_p < 1.0)
    high = tl.where(share_next, key_of(maximum, SHIFT) + 1, high)
    wanted = tl.where(share_next, -1.0, wanted)
    kind = tl.where(found, tl.where(share_next, 2, 0), kind)
    return low, high, kind, share_next.to(tl.int32), wanted


@triton.jit
def _sums_of(logits, pivots, kind, maximum, scale):
    """[pivots] fp32: the number of logits at or above each pivot, or their probability relative to the maximum's."""
    weights = tl.where(kind == 1, 1.0, tl.exp2((logits - maximum) * scale))
    # A product and not a choice of weights: a compare that gives 1.0 and a fused multiply-add are two instructions.
    return tl.sum(tl.where(logits[None, :] >= pivots[:, None], 1.0, 0.0) * weights[None, :], axis=1)


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr"])
def _begin_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    highest_ptr,
    mass_ptr,
    lowest_ptr,
    group_highest_ptr,
    group_list_ptr,
    keys_ptr,
    levels_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    STRETCHES: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    LOOKED_AT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    GUESSES: tl.constexpr,
    SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    at = row * STRETCHES + tl.arange(0, PADDED)
    mask = tl.arange(0, PADDED) < STRETCHES
    highest = tl.load(highest_ptr + at, mask=mask, other=-float("inf"))
    mass = tl.load(mass_ptr + at, mask=mask, other=0.0)
    lowest = tl.load(lowest_ptr + at, mask=mask, other=float("inf"))
    maximum = tl.max(highest, axis=0)
    high = key_of(maximum, SHIFT) + 1
    scale = 1.4426950408889634 / temperature
    limits_count = (top_k > 0) & (top_k < VOCAB)
    limits_share = top_p < 1.0
    usable = (maximum > -float("inf")) & (maximum < float("inf"))
    searched = usable & (temperature > 0.0) & (limits_count | limits_share | (min_p > 0.0))

    floor = tl.min(lowest, axis=0)
    if min_p > 0.0:
        floor = tl.maximum(floor, maximum + temperature * tl.log(min_p))
    bits = floor.to(tl.int32, bitcast=True)  # the lowest key whose value is not below the floor
    low = tl.where(bits >= 0, bits + ((1 << SHIFT) - 1), bits ^ 0x7FFFFFFF) >> SHIFT
    wanted = tl.full((), -1.0, tl.float32)
    total = tl.sum(mass * tl.exp2((highest - maximum) * scale), axis=0)
    if limits_count:
        wanted = top_k.to(tl.float32)
    elif limits_share & (min_p == 0.0):
        # Tokens less likely than (1 - p) / VOCAB add up to less than 1 - p: without them enough is left. One per cent
        # is room for rounding.
        wanted = tl.maximum(top_p, 1e-6) * total
        least = maximum - 1.01 * temperature * tl.log(VOCAB / ((1.0 - top_p) * total))
        low = tl.maximum(low, key_of(least, SHIFT) - 1)

    kind = tl.where(searched, tl.where(limits_count, 1, tl.where(limits_share, 2, 0)), 0)
    if kind > 0:
        # The search begins where the answer cannot be below, so that most stretches need not be read, or none.
        low, selected = bound_by_groups(
            group_highest_ptr, row, low, high, limits_count, wanted, maximum, scale, GROUPS, PADDED_GROUPS, SHIFT
        )
        if tl.sum(selected.to(tl.int32), axis=0) <= MOST_GROUPS:
            logits = load_groups(
                logits_ptr, logits_stride, row, selected, group_list_ptr, VOCAB, GROUP, PADDED_GROUPS, MOST_GROUPS
            )
            wanted_share = tl.where(limits_count, -1.0, wanted)
            low = search_loaded(logits, low, high, limits_count, top_k, wanted_share, top_p, maximum, scale, SHIFT)
            kind = kind * 0
        elif SHIFT > 0:
            is_share = (kind == 2) & (wanted >= 0.0)
            if is_share:
                first, last = enclosing_keys(
                    logits_ptr, logits_stride, group_highest_ptr, row, low, high, wanted, total, maximum, scale,
                    VOCAB, GROUP, GROUPS, LOOKED_AT, NEIGHBOURS, SHIFT,
                )  # fmt: skip
                kind = kind * 0 + _FIRST_GUESS
                step = (last - first + GUESSES - 2) // (GUESSES - 1)
                store_guess(keys_ptr, levels_ptr, row, first, step, -1.0, -1.0)
    low = tl.where(searched, low, key_of(tl.full((), -float("inf"), tl.float32), SHIFT))
    store_state(keys_ptr, levels_ptr, row, low, high, kind, 1, wanted, maximum)


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr"])
def _pass_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    top_p_ptr,
    highest_ptr,
    last_keys_ptr,
    last_levels_ptr,
    last_value_ptr,
    keys_ptr,
    levels_ptr,
    value_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    PADDED: tl.constexpr,
    PIVOTS: tl.constexpr,
    GUESSES: tl.constexpr,
    SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(0)
    row = tl.program_id(1)
    slot = tl.load(row_slots_ptr + row)
    low, high, kind, fresh, wanted, maximum = load_state(last_keys_ptr, last_levels_ptr, row)
    first, step, at_low, at_high = load_guess(last_keys_ptr, last_levels_ptr, row)
    if last_value_ptr is not None:
        # Every program of the row works out the state anew: one launch fewer a pass.
        if kind >= _FIRST_GUESS:
            if SHIFT > 0:
                sums = _load_sums(last_value_ptr, row, STRETCHES, PADDED, PIVOTS, GUESSES)
                low, high, at_low, at_high, first = guess_again(
                    low, high, first, step, wanted, sums, at_low, at_high, GUESSES, SHIFT
                )
                step = step * 0 + 1
                # A second guess between known sums is worth its pass, a third where the second was not far off.
                near = high - low <= (256 << (16 - SHIFT))
                again = (at_low >= 0.0) & (at_high >= 0.0) & ((kind == _FIRST_GUESS) | ((kind < _LAST_GUESS) & near))
                kind = tl.where(high - low <= 1, 0, tl.where(again, kind + 1, 2))
        elif kind > 0:
            sums = _load_sums(last_value_ptr, row, STRETCHES, PADDED, PIVOTS, PIVOTS)
            top_p = tl.load(top_p_ptr + slot)
            low, high, kind, fresh, wanted = _advance(
                low, high, kind, fresh, wanted, maximum, sums, top_p, PIVOTS, SHIFT
            )
        if part == 0:
            store_state(keys_ptr, levels_ptr, row, low, high, kind, fresh, wanted, maximum)
            store_guess(keys_ptr, levels_ptr, row, first, step, at_low, at_high)
    scale = 1.4426950408889634 / tl.load(temperature_ptr + slot)
    if kind >= _FIRST_GUESS:
        if SHIFT > 0:
            _sum_stretches(
                logits_ptr, highest_ptr, value_ptr, guessed_pivots(low, high, first, step, GUESSES), kind, maximum,
                scale, low, logits_stride, VOCAB, BLOCK, STRETCHES, PIVOTS, GUESSES, SHIFT,
            )  # fmt: skip
    elif kind > 0:
        _sum_stretches(
            logits_ptr, highest_ptr, value_ptr, _pivots_of(low, high, fresh, maximum, PIVOTS, SHIFT), kind, maximum,
            scale, low, logits_stride, VOCAB, BLOCK, STRETCHES, PIVOTS, PIVOTS, SHIFT,
        )  # fmt: skip


@triton.jit
def _sum_stretches(
    logits_ptr,
    highest_ptr,
    value_ptr,
    pivots,
    kind,
    maximum,
    scale,
    low,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    PIVOTS: tl.constexpr,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What the program's stretches of a row add up to at each of COUNT pivots, none of which is below `low`."""
    part = tl.program_id(0)
    row = tl.program_id(1)
    pivots, lowest = value_of(pivots, SHIFT), value_of(low, SHIFT)
    for stretch in range(part, STRETCHES, tl.num_programs(0)):
        at = value_ptr + (row * STRETCHES + stretch) * PIVOTS + tl.arange(0, COUNT)
        if tl.load(highest_ptr + row * STRETCHES + stretch) < lowest:
            tl.store(at, tl.zeros((COUNT,), tl.float32))
        else:
            logits = load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB, BLOCK)
            tl.store(at, _sums_of(logits, pivots, kind, maximum, scale))


@triton.jit
def _load_sums(
    value_ptr, row, STRETCHES: tl.constexpr, PADDED: tl.constexpr, PIVOTS: tl.constexpr, COUNT: tl.constexpr
):
    """[COUNT] fp32, what the stretches of the row add up to."""
    stretches = tl.arange(0, PADDED)[:, None]
    at = value_ptr + (row * STRETCHES + stretches) * PIVOTS + tl.arange(0, COUNT)[None, :]
    return tl.sum(tl.load(at, mask=stretches < STRETCHES, other=0.0), axis=0)


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr"])
def _finish_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    top_p_ptr,
    keys_ptr,
    levels_ptr,
    value_ptr,
    threshold_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    PADDED: tl.constexpr,
    PIVOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    low, high, kind, fresh, wanted, maximum = load_state(keys_ptr, levels_ptr, row)
    if kind > 0:
        top_p = tl.load(top_p_ptr + slot)
        scale = 1.4426950408889634 / tl.load(temperature_ptr + slot)
        sums = _load_sums(value_ptr, row, STRETCHES, PADDED, PIVOTS, PIVOTS)
        low, high, kind, fresh, wanted = _advance(low, high, kind, fresh, wanted, maximum, sums, top_p, PIVOTS, SHIFT)
        while kind > 0:  # rare: the passes that all rows had were not enough, and one program does the rest
            pivots = value_of(_pivots_of(low, high, fresh, maximum, PIVOTS, SHIFT), SHIFT)
            sums = tl.zeros((PIVOTS,), tl.float32)
            for stretch in range(STRETCHES):
                logits = load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB, BLOCK)
                sums += _sums_of(logits, pivots, kind, maximum, scale)
            low, high, kind, fresh, wanted = _advance(
                low, high, kind, fresh, wanted, maximum, sums, top_p, PIVOTS, SHIFT
            )
    tl.store(threshold_ptr + row, value_of(low, SHIFT))


def num_passes(dtype: torch.dtype) -> int:
    """Passes that are launched; a row that is done leaves them at once, one that is not is finished by one program.

    Of 16 bits a pass finds 4, and the first of a search skips the many keys next to 0; a top-k is one search, a top-p
    another. Up to three may be guesses; after a bad one the search begins anew with what is left.
    """
    return 6 if KEY_SHIFT[dtype] else 10


def filter_threshold(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """The smallest logit that may be drawn in each row.

    The filters are vLLM's, in its order, each on what the one before has left, at softmax(logits / temperature):
    min-p drops tokens less likely than min_p times the most likely one; top-k keeps the k most likely; top-p keeps the
    smallest set that has a share top_p of the probability left. Tokens as likely as the last one kept are kept too
    (vLLM does the same for top-k; for top-p it keeps as many of them as the share needs).

    Reads rows * vocab logits once for the maxima of stretches and groups and the stretches' masses. A row whose answer
    lies in at most `MOST_GROUPS` groups is then finished by one program, which reads the groups' maxima and those
    groups' logits, and sums over them up to some 60 times. Any other row is read, by stretch, where the stretch has a
    logit that may matter, once a pass: 16 compares and additions a logit, or 4 in the first passes of a top-p alone of
    16 bits, which guess. A pass of 16 narrows the search 16-fold and `num_passes` are launched: a top-p that is guessed
    well takes 2 or 3, one that is not up to all; any other top-p, or a top-k, 2 or 3, and both together 3 to 5.

    Args:
        logits: [rows, vocab] fp32, fp16 or bf16, rows may be strided.
        row_slots: [rows] int32.
        temperature: [slots + 1] fp32; a row of temperature 0 is not filtered.
        top_k: [slots + 1] int32; 0, or the vocabulary and more, keeps all.
        top_p: [slots + 1] fp32; 1 keeps all.
        min_p: [slots + 1] fp32; 0 keeps all.

    Returns:
        [rows] fp32; -inf where nothing is filtered; of no meaning where a row holds NaN.
    """
    rows, vocab = logits.shape
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return threshold
    options = dependent_launch(logits.device)
    block, shift, passes = stretch_size(vocab), KEY_SHIFT[logits.dtype], num_passes(logits.dtype)
    stretches = cdiv(vocab, block)
    padded = next_power_of_2(stretches)
    measured = measure_stretches(logits, row_slots, temperature, to_filter=True)
    assert measured.group_highest is not None
    groups = measured.group_highest.shape[1]
    # A pass reads what the one before has written, and writes elsewhere: its programs run at different times.
    keys = torch.empty((passes, rows, KEY_FIELDS), dtype=torch.int32, device=logits.device)
    levels = torch.empty((passes, rows, LEVEL_FIELDS), dtype=torch.float32, device=logits.device)
    sums = torch.empty((2, rows, stretches, PIVOTS), dtype=torch.float32, device=logits.device)
    most_groups = filter_groups.MOST_GROUPS
    group_list = torch.empty((rows, most_groups), dtype=torch.int32, device=logits.device)
    _begin_kernel[(rows,)](
        logits, row_slots, temperature, top_k, top_p, min_p, measured.highest, measured.mass, measured.lowest,
        measured.group_highest, group_list, keys, levels, logits.stride(0),
        VOCAB=vocab, STRETCHES=stretches, PADDED=padded, GROUP=stretches * block // groups, GROUPS=groups,
        PADDED_GROUPS=next_power_of_2(groups), MOST_GROUPS=most_groups,
        LOOKED_AT=filter_guess.looked_at(groups), NEIGHBOURS=filter_guess.NEIGHBOURS, GUESSES=filter_guess.GUESSES,
        SHIFT=shift, num_warps=16, **options,
    )  # fmt: skip
    constants = {"VOCAB": vocab, "BLOCK": block, "STRETCHES": stretches, "PADDED": padded, "PIVOTS": PIVOTS,
                 "SHIFT": shift, **options}  # fmt: skip
    for i in range(passes):
        last = max(i - 1, 0)
        # Two warps: a thread then adds up 32 logits before the sums are passed from thread to thread.
        _pass_kernel[(min(stretches, cdiv(_PROGRAMS, rows)), rows)](
            logits, row_slots, temperature, top_p, measured.highest, keys[last], levels[last],
            sums[1 - i % 2] if i else None, keys[i], levels[i], sums[i % 2], logits.stride(0), **constants,
            GUESSES=filter_guess.GUESSES, num_warps=2,
        )  # fmt: skip
    _finish_kernel[(rows,)](
        logits, row_slots, temperature, top_p, keys[-1], levels[-1], sums[(passes - 1) % 2], threshold,
        logits.stride(0), **constants, num_warps=8,
    )  # fmt: skip
    return threshold


def filter_threshold_reference(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """`filter_threshold` in plain torch, for any device, by sorting the rows that have a filter."""
    vocab = logits.shape[1]
    row_temperature, k, p, m = (option[row_slots] for option in (temperature, top_k, top_p, min_p))
    limits_count = (k > 0) & (k < vocab)
    threshold = torch.full_like(row_temperature, -torch.inf)
    filtered = torch.nonzero((row_temperature > 0) & (limits_count | (p < 1) | (m > 0))).flatten()
    if filtered.numel() == 0:
        return threshold
    row_temperature, k, p, m = (option[filtered] for option in (row_temperature, k, p, m))
    values = logits[filtered].float().sort(dim=-1, descending=True).values
    lowest = values[:, 0] + row_temperature * m.log()  # of min-p
    kth = values.gather(1, (k.clamp(1, vocab) - 1).long()[:, None]).squeeze(1)
    lowest = torch.where(limits_count[filtered], torch.maximum(lowest, kth), lowest)
    weights = ((values.double() - values[:, :1]) / row_temperature[:, None].double()).exp()
    share = torch.where(values >= lowest[:, None], weights, 0.0).cumsum(-1)
    # In float32 a top_p of 1e-46 is 0.
    needed = (share < p.clamp(min=1e-6)[:, None].double() * share[:, -1:]).sum(-1)
    last = values.gather(1, needed.clamp(max=vocab - 1)[:, None]).squeeze(1)
    threshold[filtered] = torch.where(p < 1, torch.maximum(lowest, last), lowest)
    return threshold
