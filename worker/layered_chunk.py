"""A prompt's chunk whose layers are computed a few at a time, in the steps that decode meanwhile.

Cut by tokens, a long prompt is computed in pieces too small for the device. Cut by layers it is computed as if nothing
ran beside it, and streams wait for some of its layers at a time (layered prefill, Lee et al. 2025, arXiv:2510.08055).
Between two steps there is one hidden state a token to keep.

Kernels are launched one by one: of a chunk so long, each takes longer than its launch.
"""

from __future__ import annotations

import numpy as np
import torch

from worker.attention import AttentionBackend, AttentionMetadata
from worker.batch_state import BatchState
from worker.kernels import Ops
from worker.models import Qwen3
from worker.step_inputs import StepInputs, StepRows


class LayeredChunk:
    """Owns what lasts from one step of a chunk to the next. A chunk that is begun takes the place of the last one."""

    def __init__(
        self,
        model: Qwen3,
        ops: Ops,
        state: BatchState,
        attention: AttentionBackend,
        block_size: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._ops = ops
        self._state = state
        self._attention = attention
        self._block_size = block_size
        self._inputs = StepInputs(1, max_tokens, device)
        self._residual = torch.zeros((max_tokens, model.config.hidden_size), dtype=dtype, device=device)
        self._positions = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._cache_slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._kv_lens = torch.zeros(1, dtype=torch.int32, device=device)
        self._metadata: AttentionMetadata | None = None

    def begin(self, slot: int, token_ids: np.ndarray, kv_len: int) -> None:
        """Starts on the next tokens of a slot, after which it will have `kv_len` tokens in the cache."""
        inputs, state, tokens = self._inputs, self._state, len(token_ids)
        slots = np.array([slot])
        inputs.send(StepRows(slots, np.array([0, tokens]), 0, slots, np.array([0]), [token_ids]))
        self._metadata = metadata = AttentionMetadata(
            num_decode_rows=0,
            decode_rows=inputs.decode_rows,
            row_slots=inputs.row_slots,
            query_start=inputs.query_start,
            kv_lens=self._kv_lens,
            positions=self._positions[:tokens],
            cache_slots=self._cache_slots[:tokens],
            block_table=state.block_table,
            max_query_len=tokens,
            max_kv_len=kv_len,
        )
        on_device = inputs.token_ids[:tokens]
        self._ops.step_metadata(
            metadata.row_slots, metadata.query_start, metadata.decode_rows, state.seq_lens, state.last_token,
            state.block_table, self._block_size, on_device, metadata.positions, metadata.cache_slots, metadata.kv_lens,
        )  # fmt: skip
        self._residual[:tokens] = self._model.embed(on_device)

    def run(self, kv_cache: torch.Tensor, first: int, count: int) -> None:
        """Computes `count` layers from layer `first` on. With the last, the tokens count as cached."""
        metadata = self._metadata
        assert metadata is not None, "layers of a chunk that was not begun"
        # What other steps have prepared meanwhile was theirs.
        self._attention.prepare(metadata)
        residual = self._residual[: len(metadata.positions)]
        self._model.run_layers(residual, kv_cache, self._attention, metadata, first, count)
        if first + count == len(self._model.layers):
            self._ops.commit_lengths(metadata.row_slots, metadata.kv_lens, self._state.seq_lens)

    def last_hidden(self) -> torch.Tensor:
        """[hidden_size], the residual stream of the chunk's last token."""
        assert self._metadata is not None
        return self._residual[len(self._metadata.positions) - 1]
