"""Log-probabilities of tokens and of the most likely ones in their places: computed on the device, unpacked later.

A token's are *packed* into one row of int32: its log-probability, its rank, then the ids and the log-probabilities of
the most likely tokens, numbers by their bits. Works on logits as the model gives them and knows nothing of requests.
"""

from __future__ import annotations

import numpy as np
import torch

from protocol.arrays import pack_floats, pack_ints
from protocol.logprobs import TokenLogprobs

# Rows that are looked at together: they are needed in float32, and so many of a large vocabulary take 20 MB.
PIECE_ROWS = 32


def packed_size(width: int) -> int:
    return 2 + 2 * width


def pack_logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, packed: torch.Tensor) -> None:
    """Measures a token in each row, without the host looking.

    Args:
        logits: [rows, vocab] in the model's dtype.
        tokens: [rows] int32; what a token of -1 gets means nothing.
        packed: [rows, 2 + 2 * width] int32, written; `width` most likely tokens, at most the vocabulary.
    """
    width = (packed.shape[1] - 2) // 2
    for piece, chosen, out in zip(logits.split(PIECE_ROWS), tokens.split(PIECE_ROWS), packed.split(PIECE_ROWS)):
        scores = piece.float()
        normalizer = scores.logsumexp(-1, keepdim=True)
        score = scores.gather(-1, chosen.clamp(min=0).long()[:, None])
        best, ids = scores.topk(width)
        out[:, 0] = (score - normalizer).squeeze(1).view(torch.int32)
        out[:, 1] = (scores >= score).sum(-1)
        out[:, 2 : 2 + width] = ids
        out[:, 2 + width :] = (best - normalizer).view(torch.int32)


def table_of(packed: np.ndarray, rows: np.ndarray, width: int) -> TokenLogprobs:
    """The first `width` alternatives of each packed row, under the names `rows`.

    Args:
        packed: [rows, 2 + 2 * width or more] int32.
    """
    middle = 2 + (packed.shape[1] - 2) // 2
    return TokenLogprobs(
        rows=pack_ints(rows),
        logprobs=pack_floats(packed[:, 0].copy().view(np.float32)),
        ranks=pack_ints(packed[:, 1]),
        top_ids=pack_ints(packed[:, 2 : 2 + width]),
        top_logprobs=pack_floats(packed[:, middle : middle + width].copy().view(np.float32)),
    )
