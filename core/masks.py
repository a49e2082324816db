"""The masks of a step: which tokens each request that follows a grammar may draw, as bits for the worker.

Reads requests' states and options; knows nothing of sockets or of when masks are due.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from core.request import Request
from protocol.messages import StepMasks, pack_ints


class MaskMaker:
    """Computes the masks of a step's rows in several threads."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._executor = LLExecutor()

    def masks(self, step_id: int, rows: Sequence[tuple[int, Request, int]]) -> StepMasks:
        """The message with the masks of these rows: (slot, request, its number of known tokens).

        A grammar that fails allows nothing but the end of the answer; `GrammarState.advance` then says why.
        """
        masks = np.zeros((len(rows), -(-self._vocab_size // 32)), np.int32)
        matchers = []
        for row, (_, request, _) in enumerate(rows):
            assert request.grammar is not None
            matchers.append((request.grammar.matcher, row))
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0][0], masks)
        elif matchers:
            fill_next_token_bitmask_par(self._executor, matchers, masks)
        for mask, (_, request, num_tokens) in zip(masks, rows, strict=True):
            self._restrict(mask, request, num_tokens)
        return StepMasks(step_id, pack_ints([slot for slot, _, _ in rows]), masks.tobytes())

    def _restrict(self, mask: np.ndarray, request: Request, num_tokens: int) -> None:
        """Takes out what other options forbid; an end that is the only way on stays."""
        params = request.params
        if params.allowed_token_ids is not None:
            mask &= _bits(params.allowed_token_ids, self._vocab_size)
        if num_tokens - request.num_prompt_tokens < params.min_tokens:
            going_on = mask & ~_bits((*self._eos_token_ids, *params.stop_token_ids), self._vocab_size)
            if going_on.any():
                mask[:] = going_on


@lru_cache(maxsize=64)
def _bits(token_ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """[ceil(vocab_size / 32)] int32, the bits of these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[[token for token in token_ids if token < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view("<i4")
