"""Everything between the fused qkv product and attention, in one launch.

Per-head RMSNorm of q and k, rotary embedding in place, and the write of k and v to the paged cache. A program
handles a few heads of one token. Knows nothing of sequences: positions and cache slots are given per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.kernels._triton import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)


@triton.jit
def _qk_norm_rope_cache_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    cache_slots_ptr,
    key_cache_ptr,
    value_cache_ptr,
    qkv_stride,
    cache_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offsets = tl.arange(0, HALF)
    in_half = offsets < HEAD_DIM // 2
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    first_ptr = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM + offsets[None, :]
    second_ptr = first_ptr + HEAD_DIM // 2
    if NORM:
        q_first = tl.load(q_weight_ptr + offsets, mask=in_half, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_weight_ptr + HEAD_DIM // 2 + offsets, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_weight_ptr + offsets, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_weight_ptr + HEAD_DIM // 2 + offsets, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if DEPENDENT:
        gdc_wait()
    position = tl.load(positions_ptr + token)
    cache_slot = tl.load(cache_slots_ptr + token)
    first = tl.load(first_ptr, mask=mask, other=0.0)
    second = tl.load(second_ptr, mask=mask, other=0.0)
    is_query = (head < NUM_HEADS)[:, None]
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]

    x = first.to(tl.float32)
    y = second.to(tl.float32)
    if NORM:
        variance = (tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / HEAD_DIM
        scale = tl.rsqrt(variance + eps)[:, None]
        x = x * scale * tl.where(is_query, q_first, k_first)
        y = y * scale * tl.where(is_query, q_second, k_second)
    angle_ptr = cos_sin_ptr + position.to(tl.int64) * HEAD_DIM + offsets
    cos = tl.load(angle_ptr, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HEAD_DIM // 2, mask=in_half, other=0.0)[None, :]
    rotated_first = (x * cos - y * sin).to(first.dtype)
    rotated_second = (y * cos + x * sin).to(first.dtype)
    tl.store(first_ptr, rotated_first, mask=mask & (is_value == 0))
    tl.store(second_ptr, rotated_second, mask=mask & (is_value == 0))

    cache_row = cache_slot * cache_stride + offsets[None, :]
    key_ptr = key_cache_ptr + cache_row + (head - NUM_HEADS)[:, None] * HEAD_DIM
    is_key = mask & (is_query == 0) & (is_value == 0)
    tl.store(key_ptr, rotated_first, mask=is_key)
    tl.store(key_ptr + HEAD_DIM // 2, rotated_second, mask=is_key)
    value_ptr = value_cache_ptr + cache_row + (head - NUM_HEADS - NUM_KV_HEADS)[:, None] * HEAD_DIM
    tl.store(value_ptr, first, mask=mask & is_value)
    tl.store(value_ptr + HEAD_DIM // 2, second, mask=mask & is_value)


@dataclass(frozen=True, slots=True)
class QueryKeyTransform:
    """What turns a layer's product into queries, keys and values: RMSNorm by head, then rotary embedding."""

    q_weight: torch.Tensor | None  # [head_dim]; None where the model does not normalise
    k_weight: torch.Tensor | None
    eps: float
    cos_sin: torch.Tensor | None  # [max_position, head_dim] fp32: head_dim / 2 cosines, then as many sines


def qk_norm_rope_cache(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache_slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Normalises and rotates q and k in place, and writes k and v to the cache.

    RMSNorm per head as Qwen3 (skipped when the weights are None), rotary embedding (Su et al. 2021) in the
    rotate-half convention. All arithmetic is fp32 and rounded once, at the end; transformers rounds after each
    operation, so in bf16 this is the more accurate of the two, and in fp32 they agree.
    Moves 2 * tokens * (Hq + 2 Hkv) * D elements, and D fp32 values a token; about 10 flops an element.

    Args:
        qkv: [tokens, (Hq + 2 Hkv) * D], tokens may be strided; its q and k parts are overwritten.
        q_weight, k_weight: [D], or both None.
        cos_sin: [max_position, D] fp32: D/2 cosines, then D/2 sines.
        positions: [tokens] int32.
        cache_slots: [tokens] int64, block * block_size + offset.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous.

    Returns:
        The q part of `qkv`, viewed as [tokens, Hq, D].
    """
    tokens = qkv.shape[0]
    num_kv_heads, head_dim = key_cache.shape[2:]
    total_heads = qkv.shape[1] // head_dim
    num_heads = total_heads - 2 * num_kv_heads
    # Few tokens: many small programs, to fill the device. Many: a token a program, to have more in flight in each.
    heads, num_warps = (4, 2) if tokens < 256 else (next_power_of_2(total_heads), 8)
    if tokens:
        _qk_norm_rope_cache_kernel[(tokens, cdiv(total_heads, heads))](
            qkv,
            q_weight,
            k_weight,
            cos_sin,
            positions,
            cache_slots,
            key_cache,
            value_cache,
            qkv.stride(0),
            key_cache.stride(1),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=next_power_of_2(head_dim // 2),
            HEADS=heads,
            NORM=q_weight is not None,
            num_warps=num_warps,
            **dependent_launch(qkv.device),
        )
    return qkv[:, : num_heads * head_dim].view(tokens, num_heads, head_dim)


def qk_norm_rope_cache_reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache_slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """`qk_norm_rope_cache` in plain torch, for any device."""
    tokens = qkv.shape[0]
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = qkv.view(tokens, -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    rotated = heads[:, : num_heads + num_kv_heads]
    x = rotated.float()
    if q_weight is not None and k_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x[:, :num_heads] *= q_weight.float()
        x[:, num_heads:] *= k_weight.float()
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    width = num_kv_heads * head_dim
    key_cache.view(-1, width).index_copy_(0, cache_slots, heads[:, num_heads:-num_kv_heads].reshape(tokens, width))
    value_cache.view(-1, width).index_copy_(0, cache_slots, heads[:, -num_kv_heads:].reshape(tokens, width))
    return heads[:, :num_heads]
