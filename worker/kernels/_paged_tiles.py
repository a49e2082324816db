"""Tiles of cached keys and values in shared memory, brought there by TMA: what the kernels for Hopper share.

A tile is `TILE` tokens of one key/value head, of 128 dimensions. Tiles lie in a ring, keys and values each, as
(shared memory [STAGES, TILE, 128], barriers "full" [STAGES, 1], barriers "empty" [STAGES, 1]).
"""

from __future__ import annotations

from worker.kernels._gluon import gl, gluon, hopper, load_box, view_as


@gluon.jit
def ring_place(i, STAGES: gl.constexpr):
    """Where the `i`th entry of a ring lies, and the parity of the barrier that says it has come."""
    return i % STAGES, i // STAGES & 1


@gluon.jit
def tile_blocks(table_ptr, start, end, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr):
    """The blocks that hold the tile from `start` on, of each copy's first token; past the end, the last token's."""
    BOX: gl.constexpr = min(BLOCK_SIZE, TILE)
    blocks = ()
    for box in gl.static_range(TILE // BOX):
        position = gl.maximum(gl.minimum(start + box * BOX, end - 1), 0)
        blocks = blocks + (gl.load(table_ptr + position // BLOCK_SIZE),)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@gluon.jit
def bring_tile(
    key_desc,
    value_desc,
    keys,
    values,
    i,
    blocks,
    start,
    end,
    kv_head,
    num_slots,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Begins to copy the tile from `start` on to the `i`th place of the rings, once that is free: from the cache as
    [num_slots, heads * 128], by boxes of tokens that lie one after another in their block."""
    BOX: gl.constexpr = min(BLOCK_SIZE, TILE)
    BOXES: gl.constexpr = TILE // BOX
    BOX_LAYOUT: gl.constexpr = key_desc.layout
    place, parity = ring_place(i, STAGES)
    for kind in gl.static_range(2):
        desc = key_desc if kind == 0 else value_desc
        smem, full, empty = keys if kind == 0 else values
        hopper.mbarrier.wait(empty.index(place), parity ^ 1)
        hopper.mbarrier.expect(full.index(place), 2 * BOXES * desc.block_type.nbytes)
        boxes = view_as(smem.index(place), [2 * BOXES, BOX, 64], BOX_LAYOUT)
        for box in gl.static_range(BOXES):
            position = start + box * BOX
            cache_slot = blocks[box] * BLOCK_SIZE + position % BLOCK_SIZE
            # Of blocks past the end nothing is read: the copy of a slot that is not there brings zeros.
            cache_slot = gl.where(position < end, cache_slot, num_slots)
            for half in gl.static_range(2):
                dim = kv_head * 128 + half * 64
                load_box(desc, [cache_slot, dim], full.index(place), boxes.index(half * BOXES + box))


@gluon.jit
def clear_past_end(values, place, start, end, BLOCK_SIZE: gl.constexpr, TILE: gl.constexpr):
    """Makes zeros of the values past `end` in the last block of the tile from `start` on, which has come.

    They may be another request's NaN, which no weight of 0 hides. The fence, and the barriers that Gluon puts before a
    product and before an arrival, order it before the products and before later copies.
    """
    BOX: gl.constexpr = min(BLOCK_SIZE, TILE)
    BOXES: gl.constexpr = TILE // BOX
    BOX_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    MATRIX: gl.constexpr = values.layout
    if end % BOX != 0:
        boxes = view_as(values.index(place), [2 * BOXES, BOX, 64], MATRIX)
        in_box = gl.expand_dims(gl.arange(0, BOX, gl.SliceLayout(1, BOX_LAYOUT)), 1) < end % BOX
        for half in gl.static_range(2):
            box = boxes.index(half * BOXES + (end - start) // BOX)
            box.store(gl.where(in_box, box.load(BOX_LAYOUT), 0.0))
        hopper.fence_async_shared()
