"""Paged attention for rows of one query token each (decode), with the work split by cached tokens.

Once a step, decode_schedule.py cuts the rows' caches into work items; every layer's `paged_decode_attention` then runs
one program per item and key/value head. Knows nothing of prefill: rows with more query tokens are for
attention_prefill.py.
"""

from __future__ import annotations

import math

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
from worker.kernels.attention_decode_hopper import hopper_decode_attention
from worker.kernels.decode_schedule import FEW_ROWS, ITEM_FIELDS, DecodeConfig, DecodeWorkspace
from worker.kernels.qk_norm_rope import QueryKeyTransform

_COMBINE = 64  # fp32 values a thread of the combining program loads together


@triton.jit
def _gains(weight_ptr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """A norm's weight [DIM], and the same with the halves exchanged, as rotation pairs them."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, DIM)
    in_dim = dims < HEAD_DIM
    other = tl.where(dims < HALF, dims + HALF, dims - HALF)
    gain = tl.load(weight_ptr + dims, mask=in_dim, other=0.0).to(tl.float32)
    return gain, tl.load(weight_ptr + other, mask=in_dim, other=0.0).to(tl.float32)


@triton.jit
def _normalised_heads(
    x_ptr, gain, other_gain, head, mask, cos, sin, eps, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr
):
    """[heads, DIM]: RMSNorm by head and rotary embedding (rotate-half) of the heads at `x_ptr`, rounded once."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, DIM)
    other = tl.where(dims < HALF, dims + HALF, dims - HALF)
    x = tl.load(x_ptr + head * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    y = tl.load(x_ptr + head * HEAD_DIM + other[None, :], mask=mask, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
        wide = wide * scale * gain[None, :]
        y = y * scale * other_gain[None, :]
    return (wide * cos[None, :] + tl.where(dims < HALF, -y, y) * sin[None, :]).to(x.dtype)


@triton.jit
def _fold(
    acc, maximum, total, query, key, value, valid, scale_log2, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds a tile of keys and values into the running softmax."""
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    score = tl.where(valid[None, :], score, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(score, axis=1) * scale_log2)
    rescale = tl.exp2(maximum - new_maximum)
    weight = tl.exp2(score * scale_log2 - new_maximum[:, None])
    total = total * rescale + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_maximum, total


@triton.jit
def _tile_offsets(table_ptr, tile_start, end, cache_stride, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the tile's tokens are in a cache, in elements, and which of them there are."""
    position = tile_start + tl.arange(0, TILE)
    valid = position < end
    if TILE <= BLOCK_SIZE:  # the tile lies in one block, as `tile_start` is a multiple of TILE
        block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
        cache_slot = block * BLOCK_SIZE + tile_start % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    return cache_slot * cache_stride, valid


@triton.jit
def _decode_kernel(
    query_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    items_ptr,
    num_items_ptr,
    arrived_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    query_stride,
    cache_stride,
    table_stride,
    eps,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ITEM: tl.constexpr,
    GROUP_POW2: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
    NORM: tl.constexpr,
    PRELOAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    # The schedule, the table and all keys and values but the new token's were there before this layer's first kernel
    # was launched, so they are read before the wait. They are loaded together, before the first is looked at: every
    # wait here is a memory latency that a short step feels.
    num_items = tl.load(num_items_ptr)
    item_ptr = items_ptr + item * ITEM
    slot = tl.load(item_ptr)
    start = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    row = tl.load(item_ptr + 3)
    first_item = tl.load(item_ptr + 4)
    items = tl.load(item_ptr + 5)
    kv_len = tl.load(item_ptr + 6)
    if item >= num_items:
        if DEPENDENT:
            gdc_wait()
        return

    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM)
    in_dim = dims < HEAD_DIM
    in_heads = (group < GROUP)[:, None] & in_dim[None, :]
    head_offset = (kv_head * GROUP + group)[:, None] * HEAD_DIM + dims[None, :]
    table_ptr = block_table_ptr + slot.to(tl.int64) * table_stride
    cache_offset = kv_head * HEAD_DIM + dims
    query_ptr += row.to(tl.int64) * query_stride
    maximum = tl.full((GROUP_PAD,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((GROUP_PAD,), dtype=tl.float32)
    acc = tl.zeros((GROUP_PAD, DIM), dtype=tl.float32)
    if FUSED:
        # The new token's key and value come from the product, not from the cache: the row's last item starts its
        # softmax with them, and writes them.
        position = kv_len - 1
        owner = (end == kv_len) & (kv_len > 0)
        end = tl.minimum(end, position)
        angle_ptr = cos_sin_ptr + tl.maximum(position, 0).to(tl.int64) * HEAD_DIM + dims % (HEAD_DIM // 2)
        cos = tl.load(angle_ptr, mask=in_dim, other=0.0)
        sin = tl.load(angle_ptr + HEAD_DIM // 2, mask=in_dim, other=0.0)
        q_gain = cos
        q_other_gain = cos
        k_gain = cos
        k_other_gain = cos
        if NORM:
            q_gain, q_other_gain = _gains(q_weight_ptr, HEAD_DIM, DIM)
            k_gain, k_other_gain = _gains(k_weight_ptr, HEAD_DIM, DIM)
        new_block = tl.load(table_ptr + tl.maximum(position, 0) // BLOCK_SIZE).to(tl.int64)
        if PRELOAD:  # the first tile's keys and values are on their way while the product is still computed
            first_at, first_valid = _tile_offsets(table_ptr, start, end, cache_stride, BLOCK_SIZE, TILE)
            first_at = first_at[:, None] + cache_offset[None, :]
            first_mask = first_valid[:, None] & in_dim[None, :]
            first_key = tl.load(key_cache_ptr + first_at, mask=first_mask, other=0.0)
            first_value = tl.load(value_cache_ptr + first_at, mask=first_mask, other=0.0)
        if DEPENDENT:
            gdc_wait()
        q_head = (kv_head * GROUP + group)[:, None]
        query = _normalised_heads(query_ptr, q_gain, q_other_gain, q_head, in_heads, cos, sin, eps, HEAD_DIM, DIM, NORM)
        k_head = NUM_HEADS + kv_head + tl.zeros((1, 1), dtype=tl.int32)
        new_mask = (dims < tl.where(owner, HEAD_DIM, 0))[None, :]
        new_key = _normalised_heads(
            query_ptr, k_gain, k_other_gain, k_head, new_mask, cos, sin, eps, HEAD_DIM, DIM, NORM
        )
        v_ptr = query_ptr + (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        new_value = tl.load(v_ptr, mask=new_mask, other=0.0)
        new_where = (new_block * BLOCK_SIZE + position % BLOCK_SIZE) * cache_stride + cache_offset[None, :]
        tl.store(key_cache_ptr + new_where, new_key, mask=new_mask)
        tl.store(value_cache_ptr + new_where, new_value, mask=new_mask)
        new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale_log2
        maximum = tl.where(owner, new_score, maximum)
        total = tl.where(owner, 1.0, total)
        acc += new_value.to(tl.float32)
        if PRELOAD:
            if start < end:
                acc, maximum, total = _fold(
                    acc, maximum, total, query, first_key, first_value, first_valid, scale_log2, PRECISION
                )
            start += TILE
    else:
        if DEPENDENT:
            gdc_wait()
        query = tl.load(query_ptr + head_offset, mask=in_heads, other=0.0)

    for tile_start in range(start, end, TILE):
        where, valid = _tile_offsets(table_ptr, tile_start, end, cache_stride, BLOCK_SIZE, TILE)
        # What lies past a row's end may be another request's NaN, so it is not loaded: 0 * NaN is NaN.
        mask = valid[:, None]
        if DIM != HEAD_DIM:
            mask = mask & in_dim[None, :]
        key = tl.load(key_cache_ptr + where[:, None] + cache_offset[None, :], mask=mask, other=0.0)
        value = tl.load(value_cache_ptr + where[:, None] + cache_offset[None, :], mask=mask, other=0.0)
        acc, maximum, total = _fold(acc, maximum, total, query, key, value, valid, scale_log2, PRECISION)

    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_row_ptr = out_ptr + row.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
    if items == 1:
        tl.store(out_row_ptr + head_offset, out.to(out_ptr.dtype.element_ty), mask=in_heads)
        return

    lse_offset = kv_head * GROUP + group
    tl.store(partial_out_ptr + item.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + head_offset, out, mask=in_heads)
    tl.store(partial_lse_ptr + item * NUM_HEADS + lse_offset, maximum + tl.log2(total), mask=group < GROUP)
    # The program that finishes a row last combines it. The barrier puts every thread's partial results before the
    # count (release); the count's acquire, and reading past the L1, put the other programs' before what follows.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + row * NUM_KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu")
    if arrived == items - 1:
        tl.store(arrived_ptr + row * NUM_KV_HEADS + kv_head, 0)
        # Partial results of all heads and several items are loaded together: [items, heads, dims].
        splits = tl.arange(0, SPLITS_AT_ONCE)
        member = tl.arange(0, GROUP_POW2)
        head = kv_head * GROUP + member
        in_group = member < GROUP
        best = tl.full((GROUP_POW2,), -float("inf"), dtype=tl.float32)
        denominator = tl.zeros((GROUP_POW2,), dtype=tl.float32)
        combined = tl.zeros((GROUP_POW2, DIM), dtype=tl.float32)
        for base in range(0, items, SPLITS_AT_ONCE):
            mask = (base + splits < items)[:, None] & in_group[None, :]
            at = (first_item + base + splits).to(tl.int64)[:, None] * NUM_HEADS + head[None, :]
            lse = tl.load(partial_lse_ptr + at, mask=mask, other=-float("inf"), cache_modifier=".cg")
            part = tl.load(
                partial_out_ptr + at[:, :, None] * HEAD_DIM + dims[None, None, :],
                mask=mask[:, :, None] & in_dim[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_best = tl.maximum(best, tl.max(lse, axis=0))
            new_best = tl.where(in_group, new_best, 0.0)
            share = tl.exp2(lse - new_best[None, :])
            rescale = tl.exp2(best - new_best)
            denominator = denominator * rescale + tl.sum(share, axis=0)
            combined = combined * rescale[:, None] + tl.sum(part * share[:, :, None], axis=0)
            best = new_best
        combined = combined / tl.where(in_group, denominator, 1.0)[:, None]
        tl.store(
            out_row_ptr + head[:, None] * HEAD_DIM + dims[None, :],
            combined.to(out_ptr.dtype.element_ty),
            mask=in_group[:, None] & in_dim[None, :],
        )


_NO_TRANSFORM = QueryKeyTransform(None, None, 0.0, None)


def paged_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor,
    transform: QueryKeyTransform | None = None,
) -> torch.Tensor:
    """Attends each row's one query token to its cache, by the schedule that `workspace` holds.

    Flash-Decoding (Dao et al. 2023): a row's cache is split over programs, whose partial results, each with its
    log-sum-exp, are combined in fp32 by the last of them to finish; a row of one item needs no combination. All
    query heads of a key/value head share one read of it.
    Moves 2 * Hkv * D elements a cached token; 4 * Hq * D flops a cached token.

    Args:
        query: [rows, Hq, D]; the heads of a row are contiguous, rows may be strided. With a `transform`
            [rows, Hq + 2 Hkv, D], the product as it came: queries and keys are normalised and rotated here, and the
            new token's key and value written to the cache, as `qk_norm_rope_cache` would have.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous; block_size a power of two >= 16.
        block_table: [slots + 1, max_blocks] int32.
        workspace: as `schedule_decode` left it for as many rows.
        scale: factor of the scores, usually D ** -0.5.
        out: [rows, Hq, D], contiguous, written; zero for rows without cached tokens. Rows past the decode rows that
            were scheduled are left alone.
        transform: of queries and keys, where that is still to be done.

    Returns:
        `out`.
    """
    rows, num_heads, head_dim = out.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    fused = transform is not None
    config, splits = workspace.plan(rows, fused)
    if transform is not None and config.for_hopper:
        return hopper_decode_attention(query, key_cache, value_cache, block_table, workspace, scale, out, transform)
    heads = transform or _NO_TRANSFORM
    _decode_kernel[(num_kv_heads, rows + splits)](
        query,
        heads.q_weight,
        heads.k_weight,
        heads.cos_sin,
        key_cache,
        value_cache,
        block_table,
        workspace.items,
        workspace.num_items,
        workspace.arrived,
        workspace.partial_out,
        workspace.partial_lse,
        out,
        query.stride(0),
        key_cache.stride(1),
        block_table.stride(0),
        heads.eps,
        scale * math.log2(math.e),
        **decode_constants(num_heads, num_kv_heads, head_dim, block_size, config, query.dtype),
        FUSED=fused,
        NORM=heads.q_weight is not None,
        PRELOAD=fused and rows <= FEW_ROWS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent_launch(query.device),
    )
    return out


def decode_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    config: DecodeConfig,
    dtype: torch.dtype,
) -> dict[str, int | str]:
    """The compile-time constants of the decode kernel."""
    group = num_heads // num_kv_heads
    group_pow2, dim = next_power_of_2(group), next_power_of_2(head_dim)
    return {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "DIM": dim,
        "GROUP": group, "GROUP_PAD": max(16, group_pow2), "GROUP_POW2": group_pow2,
        "BLOCK_SIZE": block_size, "TILE": config.tile,
        "ITEM": ITEM_FIELDS, "SPLITS_AT_ONCE": max(1, _COMBINE * 32 * config.num_warps // (group_pow2 * dim)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def paged_decode_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_slots: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """`schedule_decode` and `paged_decode_attention` together in plain torch, row by row, in fp32."""
    block_size, num_kv_heads = key_cache.shape[1:3]
    for row, (slot, kv_len) in enumerate(zip(row_slots.tolist(), kv_lens.tolist(), strict=True)):
        if kv_len == 0:
            out[row] = 0
            continue
        blocks = block_table[slot, : cdiv(kv_len, block_size)].long()
        key = key_cache[blocks].flatten(0, 1)[:kv_len].float()
        value = value_cache[blocks].flatten(0, 1)[:kv_len].float()
        grouped = query[row].float().unflatten(0, (num_kv_heads, -1))
        score = torch.einsum("hgd,thd->hgt", grouped, key) * scale
        out[row] = torch.einsum("hgt,thd->hgd", score.softmax(-1), value).flatten(0, 1)
    return out
