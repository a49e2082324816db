"""Where the logit of a top-p may be, so that few pivots find it in two or three passes over a row.

The first pass looks where a sample of the row tells; each later one at neighbouring keys about where the sums at the
ends of what is left, if they fell evenly between them, would meet what is wanted. Logits of 16 bits have few enough
keys for that. Where a guess errs by more, the search goes on at many pivots.
"""

from __future__ import annotations

from worker.kernels._logit_keys import key_of, value_of
from worker.kernels._triton import constant, next_power_of_2, tl, triton
from worker.kernels.filter_groups import highest_reaching

# Logits that are looked at: the highest of each group, and a sample of the others.
_LEAST_LOOKED_AT = 4096
# Neighbours in the sample, as one read from memory brings 32 bytes.
NEIGHBOURS = 16
# Standard deviations that the sample may err by.
_DEVIATIONS = constant(4.0)
# Pivots of a pass. With four it takes about as long as the kernel that measures the row's stretches.
GUESSES = 4


def looked_at(groups: int) -> int:
    """A power of two, of how many logits of a row with so many groups."""
    return next_power_of_2(max(_LEAST_LOOKED_AT, 2 * groups))


@triton.jit
def enclosing_keys(
    logits_ptr,
    logits_stride,
    group_highest_ptr,
    row,
    low,
    high,
    wanted,
    total,
    maximum,
    scale,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LOOKED_AT: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Keys `first` and `last` of low..high, such that the highest key at or above which there is the probability
    `wanted`, of `total`, is most likely in first..last-1, as int32.

    The groups' highest logits count for themselves, and the sample for all others: few tokens with most of the
    probability, which a sample would miss, are mostly the highest of their groups.
    """
    place = tl.arange(0, LOOKED_AT)
    is_group = place < GROUPS
    sampled = tl.maximum(place - GROUPS, 0)
    step: tl.constexpr = max(VOCAB // ((LOOKED_AT - GROUPS) // NEIGHBOURS) // NEIGHBOURS, 1) * NEIGHBOURS
    index = sampled // NEIGHBOURS * step + sampled % NEIGHBOURS
    is_sample = (index < VOCAB) & (place >= GROUPS)
    group_at = group_highest_ptr + row * GROUPS + tl.where(is_group, place, index // GROUP)
    highest = tl.load(group_at, mask=is_group | is_sample, other=-float("inf"))
    logits_at = logits_ptr + row.to(tl.int64) * logits_stride + index
    logits = tl.load(logits_at, mask=is_sample, other=-float("inf")).to(tl.float32)
    is_sample &= logits < highest
    logits = tl.where(is_group, highest, logits)
    keys = key_of(logits, SHIFT)
    weights = tl.exp2((logits - maximum) * scale)
    others = tl.maximum(total - tl.sum(tl.where(is_group, weights, 0.0)), 0.0)
    sampled_weight = tl.sum(tl.where(is_sample, weights, 0.0))
    factor = tl.where(sampled_weight > 0.0, others / sampled_weight, 0.0)
    weights *= tl.where(is_group, 1.0, tl.where(is_sample, factor, 0.0))

    found = highest_reaching(keys, weights, low, high, wanted)
    # The deviation of a ratio of two sums over the same sample (linearised), times the second sum.
    is_above = tl.where(keys >= found, 1.0, 0.0)
    share = tl.sum(tl.where(is_sample, weights * is_above, 0.0)) / tl.maximum(others, 1e-30)
    error = tl.where(is_sample, weights * (is_above - share), 0.0)
    allowed = _DEVIATIONS * tl.sqrt(tl.sum(error * error))
    first = highest_reaching(keys, weights, low, found + 1, wanted + allowed)
    return first, highest_reaching(keys, weights, found, high, wanted - allowed) + 1


@triton.jit
def guessed_pivots(low, high, first, step, GUESSES: tl.constexpr):
    """[GUESSES] int32 keys in low..high-1: `first`, and others `step` apart."""
    return tl.maximum(tl.minimum(first + step * tl.arange(0, GUESSES), high - 1), low)


@triton.jit
def guess_again(low, high, first, step, wanted, sums, at_low, at_high, GUESSES: tl.constexpr, SHIFT: tl.constexpr):
    """The search low..high-1 after a pass at guessed pivots: low and high, the sums there (negative if not known), and
    the first of the next pass's pivots, which are neighbours."""
    pivots = guessed_pivots(low, high, first, step, GUESSES)
    reached = sums >= wanted
    low = tl.max(tl.where(reached, pivots, low))
    high = tl.min(tl.where(reached, high, pivots))
    at_low = tl.where(tl.max(reached.to(tl.int32)) == 1, tl.min(tl.where(reached, sums, float("inf"))), at_low)
    at_high = tl.where(tl.min(reached.to(tl.int32)) == 0, tl.max(tl.where(reached, 0.0, sums)), at_high)
    start = value_of(low, SHIFT)
    middle = start + (value_of(high, SHIFT) - start) * ((at_low - wanted) / (at_low - at_high))
    return low, high, at_low, at_high, key_of(middle, SHIFT) - (GUESSES // 2 - 1)
