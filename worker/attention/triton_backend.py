"""Attention by this project's own Triton kernels: the default on a GPU.

Decode rows go to the split decode kernel, the other rows to the prefill kernel; what each program of either does is
decided once a step. Any cache block size that is a power of two of at least 16 tokens will do.
"""

from __future__ import annotations

import torch

from worker.attention.interface import AttentionMetadata, write_keys_and_values
from worker.kernels.attention_decode import paged_decode_attention
from worker.kernels.attention_prefill import paged_prefill_attention
from worker.kernels.decode_schedule import DecodeWorkspace, schedule_decode
from worker.kernels.prefill_schedule import PrefillWorkspace, schedule_prefill
from worker.kernels.qk_norm_rope import QueryKeyTransform


class TritonAttention:
    """Attention on the paged cache, safe to capture in a CUDA graph."""

    name = "triton"

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size={block_size}: triton attention needs a power of two of at least 16")
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._decode = DecodeWorkspace.create(
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        self._prefill = PrefillWorkspace.create(
            max_rows=max_rows,
            max_tokens=max_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Shares the rows' work out, for all layers."""
        tokens = metadata.positions.shape[0]
        if metadata.num_decode_rows != 0:
            schedule_decode(
                metadata.row_slots, metadata.kv_lens, metadata.decode_rows, self._most_decode_rows(metadata),
                self._decode, self._is_fused(metadata),
            )  # fmt: skip
        if metadata.num_decode_rows != tokens:
            schedule_prefill(
                metadata.row_slots, metadata.query_start, metadata.kv_lens, metadata.decode_rows, tokens,
                metadata.num_decode_rows or 0, self._most_decode_rows(metadata), self._prefill,
            )  # fmt: skip

    def _is_fused(self, metadata: AttentionMetadata) -> bool:
        """Whether one kernel makes queries, keys and values of the product and attends: in steps of decodes alone."""
        return metadata.num_decode_rows == metadata.positions.shape[0] <= self._decode.most_fused_rows

    @staticmethod
    def _most_decode_rows(metadata: AttentionMetadata) -> int:
        rows = metadata.row_slots.shape[0]
        return rows if metadata.num_decode_rows is None else metadata.num_decode_rows

    def attend(
        self,
        qkv: torch.Tensor,
        transform: QueryKeyTransform,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        tokens = qkv.shape[0]
        if self._is_fused(metadata):
            heads = qkv.view(tokens, -1, self._head_dim)
            num_heads = heads.shape[1] - 2 * key_cache.shape[2]
            out = torch.empty((tokens, num_heads, self._head_dim), dtype=qkv.dtype, device=qkv.device)
            return paged_decode_attention(
                heads, key_cache, value_cache, metadata.block_table, self._decode, self._scale, out, transform
            )
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
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        most_decode = self._most_decode_rows(metadata)
        if most_decode:
            paged_decode_attention(
                query[:most_decode],
                key_cache,
                value_cache,
                metadata.block_table,
                self._decode,
                self._scale,
                out[:most_decode],
            )
        if metadata.num_decode_rows != query.shape[0]:
            paged_prefill_attention(
                query,
                key_cache,
                value_cache,
                metadata.block_table,
                self._prefill,
                self._scale,
                out,
                least_decode_rows=metadata.num_decode_rows or 0,
                most_decode_rows=most_decode,
            )
        return out
