"""Attention by the `flash-attn` package, the second backend on a GPU.

Its kernels take one block table row per sequence of the step, which `prepare` gathers from the table by slot, and
cache blocks of a multiple of 256 tokens.
"""

from __future__ import annotations

import torch

from worker.attention.interface import AttentionMetadata, write_keys_and_values
from worker.kernels.qk_norm_rope import QueryKeyTransform


class FlashAttnAttention:
    """Attention by flash_attn_with_kvcache (decode rows) and flash_attn_varlen_func (prefill rows)."""

    name = "flash_attn"

    def __init__(self, *, head_dim: int, block_size: int, max_rows: int, max_blocks_per_row: int, device: torch.device):
        if block_size % 256:
            raise ValueError(f"block_size={block_size}: flash_attn needs a multiple of 256")
        try:
            import flash_attn
        except ImportError as error:
            raise ImportError("the flash_attn attention backend needs its package: pip install flash-attn") from error
        self._flash_attn = flash_attn
        self._scale = head_dim**-0.5
        self._table = torch.zeros((max_rows, max_blocks_per_row), dtype=torch.int32, device=device)
        self._kv_start = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._query_start = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._padding = torch.empty(0)  # [tokens, 1, 1] bool: no row's token, so flash-attn leaves it unwritten

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Gathers the rows' block tables and the prefill rows' bounds."""
        rows, decode = metadata.row_slots.shape[0], metadata.num_decode_rows
        assert decode is not None, "this backend is captured for decode steps alone"
        torch.index_select(metadata.block_table, 0, metadata.row_slots, out=self._table[:rows])
        if decode < rows:
            torch.cumsum(metadata.kv_lens[decode:], 0, dtype=torch.int32, out=self._kv_start[1 : rows - decode + 1])
            torch.sub(metadata.query_start[decode:], decode, out=self._query_start[: rows - decode + 1])
            tokens = torch.arange(metadata.positions.shape[0], device=self._table.device)
            self._padding = (tokens >= metadata.query_start[-1])[:, None, None]

    def attend(
        self,
        qkv: torch.Tensor,
        transform: QueryKeyTransform,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        query = write_keys_and_values(qkv, transform, key_cache, value_cache, metadata)
        return self.forward(query, key_cache, value_cache, metadata)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        rows, decode = metadata.row_slots.shape[0], metadata.num_decode_rows
        assert decode is not None, "this backend is captured for decode steps alone"
        parts = []
        if decode:
            out = self._flash_attn.flash_attn_with_kvcache(
                query[:decode, None],
                key_cache,
                value_cache,
                cache_seqlens=metadata.kv_lens[:decode],
                block_table=self._table[:decode],
                softmax_scale=self._scale,
                causal=True,
            )
            parts.append(out[:, 0])
        if decode < rows:
            out = self._flash_attn.flash_attn_varlen_func(
                query[decode:],
                key_cache,
                value_cache,
                cu_seqlens_q=self._query_start[: rows - decode + 1],
                cu_seqlens_k=self._kv_start[: rows - decode + 1],
                max_seqlen_q=metadata.max_query_len,
                max_seqlen_k=metadata.max_kv_len,
                softmax_scale=self._scale,
                causal=True,
                block_table=self._table[decode:rows],
            )
            parts.append(out.masked_fill_(self._padding[decode:], 0))
        elif decode < query.shape[0]:
            parts.append(torch.zeros_like(query[decode:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
