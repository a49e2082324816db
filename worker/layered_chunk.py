"""A prompt's chunk whose layers are computed a few at a time, in the steps that decode meanwhile.

Cut by tokens, a long prompt is computed in pieces too small for the device. Cut by layers it is computed as if nothing
ran beside it, and streams wait for some of its layers at a time (layered prefill, Lee et al. 2025, arXiv:2510.08055).
Between two steps there is one hidden state a token to keep. All buffers are fixed, so that a layer can be captured.
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
        self._length = 0
        self._metadata = self._metadata_of(0, 0)

    def _metadata_of(self, num_tokens: int, max_kv_len: int) -> AttentionMetadata:
        return AttentionMetadata(
            num_decode_rows=0,
            decode_rows=self._inputs.decode_rows,
            row_slots=self._inputs.row_slots,
            query_start=self._inputs.query_start,
            kv_lens=self._kv_lens,
            positions=self._positions[:num_tokens],
            cache_slots=self._cache_slots[:num_tokens],
            block_table=self._state.block_table,
            max_query_len=num_tokens,
            max_kv_len=max_kv_len,
        )

    @property
    def num_tokens(self) -> int:
        """Of the chunk, padding included."""
        return len(self._metadata.positions)

    def begin(self, slot: int, token_ids: np.ndarray, kv_len: int, num_tokens: int) -> None:
        """Starts on the next tokens of a slot, after which it will have `kv_len` tokens in the cache.

        They are padded to `num_tokens`.
        """
        inputs, state, slots = self._inputs, self._state, np.array([slot])
        self._length = len(token_ids)
        inputs.send(StepRows(slots, np.array([0, self._length]), 0, slots, np.array([0]), [token_ids]))
        self._metadata = metadata = self._metadata_of(num_tokens, kv_len)
        on_device = inputs.token_ids[:num_tokens]
        self._ops.step_metadata(
            metadata.row_slots, metadata.query_start, metadata.decode_rows, state.seq_lens, state.last_token,
            state.block_table, self._block_size, on_device, metadata.positions, metadata.cache_slots, metadata.kv_lens,
        )  # fmt: skip
        self._residual[:num_tokens] = self._model.embed(on_device)

    def resume(self) -> None:
        """Comes before the layers of a step: what other steps have prepared meanwhile was theirs."""
        self._attention.prepare(self._metadata)

    def run_layer(self, kv_cache: torch.Tensor, layer: int) -> None:
        residual = self._residual[: self.num_tokens]
        self._model.run_layers(residual, kv_cache, self._attention, self._metadata, layer, 1)

    def end(self) -> None:
        """Comes after the last layer: the tokens count as cached."""
        self._ops.commit_lengths(self._metadata.row_slots, self._kv_lens, self._state.seq_lens)

    def last_hidden(self) -> torch.Tensor:
        """[hidden_size], the residual stream of the chunk's last token."""
        return self._residual[self._length - 1]
