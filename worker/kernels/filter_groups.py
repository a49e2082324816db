"""Filters of a row whose answer lies in few groups of its logits: one program finds it from those alone.

A group is 128 neighbours in the vocabulary. As many groups as a top-k keeps tokens have a logit at or above the k-th
highest of the groups' highest, so the k-th highest logit is not below that, and is in one of those groups; a top-p is
bounded in the same manner by the probability of the groups' highest. A top-k of 50 leaves some 50 groups of 1,187,
which are read once more and searched in registers, by halving; no other logit is looked at again.
"""

from __future__ import annotations

from worker.kernels._logit_keys import key_of
from worker.kernels._triton import tl, triton

# Groups that one program searches, 16,384 logits. A top-k of up to about 100 leaves no more, as long as few are equal.
MOST_GROUPS = 128


@triton.jit
def highest_reaching(keys, weights, low, high, wanted):
    """The highest key of low..high-1 at or above which the weights of `keys` add up to `wanted`; `low` if none is."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # a sum of the two may be more than 32 bits
        reached = tl.sum(tl.where(keys >= middle, weights, 0.0)) >= wanted
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def bound_by_groups(
    group_highest_ptr,
    row,
    low,
    high,
    by_count,
    wanted,
    maximum,
    scale,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """A key that the one wanted is not below, and which groups have a logit that is not either.

    Args:
        low, high: int32, the key wanted is in low..high-1.
        by_count: whether tokens are counted, or their probability, relative to the maximum's, is added up.
        wanted: fp32, what is to be reached; nothing can be told of a negative one.

    Returns:
        int32, and [PADDED] bool.
    """
    groups = tl.arange(0, PADDED)
    highest = tl.load(group_highest_ptr + row * GROUPS + groups, mask=groups < GROUPS, other=-float("inf"))
    keys = key_of(highest, SHIFT)
    if wanted >= 0.0:
        weights = tl.where(by_count, 1.0, tl.exp2((highest - maximum) * scale))
        low = highest_reaching(keys, weights, low, high, wanted)
    return low, keys >= low


@triton.jit
def load_groups(
    logits_ptr,
    logits_stride,
    row,
    selected,
    list_ptr,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
):
    """[MOST_GROUPS, GROUP] fp32 logits of the selected groups, -inf where there are fewer and past the vocabulary.

    `list_ptr` is where they may be listed, MOST_GROUPS int32 a row. Not to be called with more groups selected: their
    numbers would be written past the row's list.
    """
    chosen = selected.to(tl.int32)
    place = row * MOST_GROUPS + tl.cumsum(chosen, axis=0) - 1
    tl.store(list_ptr + place, tl.arange(0, PADDED), mask=selected)
    tl.debug_barrier()  # other threads read what these have written
    entry = tl.arange(0, MOST_GROUPS)
    used = entry < tl.sum(chosen, axis=0)
    group = tl.load(list_ptr + row * MOST_GROUPS + entry, mask=used, other=0)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = logits_ptr + row.to(tl.int64) * logits_stride + index
    return tl.load(at, mask=used[:, None] & (index < VOCAB), other=-float("inf")).to(tl.float32)


@triton.jit
def search_loaded(logits, low, high, limits_count, top_k, wanted_share, top_p, maximum, scale, SHIFT: tl.constexpr):
    """The lowest key that top-k and top-p leave of the loaded logits at or above `low`, as int32.

    Args:
        wanted_share: fp32, the probability, relative to the maximum's, that a top-p is to reach; negative if that is
            `top_p` of what is left before it. A `top_p` of 1 keeps all.
    """
    keys = key_of(logits, SHIFT)
    if limits_count:
        low = highest_reaching(keys, tl.full(keys.shape, 1.0, tl.float32), low, high, top_k.to(tl.float32))
    if top_p < 1.0:
        weights = tl.where(keys >= low, tl.exp2((logits - maximum) * scale), 0.0)
        wanted = tl.where(wanted_share < 0.0, tl.maximum(top_p, 1e-6) * tl.sum(weights), wanted_share)
        low = highest_reaching(keys, weights, low, high, wanted)
    return low
