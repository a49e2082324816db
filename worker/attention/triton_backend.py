"""Attention by this project's own Triton kernels: the default on a GPU.

Decode rows go to the split decode kernel, whose work list is made once a step; the other rows go to the prefill
kernel. Any cache block size that is a power of two of at least 16 tokens will do.
"""

from __future__ import annotations

import torch

from worker.attention.interface import AttentionMetadata
from worker.kernels.attention_decode import DecodeWorkspace, paged_decode_attention, schedule_decode
from worker.kernels.attention_prefill import paged_prefill_attention


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
        device: torch.device,
        dtype: torch.dtype,
    ):
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size={block_size}: triton attention needs a power of two of at least 16")
        self._scale = head_dim**-0.5
        self._workspace = DecodeWorkspace.create(
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Makes the decode rows' work list."""
        if metadata.num_decode_rows:
            schedule_decode(metadata.row_slots, metadata.kv_lens, metadata.num_decode_rows, self._workspace)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        decode = metadata.num_decode_rows
        if decode:
            paged_decode_attention(
                query[:decode],
                key_cache,
                value_cache,
                metadata.block_table,
                self._workspace,
                self._scale,
                out[:decode],
            )
        if decode < query.shape[0]:
            paged_prefill_attention(
                query,
                key_cache,
                value_cache,
                metadata.block_table,
                metadata.row_slots,
                metadata.query_start,
                metadata.kv_lens,
                self._scale,
                decode,
                out,
            )
        return out
