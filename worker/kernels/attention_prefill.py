"""Paged causal attention for rows of several query tokens: prompts, chunks of them, and prompts with a cached prefix.

Rows are packed one after another; a program finds its row on the device and attends a tile of its query tokens, for
all query heads of one key/value head, to the row's cache. Knows nothing of decode rows but how many to skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from worker.kernels._triton import (
    capability_and_processors,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the prefill kernel is compiled for one device."""

    block_m: int  # query tokens times heads of a group that a program handles
    tile: int  # cached tokens a loop iteration
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread, where a second program on the SM is worth a few spills


def prefill_config(capability: tuple[int, int], head_dim: int, element_size: int, small: bool) -> PrefillConfig:
    """The configuration for a device of `capability`, within its shared memory (99 KiB on sm_89 and sm_120).

    `small` is for steps of few query tokens, where more programs matter more than how often keys are read.
    """
    if next_power_of_2(head_dim) * element_size > 256:  # fp32, which is for checking: correct everywhere, not tuned
        return PrefillConfig(block_m=16 if small else 32, tile=32, num_warps=4, num_stages=1)
    if capability[0] == 9:
        if small:
            return PrefillConfig(block_m=64, tile=128, num_warps=4, num_stages=3)
        # Held to 128 registers, two programs share an SM: one's softmax runs beside the other's products.
        return PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3, maxnreg=128)
    if small:
        return PrefillConfig(block_m=32, tile=64, num_warps=4, num_stages=2)
    if capability == (8, 0):
        return PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=2)
    return PrefillConfig(block_m=128, tile=32, num_warps=8, num_stages=2)


@triton.jit
def _attend(
    acc,
    maximum,
    total,
    query,
    begin,
    end,
    last,
    kv_len,
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
            block = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < kv_len, other=0).to(tl.int64)
            cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        else:
            block = tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)
            cache_slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        where = cache_slot[:, None] * cache_stride + cache_offset[None, :]
        if MASKED:  # what lies past the row's end may be another request's NaN, so it is not loaded
            mask = (position < kv_len)[:, None] & in_dim[None, :]
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


@triton.jit(
    do_not_specialize=["rows", "tokens", "search_steps"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_ptr", "kv_lens_ptr", "decode_rows_ptr"],
)
def _prefill_kernel(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    row_slots_ptr,
    query_start_ptr,
    kv_lens_ptr,
    decode_rows_ptr,
    out_ptr,
    query_stride,
    cache_stride,
    table_stride,
    scale_log2,
    rows,
    tokens,
    search_steps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    # Row r's tiles begin at program query_start[r] // TOKENS + r, which leaves it at least the tiles it needs
    # whatever the rows' lengths are. The padding tokens are one more row, `rows`, which writes zeros.
    first_row = tl.load(decode_rows_ptr)
    offset = tl.load(query_start_ptr + first_row)
    low = first_row
    high = rows + 1
    for _ in range(search_steps):
        middle = (low + high) // 2
        begins = (tl.load(query_start_ptr + middle) - offset) // TOKENS + middle - first_row <= program
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    row = low
    start = tl.load(query_start_ptr + row)
    is_row = row < rows
    stop = tl.load(query_start_ptr + row + 1, mask=is_row, other=0)
    stop = tl.where(is_row, stop, tokens)
    # Longest first: the last tiles of a row attend to the most tokens, and the first row, where an earlier step may
    # have left off, tends to have the most behind it. What starts last should not be what takes longest.
    tiles = (stop - start + TOKENS - 1) // TOKENS
    tile = tiles - 1 - (program - (start - offset) // TOKENS - (row - first_row))
    if tile < 0:
        return
    first = start + tile * TOKENS
    kv_len = tl.load(kv_lens_ptr + row, mask=is_row, other=0)
    slot = tl.load(row_slots_ptr + row, mask=is_row, other=0)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, DIM)
    in_dim = dims < HEAD_DIM
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    in_tile = (token < stop) & (m < TOKENS * GROUP)
    mask = in_tile[:, None] & in_dim[None, :]
    query = tl.load(
        query_ptr + token.to(tl.int64)[:, None] * query_stride + head[:, None] * HEAD_DIM + dims[None, :],
        mask=mask,
        other=0.0,
    )

    before = kv_len - (stop - start)  # tokens cached before this chunk
    last = tl.where(in_tile, before + token - start, before + first - start)
    end = tl.maximum(tl.minimum(before + first - start + TOKENS, kv_len), 0)
    # Tiles that every query of the program sees whole need no mask.
    unmasked_end = tl.maximum(before + first - start + 1, 0) // TILE * TILE
    unmasked_end = tl.minimum(unmasked_end, end // TILE * TILE)
    table_ptr = block_table_ptr + slot.to(tl.int64) * table_stride
    cache_offset = kv_head * HEAD_DIM + dims
    maximum = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    acc, maximum, total = _attend(
        acc,
        maximum,
        total,
        query,
        0,
        unmasked_end,
        last,
        kv_len,
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
        kv_len,
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
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def paged_prefill_attention(
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
    least_decode_rows: int = 0,
) -> torch.Tensor:
    """Attends the query tokens of the rows after the decode rows causally to their caches, which hold the step's own
    tokens too.

    FlashAttention-2 (Dao 2023): one pass over the keys with a running maximum and sum. The heads of a key/value
    head's group are packed beside the query tokens in one tile, so that a key tile is read once for all of them.
    The launch depends on the shapes alone.
    Flops: 4 * Hq * D for each (query, visible key) pair; moves 2 * Hq * D elements a query token, and
    2 * Hkv * D a cached token for every BLOCK_M / (Hq / Hkv) query tokens, mostly from the L2.

    Args:
        query: [tokens, Hq, D], all tokens of the step; the heads of a token are contiguous, tokens may be strided.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous; block_size a power of two >= 16.
        block_table: [slots + 1, max_blocks] int32.
        row_slots: [rows] int32.
        query_start: [rows + 1] int32.
        kv_lens: [rows] int32, cached tokens of each row, the step's own included; 0 for padding rows.
        decode_rows: [1] int32, the rows before the first to attend; they have one query token each.
        scale: factor of the scores, usually D ** -0.5.
        out: [tokens, Hq, D], contiguous; written from that row on, zero for padding tokens.
        least_decode_rows: what the host knows of `decode_rows`: the more, the fewer programs.

    Returns:
        `out`.
    """
    tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    rows = row_slots.shape[0]
    prefill_tokens, prefill_rows = tokens - least_decode_rows, rows - least_decode_rows
    capability, processors = capability_and_processors(query.device)
    group = num_heads // num_kv_heads
    large = prefill_config(capability, head_dim, query.dtype.itemsize, small=False)
    small = 2 * cdiv(prefill_tokens * group, large.block_m) * num_kv_heads <= processors
    config = prefill_config(capability, head_dim, query.dtype.itemsize, small=True) if small else large
    constants = prefill_constants(num_heads, num_kv_heads, head_dim, block_size, config, query.dtype)
    tiles = prefill_tokens // (int(constants["BLOCK_M"]) // group) + prefill_rows + 1
    _prefill_kernel[(num_kv_heads, tiles)](
        query,
        key_cache,
        value_cache,
        block_table,
        row_slots,
        query_start,
        kv_lens,
        decode_rows,
        out,
        query.stride(0),
        key_cache.stride(1),
        block_table.stride(0),
        scale * math.log2(math.e),
        rows,
        tokens,
        (prefill_rows + 1).bit_length(),
        **constants,
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
        "NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "DIM": next_power_of_2(head_dim), "GROUP": group,
        "BLOCK_SIZE": block_size, "BLOCK_M": max(config.block_m, next_power_of_2(group)), "TILE": config.tile,
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
