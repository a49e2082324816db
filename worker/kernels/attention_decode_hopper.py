"""Decode attention of steps of decodes alone on Hopper: as the fused form in attention_decode.py, written in Gluon.

A program is persistent and its warps are specialised. A producer warp brings keys and values of one work item after
another from their blocks to a ring in shared memory (TMA), and begins before the product that queries come from is
done. A consumer warpgroup attends. Cached tokens are the tall side of its tensor-core products and queries the narrow
one, so that keys and values are read from shared memory as they lie, once, and no registers hold them.

Tested on a GPU alone, against the same reference: Triton's interpreter does not know Gluon.
"""

from __future__ import annotations

import math

import torch

from worker.kernels._gluon import TensorDescriptor, barrier, gl, gluon, hopper
from worker.kernels._paged_tiles import bring_tile, clear_past_end, ring_place, tile_blocks
from worker.kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, next_power_of_2
from worker.kernels.decode_schedule import ITEM_FIELDS, DecodeConfig, DecodeWorkspace
from worker.kernels.qk_norm_rope import QueryKeyTransform

# Registers a thread: of the producer, and on average of the kernel. A program takes half of a multiprocessor's, so that
# another fits beside it, or one of the kernel after it.
_PRODUCER_REGISTERS = 56
MAX_REGISTERS = 128
_COMBINE = 32  # partial results, times heads, that the combining program loads together


@gluon.jit
def _work(wave, works):
    """The program's `wave`th piece of work. The longest come first, so every second wave is dealt out backwards, that
    programs have about as much each. So is the last, which not all have a part in: one very long row is cut into the
    longest pieces of all, and who has one of those in the first wave gets none in the last."""
    programs = gl.num_programs(0)
    is_backwards = (wave % 2 == 1) | ((wave > 0) & ((wave + 1) * programs >= works))
    return wave * programs + gl.where(is_backwards, programs - 1 - gl.program_id(0), gl.program_id(0))


@gluon.jit
def _item_range(items_ptr, work, works, table_stride, NUM_KV_HEADS: gl.constexpr, ITEM: gl.constexpr):
    """The cached tokens of a piece of work, start and end, and where its row of the block table begins. The new token
    is not among them: its key and value come from the product. Of another piece, if there is no such one."""
    item_ptr = items_ptr + gl.where(work < works, work, 0) // NUM_KV_HEADS * ITEM
    end = gl.minimum(gl.load(item_ptr + 2), gl.load(item_ptr + 6) - 1)
    return gl.load(item_ptr + 1), end, gl.load(item_ptr).to(gl.int64) * table_stride


@gluon.jit
def _produce(
    key_desc,
    value_desc,
    block_table_ptr,
    items_ptr,
    num_items_ptr,
    table_stride,
    num_slots,
    keys,
    values,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    ITEM: gl.constexpr,
):
    """The producer warp: brings the keys and values of the program's items."""
    works = gl.load(num_items_ptr) * NUM_KV_HEADS
    wave = 0
    i = 0
    work = _work(0, works)
    start, end, table = _item_range(items_ptr, work, works, table_stride, NUM_KV_HEADS, ITEM)
    blocks = tile_blocks(block_table_ptr + table, start, end, BLOCK_SIZE, TILE)
    while work < works:
        kv_head = work % NUM_KV_HEADS
        wave += 1
        work = _work(wave, works)
        next_start, next_end, next_table = _item_range(items_ptr, work, works, table_stride, NUM_KV_HEADS, ITEM)
        for tile_start in range(start, end, TILE):
            # Block numbers are looked up a tile ahead, be it the next item's.
            is_last = tile_start + TILE >= end
            then_table = block_table_ptr + gl.where(is_last, next_table, table)
            then_start = gl.where(is_last, next_start, tile_start + TILE)
            next_blocks = tile_blocks(then_table, then_start, gl.where(is_last, next_end, end), BLOCK_SIZE, TILE)
            bring_tile(
                key_desc, value_desc, keys, values, i, blocks, tile_start, end, kv_head, num_slots,
                BLOCK_SIZE, TILE, STAGES,
            )  # fmt: skip
            i += 1
            blocks = next_blocks
        if start >= end:
            blocks = tile_blocks(block_table_ptr + next_table, next_start, next_end, BLOCK_SIZE, TILE)
        start, end, table = next_start, next_end, next_table


@gluon.jit
def _load_item(items_ptr, work, works, NUM_KV_HEADS: gl.constexpr, ITEM: gl.constexpr):
    """The fields of a piece of work's item; of another one, if there is no such work."""
    item_ptr = items_ptr + gl.where(work < works, work, 0) // NUM_KV_HEADS * ITEM
    fields = ()
    for field in gl.static_range(7):
        fields = fields + (gl.load(item_ptr + field),)  # type: ignore[assignment]  # noqa: RUF005
    return fields


@gluon.jit
def _load_product(
    qkv_ptr,
    cos_sin_ptr,
    block_table_ptr,
    item,
    work,
    qkv_stride,
    table_stride,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEADS: gl.constexpr,
    SCORE: gl.constexpr,
):
    """What the product says of an item: its queries [COLUMNS, 128] and the new token's key [1, 128], both also with
    their halves exchanged, as rotation pairs them; its value [128, 1], and what they are rotated by. And the new
    token's block."""
    slot, _, _, row, _, _, kv_len = item
    kv_head = work % NUM_KV_HEADS
    position = gl.maximum(kv_len - 1, 0)
    row_ptr = qkv_ptr + row.to(gl.int64) * qkv_stride
    dims = gl.arange(0, 128, gl.SliceLayout(0, HEADS))
    member = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(1, HEADS)), 1)
    out_dim = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, SCORE)), 1)
    here = gl.expand_dims(dims, 0)
    other = here ^ 64
    q_ptr = row_ptr + (kv_head * GROUP + member) * 128
    mask = (member < GROUP) & (here >= 0)
    q_x = gl.load(q_ptr + here, mask=mask, other=0.0)
    q_y = gl.load(q_ptr + other, mask=mask, other=0.0)
    k_ptr = row_ptr + (NUM_HEADS + kv_head) * 128
    k_x = gl.load(k_ptr + here)
    k_y = gl.load(k_ptr + other)
    value = gl.load(row_ptr + (NUM_HEADS + NUM_KV_HEADS + kv_head) * 128 + out_dim)
    angle_ptr = cos_sin_ptr + position.to(gl.int64) * 128 + dims % 64
    new_block = gl.load(block_table_ptr + slot.to(gl.int64) * table_stride + position // BLOCK_SIZE)
    return q_x, q_y, k_x, k_y, value, gl.load(angle_ptr), gl.load(angle_ptr + 64), new_block.to(gl.int64)


@gluon.jit
def _normalise(x, y, dims, gain, other_gain, cos, sin, eps, NORM: gl.constexpr):
    """[heads, 128]: RMSNorm by head and rotary embedding (rotate-half) of the heads `x`, rounded once."""
    wide, other = x.to(gl.float32), y.to(gl.float32)
    if NORM:
        scale = gl.expand_dims(gl.rsqrt(gl.sum(wide * wide, 1) / 128 + eps), 1)
        wide = wide * scale * gl.expand_dims(gain, 0)
        other = other * scale * gl.expand_dims(other_gain, 0)
    return (wide * gl.expand_dims(cos, 0) + gl.where(dims < 64, -other, other) * gl.expand_dims(sin, 0)).to(x.dtype)


@gluon.jit
def _weigh(score, valid, maximum, total, scale_log2):
    """The running softmax of one more tile of scores: weights, maxima, the sums' parts by token, and by what earlier
    sums were scaled."""
    score = gl.where(valid, score * scale_log2, -float("inf"))
    new_maximum = gl.maximum(maximum, gl.max(score, 0))
    rescale = gl.expand_dims(gl.exp2(maximum - new_maximum), 0)
    weight = gl.exp2(score - gl.expand_dims(new_maximum, 0))
    return weight, new_maximum, total * rescale + weight, rescale


@gluon.jit
def _combine(
    partial_out_ptr,
    partial_lse_ptr,
    out_row_ptr,
    first_item,
    items,
    kv_head,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_POW2: gl.constexpr,
    SPLITS_AT_ONCE: gl.constexpr,
):
    """Combines the partial results of a row's items for the query heads of one key/value head."""
    COMBINE_HEADS: gl.constexpr = 4 if GROUP_POW2 >= 4 else 1
    # Where there are heads for all warps, none need be summed across warps, which takes shared memory.
    PART: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [4 // COMBINE_HEADS, COMBINE_HEADS, 1], [2, 1, 0])
    LSE: gl.constexpr = gl.SliceLayout(2, PART)
    HEAD: gl.constexpr = gl.SliceLayout(0, LSE)
    OUT: gl.constexpr = gl.SliceLayout(0, PART)
    OUT_HEAD: gl.constexpr = gl.SliceLayout(1, OUT)
    splits = gl.arange(0, SPLITS_AT_ONCE, gl.SliceLayout(1, LSE))
    member = gl.arange(0, GROUP_POW2, HEAD)
    out_dims = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, OUT)), 0)
    dims = gl.expand_dims(out_dims, 0)
    in_group = member < GROUP
    head = kv_head * GROUP + member
    best = gl.full([GROUP_POW2], -1e30, gl.float32, HEAD)
    denominator = gl.zeros([GROUP_POW2], gl.float32, HEAD)
    combined = gl.zeros([GROUP_POW2, 128], gl.float32, OUT)
    for base in range(0, items, SPLITS_AT_ONCE):
        mask = gl.expand_dims(base + splits < items, 1) & gl.expand_dims(in_group, 0)
        at = gl.expand_dims((first_item + base + splits) * NUM_HEADS, 1) + gl.expand_dims(head, 0)
        lse = gl.load(partial_lse_ptr + at, mask=mask, other=-float("inf"), cache_modifier=".cg")
        part = gl.load(
            partial_out_ptr + gl.expand_dims(at.to(gl.int64) * 128, 2) + dims,
            mask=gl.expand_dims(mask, 2),
            other=0.0,
            cache_modifier=".cg",
        )
        new_best = gl.maximum(best, gl.max(lse, 0))
        share = gl.exp2(lse - gl.expand_dims(new_best, 0))
        rescale = gl.exp2(best - new_best)
        denominator = denominator * rescale + gl.sum(share, 0)
        rescale = gl.convert_layout(rescale, OUT_HEAD)
        combined = combined * gl.expand_dims(rescale, 1) + gl.sum(part * gl.expand_dims(share, 2), 0)
        best = new_best
    denominator = gl.convert_layout(gl.where(in_group, denominator, 1.0), OUT_HEAD)
    out_member = gl.expand_dims(gl.arange(0, GROUP_POW2, OUT_HEAD), 1)
    gl.store(
        out_row_ptr + (kv_head * GROUP + out_member) * 128 + out_dims,
        (combined / gl.expand_dims(denominator, 1)).to(out_row_ptr.dtype.element_ty),
        mask=out_member + out_dims * 0 < GROUP,
    )


@gluon.jit
def _consume(
    qkv_ptr,
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
    qkv_stride,
    table_stride,
    eps,
    scale_log2,
    query_smem,
    weight_smem,
    keys,
    values,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_POW2: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    ITEM: gl.constexpr,
    SPLITS_AT_ONCE: gl.constexpr,
    NORM: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The consumer warpgroup: attends the program's items as their keys and values come."""
    key_smem, key_full, key_empty = keys
    value_smem, value_full, value_empty = values
    DTYPE: gl.constexpr = key_smem.dtype
    # [tokens or dims, queries]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    QUERY: gl.constexpr = gl.SliceLayout(0, SCORE)
    HEADS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    CACHE_STRIDE: gl.constexpr = NUM_KV_HEADS * 128

    dims = gl.arange(0, 128, gl.SliceLayout(0, HEADS))
    head_dims = gl.expand_dims(dims, 0)
    offset = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, SCORE)), 1)
    out_dim = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, SCORE)), 1)
    column = gl.arange(0, COLUMNS, QUERY)
    out_column = gl.expand_dims(column, 0)
    in_out = (out_column < GROUP) & (out_dim >= 0)
    q_gain = gl.zeros([128], gl.float32, gl.SliceLayout(0, HEADS))
    q_other_gain = q_gain
    k_gain = q_gain
    k_other_gain = q_gain
    if NORM:
        q_gain = gl.load(q_weight_ptr + dims).to(gl.float32)
        q_other_gain = gl.load(q_weight_ptr + (dims ^ 64)).to(gl.float32)
        k_gain = gl.load(k_weight_ptr + dims).to(gl.float32)
        k_other_gain = gl.load(k_weight_ptr + (dims ^ 64)).to(gl.float32)
    queries = query_smem.permute((1, 0))
    weights = weight_smem.permute((1, 0))
    works = gl.load(num_items_ptr) * NUM_KV_HEADS
    wave = 0
    i = 0
    # What an item needs beside its keys and values is asked for while the one before it is attended: each wait here is
    # a memory latency, which short items feel.
    work = _work(0, works)
    next_work = _work(1, works)
    item = _load_item(items_ptr, work, works, NUM_KV_HEADS, ITEM)
    next_item = _load_item(items_ptr, next_work, works, NUM_KV_HEADS, ITEM)
    if DEPENDENT:
        gdc_wait()
    product = _load_product(
        qkv_ptr, cos_sin_ptr, block_table_ptr, item, work, qkv_stride, table_stride,
        NUM_HEADS, NUM_KV_HEADS, GROUP, COLUMNS, BLOCK_SIZE, HEADS, SCORE,
    )  # fmt: skip
    while work < works:
        kv_head = work % NUM_KV_HEADS
        _, start, item_end, row, first_item, items, kv_len = item
        # The row's last item starts its softmax with the new token's key and value, and writes them.
        position = gl.maximum(kv_len - 1, 0)
        owner = (item_end == kv_len) & (kv_len > 0)
        end = gl.minimum(item_end, position)
        q_x, q_y, k_x, k_y, new_value, cos, sin, new_block = product
        product = _load_product(
            qkv_ptr, cos_sin_ptr, block_table_ptr, next_item, next_work, qkv_stride, table_stride,
            NUM_HEADS, NUM_KV_HEADS, GROUP, COLUMNS, BLOCK_SIZE, HEADS, SCORE,
        )  # fmt: skip
        this_item = work // NUM_KV_HEADS
        wave += 1
        work = next_work
        next_work = _work(wave + 1, works)
        item = next_item
        next_item = _load_item(items_ptr, next_work, works, NUM_KV_HEADS, ITEM)
        query = _normalise(q_x, q_y, head_dims, q_gain, q_other_gain, cos, sin, eps, NORM)
        new_key = _normalise(k_x, k_y, head_dims, k_gain, k_other_gain, cos, sin, eps, NORM)
        new_score = gl.sum(query.to(gl.float32) * new_key.to(gl.float32), 1) * scale_log2
        query_smem.store(query)
        hopper.fence_async_shared()
        new_where = (new_block * BLOCK_SIZE + position % BLOCK_SIZE) * CACHE_STRIDE + kv_head * 128
        gl.store(key_cache_ptr + new_where + head_dims, new_key, mask=(head_dims >= 0) & owner)
        gl.store(value_cache_ptr + new_where + out_dim, new_value, mask=(out_dim >= 0) & owner)
        maximum = gl.where(owner, gl.convert_layout(new_score, QUERY), -1e30)
        total = gl.where((offset + out_column * 0 == 0) & owner, 1.0, 0.0)
        acc = gl.where(owner & (out_column >= 0), new_value.to(gl.float32), 0.0)

        if start < end:
            place, parity = ring_place(i, STAGES)
            hopper.mbarrier.wait(key_full.index(place), parity)
            score = gl.zeros([TILE, COLUMNS], gl.float32, SCORE)
            score = hopper.warpgroup_mma(key_smem.index(place), queries, score, use_acc=False, is_async=True)
            score = hopper.warpgroup_mma_wait(0, [score])
            hopper.mbarrier.arrive(key_empty.index(place), count=1)
            weight, maximum, total, rescale = _weigh(score, start + offset < end, maximum, total, scale_log2)
            acc = acc * rescale
            weights.store(weight.to(DTYPE))
            hopper.fence_async_shared()
            for tile_start in range(start + TILE, end, TILE):
                i += 1
                value_place, value_parity = place, parity
                place, parity = ring_place(i, STAGES)
                hopper.mbarrier.wait(key_full.index(place), parity)
                score = gl.zeros([TILE, COLUMNS], gl.float32, SCORE)
                score = hopper.warpgroup_mma(key_smem.index(place), queries, score, use_acc=False, is_async=True)
                hopper.mbarrier.wait(value_full.index(value_place), value_parity)
                value = value_smem.index(value_place).permute((1, 0))
                acc = hopper.warpgroup_mma(value, weights, acc, is_async=True)
                score, acc = hopper.warpgroup_mma_wait(0, [score, acc])
                hopper.mbarrier.arrive(key_empty.index(place), count=1)
                hopper.mbarrier.arrive(value_empty.index(value_place), count=1)
                weight, maximum, total, rescale = _weigh(score, tile_start + offset < end, maximum, total, scale_log2)
                acc = acc * rescale
                weights.store(weight.to(DTYPE))
                hopper.fence_async_shared()
            hopper.mbarrier.wait(value_full.index(place), parity)
            clear_past_end(value_smem, place, end - 1 - (end - 1 - start) % TILE, end, BLOCK_SIZE, TILE)
            value = value_smem.index(place).permute((1, 0))
            acc = hopper.warpgroup_mma(value, weights, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, [acc])
            hopper.mbarrier.arrive(value_empty.index(place), count=1)
            i += 1

        total_sum = gl.sum(total, 0)
        out = acc / gl.expand_dims(gl.where(total_sum > 0.0, total_sum, 1.0), 0)
        out_row_ptr = out_ptr + row.to(gl.int64) * (NUM_HEADS * 128)
        head_offset = (kv_head * GROUP + out_column) * 128 + out_dim
        if items == 1:
            gl.store(out_row_ptr + head_offset, out.to(DTYPE), mask=in_out)
        else:
            gl.store(partial_out_ptr + this_item.to(gl.int64) * (NUM_HEADS * 128) + head_offset, out, mask=in_out)
            lse_ptr = partial_lse_ptr + this_item * NUM_HEADS + kv_head * GROUP + column
            gl.store(lse_ptr, maximum + gl.log2(total_sum), mask=column < GROUP)
            # The program that finishes a row last combines it, as in attention_decode.py.
            barrier()
            count_ptr = arrived_ptr + row * NUM_KV_HEADS + kv_head
            arrived = gl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu")
            if arrived == items - 1:
                gl.store(count_ptr, 0)
                _combine(
                    partial_out_ptr, partial_lse_ptr, out_row_ptr, first_item, items, kv_head,
                    NUM_HEADS, GROUP, GROUP_POW2, SPLITS_AT_ONCE,
                )  # fmt: skip


@gluon.jit
def _hopper_decode_kernel(
    key_desc,
    value_desc,
    qkv_ptr,
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
    qkv_stride,
    table_stride,
    num_slots,
    eps,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_POW2: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    ITEM: gl.constexpr,
    SPLITS_AT_ONCE: gl.constexpr,
    NORM: gl.constexpr,
    REGISTERS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    DTYPE: gl.constexpr = key_desc.dtype
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    key_smem = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, 128], MATRIX)
    value_smem = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, 128], MATRIX)
    query_smem = gl.allocate_shared_memory(DTYPE, [COLUMNS, 128], MATRIX)
    weight_smem = gl.allocate_shared_memory(DTYPE, [COLUMNS, TILE], MATRIX)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for place in gl.static_range(STAGES):
        hopper.mbarrier.init(key_full.index(place), count=1)
        hopper.mbarrier.init(key_empty.index(place), count=1)
        hopper.mbarrier.init(value_full.index(place), count=1)
        hopper.mbarrier.init(value_empty.index(place), count=1)
    hopper.fence_async_shared()
    keys = (key_smem, key_full, key_empty)
    values = (value_smem, value_full, value_empty)
    gl.warp_specialize(
        [
            (_consume, (
                qkv_ptr, q_weight_ptr, k_weight_ptr, cos_sin_ptr, key_cache_ptr, value_cache_ptr, block_table_ptr,
                items_ptr, num_items_ptr, arrived_ptr, partial_out_ptr, partial_lse_ptr, out_ptr, qkv_stride,
                table_stride, eps, scale_log2, query_smem, weight_smem, keys, values, NUM_HEADS, NUM_KV_HEADS, GROUP,
                GROUP_POW2, COLUMNS, BLOCK_SIZE, TILE, STAGES, ITEM, SPLITS_AT_ONCE, NORM, DEPENDENT,
            )),
            (_produce, (
                key_desc, value_desc, block_table_ptr, items_ptr, num_items_ptr, table_stride, num_slots, keys, values,
                NUM_KV_HEADS, BLOCK_SIZE, TILE, STAGES, ITEM,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip


def hopper_decode_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    workspace: DecodeWorkspace,
    scale: float,
    out: torch.Tensor,
    transform: QueryKeyTransform,
) -> torch.Tensor:
    """What `paged_decode_attention` does with a `transform`, which calls it where `workspace` plans for it.

    Moves 2 * Hkv * D elements a cached token. Of up to 16 rows a program takes nearly all of a multiprocessor's shared
    memory, of more nearly half.

    Args:
        qkv: [rows, Hq + 2 Hkv, D], D = 128, bf16 or fp16: the product as it came; the heads of a row are contiguous,
            rows may be strided.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous; the new tokens' are written.
        block_table: [slots + 1, max_blocks] int32.
        workspace: as `schedule_decode` left it for as many rows of a fused step.
        scale: factor of the scores.
        out: [rows, Hq, D], contiguous, written; zero for rows without cached tokens.
        transform: of queries and keys.

    Returns:
        `out`.
    """
    rows, num_heads, head_dim = out.shape
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    config, splits = workspace.plan(rows, fused=True)
    matrix = gl.NVMMASharedLayout(128, 16, 2)
    keys, values = (
        TensorDescriptor.from_tensor(
            cache.view(num_blocks * block_size, num_kv_heads * head_dim),
            [min(block_size, config.tile), head_dim // 2],
            matrix,
        )
        for cache in (key_cache, value_cache)
    )
    _hopper_decode_kernel[(min(workspace.processors * config.programs_per_sm, (rows + splits) * num_kv_heads),)](
        keys,
        values,
        qkv,
        transform.q_weight,
        transform.k_weight,
        transform.cos_sin,
        key_cache,
        value_cache,
        block_table,
        workspace.items,
        workspace.num_items,
        workspace.arrived,
        workspace.partial_out,
        workspace.partial_lse,
        out,
        qkv.stride(0),
        block_table.stride(0),
        num_blocks * block_size,
        transform.eps,
        scale * math.log2(math.e),
        **hopper_decode_constants(num_heads, num_kv_heads, block_size, config),
        NORM=transform.q_weight is not None,
        num_warps=config.num_warps,
        maxnreg=MAX_REGISTERS,
        **dependent_launch(qkv.device),
    )
    return out


def hopper_decode_constants(num_heads: int, num_kv_heads: int, block_size: int, config: DecodeConfig) -> dict[str, int]:
    """The compile-time constants of the kernel."""
    group = next_power_of_2(num_heads // num_kv_heads)
    return {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "GROUP_POW2": group, "COLUMNS": max(8, group),
        "BLOCK_SIZE": block_size, "TILE": config.tile, "STAGES": config.num_stages, "ITEM": ITEM_FIELDS,
        "SPLITS_AT_ONCE": max(1, _COMBINE // group), "REGISTERS": _PRODUCER_REGISTERS,
    }  # fmt: skip
