"""Attention backends, by name.

`create_backend` is all that a caller needs: the interface in `interface.py` says what it gets.
"""

from __future__ import annotations

import torch

from worker.attention.interface import AttentionBackend, AttentionMetadata
from worker.kernels.qk_norm_rope import QueryKeyTransform

BACKENDS = ("torch", "triton", "flash_attn")

__all__ = ["BACKENDS", "AttentionBackend", "AttentionMetadata", "QueryKeyTransform", "create_backend"]


def create_backend(
    name: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_rows: int,
    max_tokens: int,
    max_blocks_per_row: int,
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Makes the attention backend called `name`.

    Args:
        num_heads, num_kv_heads, head_dim: shape of a layer's attention; num_kv_heads divides num_heads.
        block_size: tokens a cache block.
        max_rows, max_tokens: most rows and tokens of a step.
        max_blocks_per_row: width of the block table.
        device, dtype: of the cache and the queries.

    Raises:
        ValueError: `name` is unknown, or the backend cannot work with one of the values.
        ImportError: the backend needs a package that is not installed.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if name == "torch":
        from worker.attention.torch_backend import TorchAttention

        return TorchAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
        )
    if name == "triton":
        from worker.attention.triton_backend import TritonAttention

        return TritonAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
        )
    if name == "flash_attn":
        from worker.attention.flash_attn_backend import FlashAttnAttention

        return FlashAttnAttention(
            head_dim=head_dim,
            block_size=block_size,
            max_rows=max_rows,
            max_blocks_per_row=max_blocks_per_row,
            device=device,
        )
    raise ValueError(f"attention backend {name!r} is unknown: choose one of {', '.join(BACKENDS)}")
