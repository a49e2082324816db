"""From logits to tokens: greedy, by temperature, or by temperature within min-p, top-k and top-p; edited before or not.

Runs on the device without the host looking, so that it can be part of a CUDA graph. What a row draws depends on its
logits, its options, its seed and the position of the token, and on nothing else.
"""

from __future__ import annotations

import torch

from worker.batch_state import BatchState
from worker.kernels import Ops
from worker.sampling_variant import SamplingVariant

__all__ = ["SamplingVariant", "sample_tokens"]


def sample_tokens(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, state: BatchState, variant: SamplingVariant,
    ops: Ops,
) -> torch.Tensor:  # fmt: skip
    """Draws a token a row.

    Args:
        logits: [rows, vocab_size] in the model's dtype, or in float32 if they were edited.
        slots: [rows] int32, where each row's options are.
        positions: [rows] int32, the position that the drawn token will have.

    Returns:
        [rows] int32; -1 for a row whose logits hold a NaN.
    """
    if variant is SamplingVariant.GREEDY:
        return ops.argmax_sample(logits)
    if variant >= SamplingVariant.FULL:
        threshold = ops.filter_threshold(logits, slots, state.temperature, state.top_k, state.top_p, state.min_p)
        return ops.sample(logits, slots, state.temperature, state.seed, positions, threshold)
    return ops.sample(logits, slots, state.temperature, state.seed, positions)
