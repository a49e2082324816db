"""Prefill attention of long steps on Hopper: as in attention_prefill.py, written in Gluon, Triton's lower level.

FlashAttention-3 (Shah et al. 2024): a program is persistent and its warps are specialised. A producer warp takes tiles
and brings queries, keys and values from their blocks to rings in shared memory (TMA). Two consumer warpgroups attend
half of a tile's rows each: while the tensor cores compute a group's next scores and add its last weighted values, it
computes the weights in between, and the groups take turns (ping-pong).

Tiles are never shared among programs, so this is for steps with enough of them; prefill_schedule.py decides which those
are. Tested on a GPU alone, against the same reference: Triton's interpreter does not know Gluon.
"""

from __future__ import annotations

import math

import torch

from worker.kernels._gluon import TensorDescriptor, gl, gluon, hopper, load_box, view_as
from worker.kernels._paged_tiles import bring_tile, clear_past_end, ring_place, tile_blocks
from worker.kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait
from worker.kernels.prefill_schedule import TILE_FIELDS, PrefillConfig, PrefillWorkspace

# Registers a thread of the consumers; the producer's warpgroup gets what is left of an SM's.
_REGISTERS = 232


@gluon.jit
def _produce(
    query_desc,
    key_desc,
    value_desc,
    block_table_ptr,
    tiles_ptr,
    plan_ptr,
    table_stride,
    num_slots,
    queries,
    keys,
    values,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    TILE_FIELDS: gl.constexpr,
):
    """The producer warp: takes tickets, and brings their queries, keys and values, the last keys first."""
    TOKENS: gl.constexpr = query_desc.block_shape[0]
    QUERY_BOX: gl.constexpr = query_desc.layout
    query_smem, tile_smem, query_full, query_empty = queries
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tickets = gl.load(plan_ptr + 1) * NUM_KV_HEADS
    ticket = gl.program_id(0)
    tile = 0
    i = 0
    while ticket < tickets:
        kv_head = ticket % NUM_KV_HEADS
        tile_ptr = tiles_ptr + ticket // NUM_KV_HEADS * TILE_FIELDS
        slot = gl.load(tile_ptr + 2)
        first = gl.load(tile_ptr + 3)
        seen = gl.load(tile_ptr + 6)
        table_ptr = block_table_ptr + slot.to(gl.int64) * table_stride
        place, parity = ring_place(tile, 2)
        hopper.mbarrier.wait(query_empty.index(place), parity ^ 1)
        tile_smem.index(5 * place).store(gl.full([1], kv_head, gl.int32, one))
        tile_smem.index(5 * place + 1).store(gl.full([1], first, gl.int32, one))
        tile_smem.index(5 * place + 2).store(gl.full([1], gl.load(tile_ptr + 4), gl.int32, one))
        tile_smem.index(5 * place + 3).store(gl.full([1], gl.load(tile_ptr + 5), gl.int32, one))
        tile_smem.index(5 * place + 4).store(gl.full([1], seen, gl.int32, one))
        hopper.mbarrier.expect(query_full.index(place), 2 * 2 * query_desc.block_type.nbytes)
        # A half's rows, the two halves of their dimensions one after another, then the other half's.
        parts = view_as(query_smem.index(place), [4, TOKENS, GROUP, 64], QUERY_BOX)
        for part in gl.static_range(4):
            token = first + part // 2 * TOKENS
            load_box(query_desc, [token, kv_head * GROUP, part % 2 * 64], query_full.index(place), parts.index(part))
        count = gl.maximum((seen + TILE - 1) // TILE, 1)
        for j in range(count):
            start = (count - 1 - j) * TILE
            blocks = tile_blocks(table_ptr, start, seen, BLOCK_SIZE, TILE)
            bring_tile(
                key_desc, value_desc, keys, values, i, blocks, start, seen, kv_head, num_slots, BLOCK_SIZE, TILE, STAGES
            )
            i += 1
        tile += 1
        ticket = gl.num_programs(0) + gl.atomic_add(plan_ptr + 2, 1, sem="relaxed", scope="gpu")
    place, parity = ring_place(tile, 2)
    hopper.mbarrier.wait(query_empty.index(place), parity ^ 1)
    tile_smem.index(5 * place).store(gl.full([1], -1, gl.int32, one))
    hopper.mbarrier.arrive(query_full.index(place), count=1)
    # The last program leaves the counters as the next launch needs them.
    if gl.atomic_add(plan_ptr + 3, 1, sem="relaxed", scope="gpu") == gl.num_programs(0) - 1:
        gl.store(plan_ptr + 2, 0)
        gl.store(plan_ptr + 3, 0)


@gluon.jit
def _field(smem, i):
    """A number that the producer has left for the consumers."""
    return gl.max(smem.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _pin_before_wait(total):
    """Keeps the weights that `total` sums before the wait that follows.

    For all that the assembler knows, a negative sum sleeps there. Without, it moves the exponentials behind the wait
    for the very products that they should run beside.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p nanosleep.u32 1; mov.b32 $0, $1; }",
        "=r,r",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _weigh(score, maximum, total, scale_log2):
    """The running softmax of one more tile of scores: weights, maximum, sum, and what earlier sums are scaled by."""
    new_maximum = gl.maximum(maximum, gl.max(score, 1) * scale_log2)
    rescale = gl.exp2(maximum - new_maximum)
    weight = gl.exp2(score * scale_log2 - gl.expand_dims(new_maximum, 1))
    return weight, new_maximum, total * rescale + gl.sum(weight, 1), rescale


@gluon.jit
def _fold(
    acc,
    weight,
    maximum,
    total,
    query,
    keys,
    values,
    turns,
    turn,
    i,
    position,
    last,
    scale_log2,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
    SCORE: gl.constexpr,
    ACC: gl.constexpr,
    WEIGHT: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Folds the `i`th tile of keys, and the values of the one before, into the running softmax."""
    key_smem, key_full, key_empty = keys
    value_smem, value_full, value_empty = values
    place, parity = ring_place(i, STAGES)
    value_place, value_parity = ring_place(i - 1, STAGES)
    hopper.mbarrier.wait(key_full.index(place), parity)
    hopper.mbarrier.wait(turns.index(HALF), turn & 1)
    score = gl.zeros([last.shape[0], position.shape[0]], gl.float32, SCORE)
    key = key_smem.index(place).permute((1, 0))
    score = hopper.warpgroup_mma(query, key, score, use_acc=False, is_async=True)
    hopper.mbarrier.wait(value_full.index(value_place), value_parity)
    acc = hopper.warpgroup_mma(weight, value_smem.index(value_place), acc, is_async=True)
    hopper.mbarrier.arrive(turns.index(1 - HALF), count=1)
    score = hopper.warpgroup_mma_wait(1, [score])
    hopper.mbarrier.arrive(key_empty.index(place), count=1)
    if MASKED:
        score = gl.where(gl.expand_dims(position, 0) <= gl.expand_dims(last, 1), score, -float("inf"))
    new_weight, maximum, total, rescale = _weigh(score, maximum, total, scale_log2)
    total = _pin_before_wait(total)
    acc = hopper.warpgroup_mma_wait(0, [acc])
    hopper.mbarrier.arrive(value_empty.index(value_place), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, ACC)), 1)
    return acc, gl.convert_layout(new_weight.to(weight.dtype), WEIGHT), maximum, total


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    out_ptr,
    queries,
    keys,
    values,
    turns,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: attends half of each tile's rows, as the producer brings them."""
    query_smem, tile_smem, query_full, query_empty = queries
    key_smem, key_full, key_empty = keys
    value_smem, value_full, value_empty = values
    DTYPE: gl.constexpr = key_smem.dtype
    MATRIX: gl.constexpr = key_smem.layout
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORE)) + HALF * ROWS
    offset = gl.arange(0, TILE, gl.SliceLayout(0, SCORE))
    tile = 0
    i = 0
    turn = 0
    if HALF == 1:
        hopper.mbarrier.arrive(turns.index(0), count=1)
    hopper.mbarrier.wait(query_full.index(0), 0)
    kv_head = _field(tile_smem, 0)
    while kv_head >= 0:
        query_place = tile % 2
        first = _field(tile_smem, 5 * query_place + 1)
        stop = _field(tile_smem, 5 * query_place + 2)
        shift = _field(tile_smem, 5 * query_place + 3)
        seen = _field(tile_smem, 5 * query_place + 4)
        query = view_as(query_smem.index(query_place), [2, ROWS, 128], MATRIX).index(HALF)
        last = gl.minimum(first + row // GROUP + shift, seen - 1)
        count = gl.maximum((seen + TILE - 1) // TILE, 1)
        # Tiles of cached tokens that every query sees need no mask. The last one always gets it.
        unmasked = gl.minimum(gl.maximum(first + shift + 1, 0) // TILE, count - 1)

        place, parity = ring_place(i, STAGES)
        start = (count - 1) * TILE
        hopper.mbarrier.wait(key_full.index(place), parity)
        score = gl.zeros([ROWS, TILE], gl.float32, SCORE)
        key = key_smem.index(place).permute((1, 0))
        score = hopper.warpgroup_mma(query, key, score, use_acc=False, is_async=True)
        score = hopper.warpgroup_mma_wait(0, [score])
        hopper.mbarrier.arrive(key_empty.index(place), count=1)
        score = gl.where(gl.expand_dims(start + offset, 0) <= gl.expand_dims(last, 1), score, -float("inf"))
        # Finite, as the last tile may have nothing that its first queries see.
        maximum = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORE))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORE))
        weight, maximum, total, _ = _weigh(score, maximum, total, scale_log2)
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHT)
        acc = gl.zeros([ROWS, 128], gl.float32, ACC)
        if seen % min(BLOCK_SIZE, TILE) != 0:
            # Both groups write the same.
            hopper.mbarrier.wait(value_full.index(place), parity)
            clear_past_end(value_smem, place, start, seen, BLOCK_SIZE, TILE)
        for _ in range(count - 1 - unmasked):
            i += 1
            start -= TILE
            acc, weight, maximum, total = _fold(
                acc, weight, maximum, total, query, keys, values, turns, turn, i, start + offset, last, scale_log2,
                HALF, STAGES, SCORE, ACC, WEIGHT, True,
            )  # fmt: skip
            turn += 1
        for _ in range(unmasked):
            i += 1
            acc, weight, maximum, total = _fold(
                acc, weight, maximum, total, query, keys, values, turns, turn, i, offset, last, scale_log2,
                HALF, STAGES, SCORE, ACC, WEIGHT, False,
            )  # fmt: skip
            turn += 1
        hopper.mbarrier.arrive(query_empty.index(query_place), count=1)
        place, parity = ring_place(i, STAGES)
        hopper.mbarrier.wait(value_full.index(place), parity)
        acc = hopper.warpgroup_mma(weight, value_smem.index(place), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        hopper.mbarrier.arrive(value_empty.index(place), count=1)
        i += 1

        factor = gl.convert_layout(1.0 / gl.where(total > 0.0, total, 1.0), gl.SliceLayout(1, ACC))
        out_row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC)) + HALF * ROWS
        token = first + out_row // GROUP
        head = kv_head * GROUP + out_row % GROUP
        dims = gl.arange(0, 128, gl.SliceLayout(0, ACC))
        out_row_ptr = out_ptr + token.to(gl.int64) * (NUM_HEADS * 128) + head * 128
        gl.store(
            gl.expand_dims(out_row_ptr, 1) + gl.expand_dims(dims, 0),
            (acc * gl.expand_dims(factor, 1)).to(DTYPE),
            mask=gl.expand_dims(token < stop, 1),
        )
        tile += 1
        query_place, query_parity = ring_place(tile, 2)
        hopper.mbarrier.wait(query_full.index(query_place), query_parity)
        kv_head = _field(tile_smem, 5 * query_place)


@gluon.jit
def _hopper_prefill_kernel(
    query_desc,
    key_desc,
    value_desc,
    block_table_ptr,
    tiles_ptr,
    plan_ptr,
    out_ptr,
    table_stride,
    num_slots,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    TILE_FIELDS: gl.constexpr,
    REGISTERS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    ROWS: gl.constexpr = BLOCK_M // 2
    DTYPE: gl.constexpr = key_desc.dtype
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    query_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, 128], MATRIX)
    key_smem = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, 128], MATRIX)
    value_smem = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, 128], MATRIX)
    # Of two tiles: key/value head (-1 for none), first query token, end of the row's tokens, cached position of token
    # 0, end of the cache it sees.
    tile_smem = gl.allocate_shared_memory(gl.int32, [2 * 5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    query_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for place in gl.static_range(2):
        hopper.mbarrier.init(query_full.index(place), count=1)
        hopper.mbarrier.init(query_empty.index(place), count=2)
        hopper.mbarrier.init(turns.index(place), count=1)
    for place in gl.static_range(STAGES):
        hopper.mbarrier.init(key_full.index(place), count=1)
        hopper.mbarrier.init(key_empty.index(place), count=2)
        hopper.mbarrier.init(value_full.index(place), count=1)
        hopper.mbarrier.init(value_empty.index(place), count=2)
    hopper.fence_async_shared()
    if DEPENDENT:
        gdc_wait()
    queries = (query_smem, tile_smem, query_full, query_empty)
    keys = (key_smem, key_full, key_empty)
    values = (value_smem, value_full, value_empty)
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), out_ptr, queries, keys, values, turns, scale_log2,
                NUM_HEADS, GROUP, BLOCK_SIZE, ROWS, TILE, STAGES,
            )),
            (_consume, (
                gl.constexpr(1), out_ptr, queries, keys, values, turns, scale_log2,
                NUM_HEADS, GROUP, BLOCK_SIZE, ROWS, TILE, STAGES,
            )),
            (_produce, (
                query_desc, key_desc, value_desc, block_table_ptr, tiles_ptr, plan_ptr, table_stride, num_slots,
                queries, keys, values, NUM_KV_HEADS, GROUP, BLOCK_SIZE, TILE, STAGES, TILE_FIELDS,
            )),
        ],
        [4, 1],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


def hopper_prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    workspace: PrefillWorkspace,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """What `paged_prefill_attention` does, which calls it where `workspace` has handed whole tiles out to it.

    Moves 2 * Hkv * D elements a cached token for every BLOCK_M / (Hq / Hkv) query tokens, mostly from the L2, and
    needs 193 KiB of shared memory, so one program runs on each multiprocessor.

    Args:
        query: [tokens, Hq, D], D = 128, bf16 or fp16; the heads of a token are contiguous, tokens may be strided.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D], contiguous.
        block_table: [slots + 1, max_blocks] int32.
        workspace: as `schedule_prefill` left it.
        scale: factor of the scores.
        out: [tokens, Hq, D], contiguous; written from the first prefill row on, zero for padding tokens.

    Returns:
        `out`.
    """
    config = workspace.hopper
    assert config is not None
    num_heads, head_dim = query.shape[1:]
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    group = num_heads // num_kv_heads
    box = [min(block_size, config.tile), head_dim // 2]
    matrix = gl.NVMMASharedLayout(128, 16, 2)
    keys, values = (
        TensorDescriptor.from_tensor(cache.view(num_blocks * block_size, num_kv_heads * head_dim), box, matrix)
        for cache in (key_cache, value_cache)
    )
    half_tile = [config.block_m // 2 // group, group, head_dim // 2]
    queries = TensorDescriptor.from_tensor(query, half_tile, gl.NVMMASharedLayout(128, 16, 3))
    _hopper_prefill_kernel[(workspace.processors,)](
        queries,
        keys,
        values,
        block_table,
        workspace.tiles,
        workspace.plan,
        out,
        block_table.stride(0),
        num_blocks * block_size,
        scale * math.log2(math.e),
        **hopper_prefill_constants(num_heads, num_kv_heads, block_size, config),
        num_warps=config.num_warps,
        **dependent_launch(query.device),
    )
    return out


def hopper_prefill_constants(
    num_heads: int, num_kv_heads: int, block_size: int, config: PrefillConfig
) -> dict[str, int]:
    """The compile-time constants of the kernel."""
    return {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size, "BLOCK_M": config.block_m,
        "TILE": config.tile, "STAGES": config.num_stages, "TILE_FIELDS": TILE_FIELDS, "REGISTERS": _REGISTERS,
    }  # fmt: skip
