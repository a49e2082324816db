"""From logits to tokens: greedy, by temperature, or by temperature within top-k and top-p.

Runs on the device without the host looking, so that it can be part of a CUDA graph. What a row draws depends on its
logits, its options, its seed and the position of the token, and on nothing else.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from worker.batch_state import BatchState
from worker.kernels import Ops


class SamplingVariant(StrEnum):
    """What the rows of a step need; the cheapest that serves them all is run."""

    GREEDY = "greedy"
    PLAIN = "plain"  # some row has a temperature
    FULL = "full"  # some row with a temperature has a top-k or top-p


def sample_tokens(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, state: BatchState, variant: SamplingVariant,
    ops: Ops,
) -> torch.Tensor:  # fmt: skip
    """Draws a token a row.

    Args:
        logits: [rows, vocab_size] in the model's dtype.
        slots: [rows] int32, where each row's options are.
        positions: [rows] int32, the position that the drawn token will have.

    Returns:
        [rows] int32; -1 for a row whose logits hold a NaN.
    """
    if variant is SamplingVariant.GREEDY:
        return ops.argmax_sample(logits)
    if variant is SamplingVariant.FULL:
        logits = mask_top_k_top_p(logits, state.temperature[slots], state.top_k[slots], state.top_p[slots])
    return ops.sample(logits, slots, state.temperature, state.seed, positions)


def mask_top_k_top_p(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Sets to -inf all but the most likely tokens of each row: the top k, and of those the smallest set that has
    probability top_p. Tokens as likely as the last one kept are kept too.

    No sort: the smallest kept value is found exactly by bisection over the bit patterns of float32, which order
    non-negative floats as integers. 31 halvings read [rows, vocab_size] each; a sort of 151,936 entries reads and
    writes it more often and needs four times the memory.

    Args:
        logits: [rows, vocab_size].
        temperature: [rows] float32; a row of temperature 0 is left alone.
        top_k: [rows] int32; 0 keeps all.
        top_p: [rows] float32; 1 keeps all.
    """
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    # NaN must survive to the sampler, which reports it; softmax spreads it over the row, and every mask leaves it.
    probs = scaled.softmax(dim=-1)
    ones = torch.ones_like(probs)
    count_wanted = torch.where(top_k > 0, top_k, logits.shape[1]).float()
    threshold = _largest_threshold(probs, ones, count_wanted)
    probs = torch.where(probs >= threshold[:, None], probs, 0.0)
    mass_wanted = top_p.clamp(min=1e-6) * probs.sum(dim=-1)  # a top_p of 1e-46 is 0 in float32
    threshold = torch.where(top_p < 1, _largest_threshold(probs, probs, mass_wanted), threshold)
    dropped = (probs < threshold[:, None]) & (temperature > 0)[:, None]
    return logits.masked_fill(dropped, float("-inf"))


def _largest_threshold(values: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each row the largest t such that the weights of the values >= t add up to `wanted` or more.

    Values are float32 in [0, 1]; the answer is one of a row's values, or 0 where even all of them do not suffice.
    """
    low = torch.zeros_like(wanted, dtype=torch.int32)  # enough weight at this threshold
    high = torch.full_like(low, 0x3F800001)  # one above the bits of 1.0: never enough
    for _ in range(31):
        middle = (low + high) // 2
        threshold = middle.view(torch.float32)
        enough = torch.where(values >= threshold[:, None], weights, 0.0).sum(dim=-1) >= wanted
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return low.view(torch.float32)
