"""Paged causal attention for rows of several query tokens: prompts, chunks of them, and prompts with a cached prefix.

Once a step, prefill_schedule.py shares the rows out; every layer's `paged_prefill_attention` then runs as many programs
as the device holds, each of which attends tiles of query tokens, for all query heads of one key/value head, to their
part of the cache. Knows nothing of decode rows.
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
from worker.kernels.attention_prefill_hopper import hopper_prefill_attention
from worker.kernels.prefill_schedule import SHARE_FIELDS, TILE_FIELDS, PrefillConfig, PrefillWorkspace

# Head dimensions that are combined together: whole, a tile's parts would not fit the registers.
_COMBINED_DIMS = 64


@triton.jit
def _attend(
    acc,
    maximum,
    total,
    query,
    begin,
    end,
    last,
    table_ptr,
    key_cache_ptr,
    value_cache_ptr,
    cache_offset,
    in_dim,
    cache_stride,
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Folds cached tokens begin..end-1 into the running softmax. `last` is each query's own position."""
    offsets = tl.arange(0, TILE)
    for tile_start in range(begin, end, TILE):
        position = tile_start + offsets
        if TILE <= BLOCK_SIZE:
            block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
            cache_slot = block * BLOCK_SIZE + tile_start % BLOCK_SIZE + offsets
        elif MASKED:
            block = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
            cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        else:
            block = tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)
            cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        where = cache_slot[:, None] * cache_stride + cache_offset[None, :]
        if MASKED:  # what lies past the row's end may be another request's NaN, so it is not loaded
            mask = (position < end)[:, None] & in_dim[None, :]
            key = tl.load(key_cache_ptr + where, mask=mask, other=0.0)
            value = tl.load(value_cache_ptr + where, mask=mask, other=0.0)
        elif PADDED:
            key = tl.load(key_cache_ptr + where, mask=in_dim[None, :], other=0.0)
            value = tl.load(value_cache_ptr + where, mask=in_dim[None, :], other=0.0)
        else:
            key = tl.load(key_cache_ptr + where)
            value = tl.load(value_cache_ptr + where)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            score = tl.where(position[None, :] <= last[:, None], score, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, axis=1) * scale_log2)
        rescale = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(score * scale_log2 - new_maximum[:, None])
        total = total * rescale + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        maximum = new_maximum
    return acc, maximum, total


@triton.jit
def _part_of(first_program, i, kv_head, NUM_KV_HEADS: tl.constexpr):
    """Where the `i`th part of the tile that `first_program` begins is kept.

    A program has at most two parts of tiles: one of a tile that others began, and the beginning of another.
    """
    return ((first_program + i) * 2 + tl.maximum(1 - i, 0)) * NUM_KV_HEADS + kv_head


@triton.jit
def _prefill_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    tiles_ptr,
    shares_ptr,
    plan_ptr,
    arrived_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    query_stride,
    cache_stride,
    table_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    SHARE_FIELDS: tl.constexpr,
    COMBINED_DIMS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    # The schedule was there before this layer's first kernel was launched, so it is read before the wait.
    share = tl.load(plan_ptr)
    tickets = tl.load(plan_ptr + 1) * NUM_KV_HEADS
    ticket = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM)
    in_dim = dims < HEAD_DIM
    share_ptr = shares_ptr + ticket // NUM_KV_HEADS * SHARE_FIELDS
    tile_ptr = tiles_ptr + tl.load(share_ptr) * TILE_FIELDS
    here = tl.load(share_ptr + 1)
    share_end = tl.load(share_ptr + 2)
    if DEPENDENT:
        gdc_wait()
    while ticket < tickets:
        kv_head = ticket % NUM_KV_HEADS
        program = ticket // NUM_KV_HEADS
        head = kv_head * GROUP + m % GROUP
        cache_offset = kv_head * HEAD_DIM + dims
        work_begin = tl.load(tile_ptr)
        work_end = tl.load(tile_ptr + 1)
        slot = tl.load(tile_ptr + 2)
        first = tl.load(tile_ptr + 3)
        stop = tl.load(tile_ptr + 4)
        shift = tl.load(tile_ptr + 5)
        seen = tl.load(tile_ptr + 6)
        tile_ptr += TILE_FIELDS
        begin = here - work_begin
        here = tl.minimum(work_end, share_end)
        end = tl.minimum(here - work_begin, seen)

        token = first + m // GROUP
        in_tile = (token < stop) & (m < TOKENS * GROUP)
        query = tl.load(
            query_ptr + token.to(tl.int64)[:, None] * query_stride + head[:, None] * HEAD_DIM + dims[None, :],
            mask=in_tile[:, None] & in_dim[None, :],
            other=0.0,
        )
        last = tl.where(in_tile, token, first) + shift
        # Cached tokens that every query of the tile sees need no mask.
        unmasked_end = tl.maximum(first + shift + 1, 0) // TILE * TILE
        unmasked_end = tl.maximum(tl.minimum(unmasked_end, end // TILE * TILE), begin)
        table_ptr = block_table_ptr + slot.to(tl.int64) * table_stride
        # Finite, as a part of a tile's cache may have nothing that its first queries see.
        maximum = tl.full((BLOCK_M,), -1e30, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
        acc, maximum, total = _attend(
            acc,
            maximum,
            total,
            query,
            begin,
            unmasked_end,
            last,
            table_ptr,
            key_cache_ptr,
            value_cache_ptr,
            cache_offset,
            in_dim,
            cache_stride,
            scale_log2,
            BLOCK_SIZE,
            TILE,
            False,
            DIM != HEAD_DIM,
            PRECISION,
        )
        acc, maximum, total = _attend(
            acc,
            maximum,
            total,
            query,
            unmasked_end,
            end,
            last,
            table_ptr,
            key_cache_ptr,
            value_cache_ptr,
            cache_offset,
            in_dim,
            cache_stride,
            scale_log2,
            BLOCK_SIZE,
            TILE,
            True,
            DIM != HEAD_DIM,
            PRECISION,
        )
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        out_row_ptr = out_ptr + token.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        first_program = work_begin // share
        programs = (work_end - 1) // share - first_program + 1
        if programs == 1:
            tl.store(
                out_row_ptr[:, None] + dims[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=in_tile[:, None] & in_dim[None, :],
            )
        else:
            part = _part_of(first_program, program - first_program, kv_head, NUM_KV_HEADS)
            part_row = part * BLOCK_M + m
            tl.store(partial_out_ptr + part_row[:, None] * DIM + dims[None, :], out)
            tl.store(partial_lse_ptr + part_row, maximum + tl.log2(total))
            # The last program of a tile to finish combines it. The barrier puts every thread's partial results before
            # the count (release); the count's acquire, and reading past the L1, put the other programs' before what
            # follows.
            tl.debug_barrier()
            arrived = arrived_ptr + first_program * NUM_KV_HEADS + kv_head
            if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == programs - 1:
                tl.store(arrived, 0)
                for base in tl.range(0, DIM, COMBINED_DIMS, num_stages=1):
                    some = base + tl.arange(0, COMBINED_DIMS)
                    best = tl.full((BLOCK_M,), -1e30, dtype=tl.float32)
                    denominator = tl.zeros((BLOCK_M,), dtype=tl.float32)
                    combined = tl.zeros((BLOCK_M, COMBINED_DIMS), dtype=tl.float32)
                    for i in tl.range(programs, num_stages=1):
                        part_row = _part_of(first_program, i, kv_head, NUM_KV_HEADS) * BLOCK_M + m
                        lse = tl.load(partial_lse_ptr + part_row, cache_modifier=".cg")
                        some_at = part_row[:, None] * DIM + some[None, :]
                        part_out = tl.load(partial_out_ptr + some_at, cache_modifier=".cg")
                        new_best = tl.maximum(best, lse)
                        rescale = tl.exp2(best - new_best)
                        weight = tl.exp2(lse - new_best)
                        denominator = denominator * rescale + weight
                        combined = combined * rescale[:, None] + weight[:, None] * part_out
                        best = new_best
                    combined = combined / denominator[:, None]
                    tl.store(
                        out_row_ptr[:, None] + some[None, :],
                        combined.to(out_ptr.dtype.element_ty),
                        mask=in_tile[:, None] & (some < HEAD_DIM)[None, :],
                    )
        if here == share_end:
            ticket = tl.num_programs(0) + tl.atomic_add(plan_ptr + 2, 1, sem="relaxed", scope="gpu")
            if ticket < tickets:
                share_ptr = shares_ptr + ticket // NUM_KV_HEADS * SHARE_FIELDS
                tile_ptr = tiles_ptr + tl.load(share_ptr) * TILE_FIELDS
                here = tl.load(share_ptr + 1)
                share_end = tl.load(share_ptr + 2)
    # The last program leaves the counters as the next launch needs them.
    if tl.atomic_add(plan_ptr + 3, 1, sem="relaxed", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(plan_ptr + 2, 0)
        tl.store(plan_ptr + 3, 0)


def paged_prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    workspace: PrefillWorkspace,
    scale: float,
    out: torch.Tensor,
    least_decode_rows: int = 0,
    most_decode_rows: int = 0,
) -> torch.Tensor:
    """Attends the query tokens of the rows after the decode rows causally to their caches, which hold the step's own
    tokens too, by the schedule that `workspace` holds.

    FlashAttention-2 (Dao 2023): one pass over the keys with a running maximum and sum. The heads of a key/value
    head's group are packed beside the query tokens in one tile, so that a key tile is read once for all of them.
    Partial results of a tile that several programs share are combined in fp32 by the last of them to finish.
    The launch depends on the shapes alone.
    Flops: 4 * Hq * D for each (query, visible key) pair; moves 2 * Hq * D elements a query token, and
    2 * Hkv * D a cached token for every BLOCK_M / (Hq / Hkv) query tokens, mostly from the L2.

    Args:
        query: [tokens, Hq, D], all tokens of the step; the heads of a token are contiguous, tokens may be strided.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous; block_size a power of two >= 16.
        block_table: [slots + 1, max_blocks] int32.
        workspace: as `schedule_prefill` left it for as many tokens and the same bounds of decode rows.
        scale: factor of the scores, usually D ** -0.5.
        out: [tokens, Hq, D], contiguous; written from the first prefill row on, zero for padding tokens.
        least_decode_rows, most_decode_rows: what the host knows of how many decode rows come first.

    Returns:
        `out`.
    """
    tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    config, programs = workspace.launch(tokens - least_decode_rows, tokens - most_decode_rows)
    if config.whole_tiles:
        return hopper_prefill_attention(query, key_cache, value_cache, block_table, workspace, scale, out)
    _prefill_kernel[(num_kv_heads * programs,)](
        query,
        key_cache,
        value_cache,
        block_table,
        workspace.tiles,
        workspace.shares,
        workspace.plan,
        workspace.arrived,
        workspace.partial_out,
        workspace.partial_lse,
        out,
        query.stride(0),
        key_cache.stride(1),
        block_table.stride(0),
        scale * math.log2(math.e),
        **prefill_constants(num_heads, num_kv_heads, head_dim, block_size, config, query.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        **dependent_launch(query.device),
    )
    return out


def prefill_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    config: PrefillConfig,
    dtype: torch.dtype,
) -> dict[str, int | str]:
    """The compile-time constants of the prefill kernel."""
    group = num_heads // num_kv_heads
    return {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "DIM": next_power_of_2(head_dim),
        "GROUP": group, "BLOCK_SIZE": block_size, "BLOCK_M": max(config.block_m, next_power_of_2(group)),
        "TILE": config.tile, "TILE_FIELDS": TILE_FIELDS, "SHARE_FIELDS": SHARE_FIELDS,
        "COMBINED_DIMS": min(_COMBINED_DIMS, next_power_of_2(head_dim)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def paged_prefill_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    row_slots: torch.Tensor,
    query_start: torch.Tensor,
    kv_lens: torch.Tensor,
    decode_rows: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """`paged_prefill_attention` in plain torch, row by row, in fp32."""
    first_row = int(decode_rows)
    block_size, num_kv_heads = key_cache.shape[1:3]
    starts = query_start.tolist()
    out[starts[first_row] :] = 0
    for row in range(first_row, len(row_slots)):
        start, stop, kv_len = starts[row], starts[row + 1], int(kv_lens[row])
        if stop == start or kv_len == 0:
            continue
        blocks = block_table[int(row_slots[row]), : cdiv(kv_len, block_size)].long()
        key = key_cache[blocks].flatten(0, 1)[:kv_len].float()
        value = value_cache[blocks].flatten(0, 1)[:kv_len].float()
        grouped = query[start:stop].float().unflatten(1, (num_kv_heads, -1))
        score = torch.einsum("qhgd,thd->hgqt", grouped, key) * scale
        position = torch.arange(kv_len, device=query.device)
        hidden = position[None, :] > position[kv_len - (stop - start) :, None]
        weight = score.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("hgqt,thd->qhgd", weight, value).flatten(1, 2)
    return out
