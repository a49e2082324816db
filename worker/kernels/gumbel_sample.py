"""Draws the next token of each row from its logits: by temperature, among the tokens that a threshold keeps.

What a row draws is a function of (seed, position) and its logits alone: the batch, the slot and the process it runs
in play no part. The vocabulary is cut into stretches, and the Gumbel-max trick is played twice: for a stretch by its
probability, then for a token in it. That is the softmax's distribution exactly, and noise is computed for one stretch
a row instead of for the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.kernels._triton import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)
from worker.kernels.argmax_sample import argmax_sample_reference

# Logits of a stretch. Never chosen by the number of rows: what is drawn depends on where the stretches lie.
STRETCH = 2048
# Logits of a group, into which stretches are cut where few of a row's logits are looked for.
GROUP = 128


@triton.jit
def load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] fp32 logits, -inf past the vocabulary."""
    index = stretch * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row.to(tl.int64) * logits_stride + index
    return tl.load(at, mask=index < VOCAB, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr"])
def _stretch_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    threshold_ptr,
    highest_ptr,
    mass_ptr,
    lowest_ptr,
    group_highest_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    stretch = tl.program_id(0)
    row = tl.program_id(1)
    logits = load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB, BLOCK)
    temperature = tl.load(temperature_ptr + tl.load(row_slots_ptr + row))
    highest = tl.max(logits, axis=0)
    # Weights are relative to the stretch's own maximum: the row's is not known yet. A NaN or +inf makes the mass NaN.
    origin = tl.where(highest > -float("inf"), highest, 0.0)
    weights = tl.exp2((logits - origin) * (1.4426950408889634 / tl.where(temperature > 0.0, temperature, 1.0)))
    if threshold_ptr is not None:
        # Written so that a NaN is not dropped.
        weights = tl.where(logits < tl.load(threshold_ptr + row), 0.0, weights)
    at = row * STRETCHES + stretch
    tl.store(highest_ptr + at, highest)
    tl.store(mass_ptr + at, tl.sum(weights, axis=0))
    if lowest_ptr is not None:
        tl.store(lowest_ptr + at, tl.min(tl.where(logits > -float("inf"), logits, float("inf")), axis=0))
        group_highest = tl.max(tl.reshape(logits, (GROUPS, BLOCK // GROUPS)), axis=1)
        tl.store(group_highest_ptr + at * GROUPS + tl.arange(0, GROUPS), group_highest)


@triton.jit
def _noise(seed, position, first, level: tl.constexpr, COUNT: tl.constexpr):
    """[COUNT] fp32 Gumbel noise over ln 2, for entries `first`, a multiple of 4, and on; see `sample`."""
    counter = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = counter * 0
    # One call gives the noise of four neighbours.
    a, b, c, d = tl.philox(seed, counter, zero + position, zero, zero + level)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (COUNT,))
    # (0, 1) from 23 of the bits, so that the largest value is 1 - 2**-24 exactly, never 1.
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    # The inner logarithm must be accurate near 1, where the noise is largest; the outer one need not.
    return -tl.log2(-tl.log(uniform))


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr", "positions_ptr", "token_ptr"])
def _draw_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    threshold_ptr,
    seeds_ptr,
    positions_ptr,
    highest_ptr,
    mass_ptr,
    token_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    position = tl.load(positions_ptr + row).to(tl.uint32)
    stretches = tl.arange(0, PADDED)
    mask = stretches < STRETCHES
    highest = tl.load(highest_ptr + row * STRETCHES + stretches, mask=mask, other=-float("inf"))
    mass = tl.load(mass_ptr + row * STRETCHES + stretches, mask=mask, other=0.0)
    temperature = tl.load(temperature_ptr + slot)
    seed = tl.load(seeds_ptr + slot)
    maximum = tl.max(highest, axis=0)
    usable = (tl.min((mass >= 0.0).to(tl.int32), axis=0) == 1) & (maximum > -float("inf"))
    if usable:
        scale = 1.4426950408889634 / temperature
        score = highest
        if temperature > 0.0:
            score = (highest - maximum) * scale + tl.log2(mass) + _noise(seed, position, 0, 1, PADDED)
        _best, stretch = tl.max(score, axis=0, return_indices=True)  # the lowest index of equals
        logits = load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB, BLOCK)
        score = logits
        if temperature > 0.0:
            score = (logits - maximum) * scale + _noise(seed, position, stretch * BLOCK, 0, BLOCK)
            if threshold_ptr is not None:
                score = tl.where(logits < tl.load(threshold_ptr + row), -float("inf"), score)
        _best, offset = tl.max(score, axis=0, return_indices=True)
        tl.store(token_ptr + row, stretch * BLOCK + offset)
    else:
        tl.store(token_ptr + row, -1)


def stretch_size(vocab: int) -> int:
    return min(STRETCH, max(16, next_power_of_2(vocab)))


@dataclass(frozen=True, slots=True)
class Stretches:
    """What one read of the logits tells of each row's stretches. All fp32, by row.

    highest: [rows, stretches] the highest logit.
    mass: [rows, stretches] the sum of exp((logit - highest) / temperature) of those that are not below the row's
        threshold, NaN where the stretch holds NaN or +inf.
    lowest: [rows, stretches] the lowest finite logit, +inf where there is none.
    group_highest: [rows, stretches * groups of a stretch] the highest logit of each group.
    """

    highest: torch.Tensor
    mass: torch.Tensor
    lowest: torch.Tensor | None = None
    group_highest: torch.Tensor | None = None


def measure_stretches(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    threshold: torch.Tensor | None = None,
    to_filter: bool = False,
) -> Stretches:
    """Reads the logits once; `to_filter` finds the lowest of each stretch and the highest of each group as well. A
    temperature of 0 counts as 1. Arguments as of `sample`."""
    rows, vocab = logits.shape
    block = stretch_size(vocab)
    stretches, groups = cdiv(vocab, block), cdiv(block, GROUP)
    highest = torch.empty((rows, stretches), dtype=torch.float32, device=logits.device)
    found = Stretches(highest, torch.empty_like(highest))
    if to_filter:
        of_groups = torch.empty((rows, stretches * groups), dtype=torch.float32, device=logits.device)
        found = Stretches(highest, found.mass, torch.empty_like(highest), of_groups)
    _stretch_kernel[(stretches, rows)](
        logits,
        row_slots,
        temperature,
        threshold,
        found.highest,
        found.mass,
        found.lowest,
        found.group_highest,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=block,
        STRETCHES=stretches,
        GROUPS=groups,
        num_warps=4,
        **dependent_launch(logits.device),
    )
    return found


def sample(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws a token a row from softmax(logits / temperature), or the arg-max where temperature is 0.

    The Gumbel-max trick (Gumbel 1954): argmax(log p + noise) draws from p. It is applied to the probabilities of
    stretches of 2,048 tokens (of the vocabulary rounded up to a power of two, where that is less), and then to the
    tokens of the stretch drawn. The noise is Philox4x32-10 (Salmon et al. 2011): key = the seed's low and high 32
    bits, counter = (index // 4, position, choice, level) with choice 0 and level 1 for stretches, 0 for tokens; word
    index % 4; u = ((word >> 9) + 0.5) * 2**-23; noise = -log(-log(u)). Logits of -inf are never drawn, nor are those
    below the threshold. The lowest index wins ties.

    Two launches. The first reads rows * vocab logits once, with an exponential for each; the second reads a stretch
    a row.

    Args:
        logits: [rows, vocab] fp32 or bf16, rows may be strided.
        row_slots: [rows] int32.
        temperature: [slots + 1] fp32, 0 for greedy.
        seeds: [slots + 1] int64.
        positions: [rows] int32, position of the token being drawn.
        threshold: [rows] fp32, the smallest logit that may be drawn; greedy rows ignore it.

    Returns:
        [rows] int32; -1 for a row that holds NaN or +inf or has no finite logit.
    """
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows == 0:
        return token
    measured = measure_stretches(logits, row_slots, temperature, threshold)
    stretches = measured.highest.shape[1]
    _draw_kernel[(rows,)](
        logits,
        row_slots,
        temperature,
        threshold,
        seeds,
        positions,
        measured.highest,
        measured.mass,
        token,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=stretch_size(vocab),
        STRETCHES=stretches,
        PADDED=max(4, next_power_of_2(stretches)),
        num_warps=8,
        **dependent_launch(logits.device),
    )
    return token


def sample_reference(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sample` in plain torch, for any device; only rows with a temperature pay for it."""
    token = argmax_sample_reference(logits)
    row_temperature = temperature[row_slots]
    noisy = torch.nonzero(row_temperature > 0).flatten()
    if noisy.numel() == 0:
        return token
    scores = logits[noisy].float()
    scores = (scores - scores.amax(-1, keepdim=True)) * (1.0 / row_temperature[noisy, None])
    if threshold is not None:
        scores.masked_fill_(logits[noisy] < threshold[noisy, None], -torch.inf)
    rows, vocab = scores.shape
    block = stretch_size(vocab)
    stretches = cdiv(vocab, block)
    scores = torch.nn.functional.pad(scores, (0, stretches * block - vocab), value=-torch.inf)
    scores = scores.view(rows, stretches, block)
    row_seeds, row_positions = seeds[row_slots[noisy]], positions[noisy]
    start = torch.zeros_like(row_seeds)
    stretch = (scores.logsumexp(-1) + gumbel_noise(row_seeds, row_positions, start, stretches, 1)).argmax(-1)
    start = stretch * block
    chosen = scores[torch.arange(rows, device=scores.device), stretch]
    drawn = start + (chosen + gumbel_noise(row_seeds, row_positions, start, block, 0)).argmax(-1)
    token[noisy] = torch.where(token[noisy] < 0, -1, drawn.to(torch.int32))
    return token


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, start: torch.Tensor, count: int, level: int
) -> torch.Tensor:
    """The noise that `sample` adds.

    Args:
        seeds: [rows] int64.
        positions: [rows] int32.
        start: [rows] int64, the first entry of each row, a multiple of 4.
        count: entries of each row.
        level: 1 for stretches, 0 for tokens.

    Returns:
        [rows, count] fp32.
    """
    counter = start[:, None] // 4 + torch.arange(cdiv(count, 4), dtype=torch.int64, device=seeds.device)
    words = philox4x32(seeds[:, None], counter, positions.long()[:, None], torch.full_like(counter, level))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :count]
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return u.log_().neg_().log_().neg_()


def philox4x32(
    seed: torch.Tensor, counter0: torch.Tensor, counter1: torch.Tensor, counter3: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of counter (counter0, counter1, 0, counter3), in int64 arithmetic.

    Args:
        seed: int64, the key; broadcast with the counters.
        counter0, counter1, counter3: int64 in 0..2**32-1.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    c0, c1, c3 = torch.broadcast_tensors(counter0 & low, counter1 & low, counter3 & low)
    c2 = torch.zeros_like(c0)
    for _ in range(10):
        # The products wrap around in int64; their 64 bits, and so both halves, are right all the same.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product2 >> 32) & low) ^ c1 ^ key0, product2 & low
        c2, c3 = ((product0 >> 32) & low) ^ c3 ^ key1, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
