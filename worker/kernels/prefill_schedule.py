"""Shares a step's prefill attention out among programs, on the device, for every layer's prefill attention.

Query tokens are cut into tiles. Many tiles are handed out whole, neighbours together, which read the same keys. Of few
the visible caches, one after another, are one stretch of work, of which every program takes an equal part (Stream-K,
Osama et al. 2023): so a short chunk after a long prefix keeps all SMs busy. A kernel that cannot combine parts of tiles
gets them whole. A captured step follows the lengths that it finds. Knows rows and lengths, nothing of attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.kernels._gluon import HAS_GLUON
from worker.kernels._triton import capability_and_processors, cdiv, constant, next_power_of_2, tl, triton

# int32 fields of a tile: where its work begins and ends in the stretch, slot, first query token, end of the row's
# tokens, cached position of token 0, end of the cache it sees.
TILE_FIELDS = 7
# int32 fields of a share of the work: its first tile, and where its work begins and ends.
SHARE_FIELDS = 3
# What is handed out: the size of equal shares (shares that are tiles: larger than all), how many there are, and two
# counters, which every launch of attention leaves zero: shares taken beyond the first of each program, programs done.
PLAN_FIELDS = 4
_WHOLE_TILES = constant(1 << 30)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the prefill kernel is compiled for one device."""

    block_m: int  # query tokens times heads of a group that a program handles together
    tile: int  # cached tokens a loop iteration
    num_warps: int
    num_stages: int
    programs_per_sm: int  # programs that fit an SM together, all of which are launched
    maxnreg: int | None = None  # registers a thread, where a second program on the SM is worth a few spills
    whole_tiles: bool = False  # tiles are never shared, and attention_prefill_hopper.py attends them

    def tokens(self, group: int) -> int:
        """Query tokens of a tile, where `group` query heads share a key/value head."""
        return max(self.block_m, next_power_of_2(group)) // group


# Cached tokens that an equal share has at least: below that, a part more costs more than it saves.
_MIN_SHARE = 256
# What sharing tiles costs a program, and what a second part of a tile does, in cached tokens.
_SHARING_COST = 1024
_PART_COST = 384


def prefill_config(capability: tuple[int, int], head_dim: int, element_size: int, small: bool) -> PrefillConfig:
    """The configuration for a device of `capability`, within its shared memory (99 KiB on sm_89 and sm_120).

    `small` is for steps of few query tokens, where more programs matter more than how often keys are read.
    """
    if next_power_of_2(head_dim) * element_size > 256:  # fp32, which is for checking: correct everywhere, not tuned
        return PrefillConfig(block_m=16 if small else 32, tile=32, num_warps=4, num_stages=1, programs_per_sm=1)
    if capability[0] == 9:
        if small:
            return PrefillConfig(block_m=64, tile=64, num_warps=4, num_stages=3, programs_per_sm=2)
        # Held to 128 registers, two programs share an SM: one's softmax runs beside the other's products.
        return PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=3, programs_per_sm=2, maxnreg=128)
    if small:
        return PrefillConfig(block_m=32, tile=64, num_warps=4, num_stages=2, programs_per_sm=1)
    if capability == (8, 0):
        return PrefillConfig(block_m=128, tile=64, num_warps=8, num_stages=2, programs_per_sm=1)
    return PrefillConfig(block_m=128, tile=32, num_warps=8, num_stages=2, programs_per_sm=1)


def hopper_config(capability: tuple[int, int], group: int, head_dim: int, element_size: int) -> PrefillConfig | None:
    """The configuration of attention_prefill_hopper.py, or None where it cannot run.

    It is written for head dimension 128 and 16-bit elements, and a TMA box needs a power of two of query heads.
    """
    if capability != (9, 0) or not HAS_GLUON or head_dim != 128 or element_size != 2 or 16 % group != 0:
        return None
    return PrefillConfig(block_m=128, tile=128, num_warps=4, num_stages=2, programs_per_sm=1, whole_tiles=True)


def _most_small_tokens(processors: int, num_kv_heads: int, tokens: int) -> int:
    """Query tokens up to which tiles of `tokens` of them would leave half of the processors without a tile."""
    return processors // (2 * num_kv_heads) * tokens


@dataclass(frozen=True, slots=True)
class PrefillWorkspace:
    """Device memory that sharing out and combining need; one serves all layers, which run one after another."""

    small: PrefillConfig  # for steps whose tokens make few tiles
    large: PrefillConfig
    hopper: PrefillConfig | None  # for steps of enough tokens that no tile need be shared
    processors: int
    group: int
    num_kv_heads: int
    most_places: int
    tiles: torch.Tensor  # [most_places, TILE_FIELDS] int32
    shares: torch.Tensor  # [most_places or most programs, SHARE_FIELDS] int32
    plan: torch.Tensor  # [PLAN_FIELDS] int32
    arrived: torch.Tensor  # [most programs, num_kv_heads] int32, parts done of a tile; every launch leaves it zero
    partial_out: torch.Tensor  # [most programs, 2, num_kv_heads, block_m * head_dim, padded] fp32
    partial_lse: torch.Tensor  # [most programs, 2, num_kv_heads, block_m] fp32, log2 of the sum of exponentials

    def launch(self, most_tokens: int, least_tokens: int) -> tuple[PrefillConfig, int]:
        """The configuration for a step of so many query tokens, as far as the host knows, and how many programs a
        key/value head gets."""
        few = _most_small_tokens(self.processors, self.num_kv_heads, self.large.tokens(self.group))
        config = self.small if most_tokens <= few else self.large
        if self.hopper is not None and least_tokens > few:
            config = self.hopper
        return config, max(1, self.processors * config.programs_per_sm // self.num_kv_heads)

    @staticmethod
    def create(
        *,
        max_rows: int,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PrefillWorkspace:
        """Allocates the workspace for steps of at most `max_rows` rows and `max_tokens` tokens."""
        capability, processors = capability_and_processors(device)
        group = num_heads // num_kv_heads
        small, large = (prefill_config(capability, head_dim, dtype.itemsize, small) for small in (True, False))
        hopper = hopper_config(capability, group, head_dim, dtype.itemsize)
        assert hopper is None or hopper.tokens(group) == large.tokens(group)
        programs = max(1, processors * max(small.programs_per_sm, large.programs_per_sm) // num_kv_heads)
        block_m = max(small.block_m, large.block_m, next_power_of_2(group))
        few = min(max_tokens, _most_small_tokens(processors, num_kv_heads, large.tokens(group)))
        most_tiles = max(cdiv(max_tokens, large.tokens(group)), cdiv(few, small.tokens(group)))
        most_places = most_tiles + max_rows + 1
        return PrefillWorkspace(
            small=small,
            large=large,
            hopper=hopper,
            processors=processors,
            group=group,
            num_kv_heads=num_kv_heads,
            most_places=most_places,
            tiles=torch.zeros((most_places, TILE_FIELDS), dtype=torch.int32, device=device),
            shares=torch.zeros((max(most_places, programs), SHARE_FIELDS), dtype=torch.int32, device=device),
            plan=torch.zeros(PLAN_FIELDS, dtype=torch.int32, device=device),
            arrived=torch.zeros((programs, num_kv_heads), dtype=torch.int32, device=device),
            partial_out=torch.empty(
                (programs, 2, num_kv_heads, block_m * next_power_of_2(head_dim)), dtype=torch.float32, device=device
            ),
            partial_lse=torch.empty((programs, 2, num_kv_heads, block_m), dtype=torch.float32, device=device),
        )


@triton.jit(
    do_not_specialize=["rows", "tokens", "search_steps"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_ptr", "kv_lens_ptr", "decode_rows_ptr"],
)
def _schedule_kernel(
    row_slots_ptr,
    query_start_ptr,
    kv_lens_ptr,
    decode_rows_ptr,
    tiles_ptr,
    shares_ptr,
    plan_ptr,
    rows,
    tokens,
    search_steps,
    PROGRAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    SHARING_COST: tl.constexpr,
    PART_COST: tl.constexpr,
    PLACES: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    SHARE_FIELDS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
):
    program = tl.program_id(0)
    # Row r's tiles begin at place query_start[r] // TOKENS + r, which leaves it at least the places it needs whatever
    # the rows' lengths are. The padding tokens are one more row, `rows`, whose tiles see nothing and write zeros.
    place = tl.arange(0, PLACES)
    first_row = tl.load(decode_rows_ptr)
    offset = tl.load(query_start_ptr + first_row)
    low = tl.zeros((PLACES,), dtype=tl.int32) + first_row
    high = tl.zeros((PLACES,), dtype=tl.int32) + rows + 1
    for _ in range(search_steps):
        middle = (low + high) // 2
        begins = (tl.load(query_start_ptr + middle) - offset) // TOKENS + middle - first_row <= place
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    row = low
    is_row = row < rows
    start = tl.load(query_start_ptr + row)
    stop = tl.where(is_row, tl.load(query_start_ptr + row + 1, mask=is_row, other=0), tokens)
    kv_len = tl.load(kv_lens_ptr + row, mask=is_row, other=0)
    # The last tiles of a row, which see the most, come first: what is started last should not be what takes longest.
    index = (stop - start + TOKENS - 1) // TOKENS - 1 - (place - (start - offset) // TOKENS - (row - first_row))
    is_tile = index >= 0
    first = start + index * TOKENS
    shift = kv_len - stop  # a token's position in its cache, less its place in the step
    end = tl.maximum(tl.minimum(first + TOKENS + shift, kv_len), 0)
    work = tl.where(is_tile, tl.maximum((end + TILE - 1) // TILE, 1) * TILE, 0)
    begin = tl.cumsum(work, axis=0) - work
    total = tl.sum(work, axis=0)

    # Whole tiles run in waves, of which smaller ones fill the gaps; equal shares end together, but neighbours in time
    # then read different keys.
    even = (total + PROGRAMS - 1) // PROGRAMS
    largest = tl.max(work, axis=0)
    waves = (tl.sum((2 * work > largest).to(tl.int32), axis=0) + PROGRAMS - 1) // PROGRAMS
    whole = (tl.maximum(largest * waves, even) <= even + even // 8 + SHARING_COST) | WHOLE_TILES
    share = tl.maximum((even + TILE - 1) // TILE * TILE, MIN_SHARE)
    # Tiles of about one size are cut into equal parts, if that leaves few programs idle: each then has a single part.
    tiles = tl.sum(is_tile.to(tl.int32), axis=0)
    parts = tl.maximum(PROGRAMS // tl.maximum(tiles, 1), 1)
    part = tl.maximum(((largest + parts - 1) // parts + TILE - 1) // TILE * TILE, MIN_SHARE)
    if (not whole) & (tiles <= PROGRAMS) & (part <= share + PART_COST):
        share = part
        work = tl.where(is_tile, (work + part - 1) // part * part, 0)
        begin = tl.cumsum(work, axis=0) - work
        total = tl.sum(work, axis=0)
    number = tl.cumsum(is_tile.to(tl.int32), axis=0) - 1
    if not whole:
        mine = program * share
        share_ptrs = shares_ptr + program * SHARE_FIELDS
        tl.store(share_ptrs, tl.sum((is_tile & (begin <= mine)).to(tl.int32), axis=0) - 1)
        tl.store(share_ptrs + 1, mine)
        tl.store(share_ptrs + 2, tl.minimum(mine + share, total))
    if program == 0:
        if whole:
            share = _WHOLE_TILES
            share_ptrs = shares_ptr + number * SHARE_FIELDS
            tl.store(share_ptrs, number, mask=is_tile)
            tl.store(share_ptrs + 1, begin, mask=is_tile)
            tl.store(share_ptrs + 2, begin + work, mask=is_tile)
        tl.store(plan_ptr, share)
        tl.store(plan_ptr + 1, tl.where(whole, tiles, (total + share - 1) // share))
        tile_ptrs = tiles_ptr + number * TILE_FIELDS
        tl.store(tile_ptrs, begin, mask=is_tile)
        tl.store(tile_ptrs + 1, begin + work, mask=is_tile)
        tl.store(tile_ptrs + 2, tl.load(row_slots_ptr + row, mask=is_row, other=0), mask=is_tile)
        tl.store(tile_ptrs + 3, first, mask=is_tile)
        tl.store(tile_ptrs + 4, stop, mask=is_tile)
        tl.store(tile_ptrs + 5, shift, mask=is_tile)
        tl.store(tile_ptrs + 6, end, mask=is_tile)


def schedule_prefill(
    row_slots: torch.Tensor,
    query_start: torch.Tensor,
    kv_lens: torch.Tensor,
    decode_rows: torch.Tensor,
    tokens: int,
    least_decode_rows: int,
    most_decode_rows: int,
    workspace: PrefillWorkspace,
) -> None:
    """Shares out the rows after the decode rows, once a step, for every layer's `paged_prefill_attention`.

    Each program computes the whole schedule from the lengths and writes its own share; the first writes the rest.

    Args:
        row_slots: [rows] int32, slot of each row.
        query_start: [rows + 1] int32, first query token of each row.
        kv_lens: [rows] int32, cached tokens of each row, the step's own included; 0 for padding.
        decode_rows: [1] int32, the rows before the first to attend; they have one query token each.
        tokens: of the step, padding included.
        least_decode_rows, most_decode_rows: what the host knows of `decode_rows`.
        workspace: written.
    """
    rows = row_slots.shape[0]
    config, programs = workspace.launch(tokens - least_decode_rows, tokens - most_decode_rows)
    most_tiles = cdiv(tokens - least_decode_rows, config.tokens(workspace.group))
    assert most_tiles + rows - least_decode_rows + 1 <= workspace.most_places
    _schedule_kernel[(1 if config.whole_tiles else programs,)](
        row_slots,
        query_start,
        kv_lens,
        decode_rows,
        workspace.tiles,
        workspace.shares,
        workspace.plan,
        rows,
        tokens,
        (rows - least_decode_rows + 1).bit_length(),
        **prefill_schedule_constants(config, programs, workspace.group, workspace.most_places),
        num_warps=8,
    )


def prefill_schedule_constants(config: PrefillConfig, programs: int, group: int, most_places: int) -> dict[str, int]:
    """The compile-time constants of the scheduling kernel."""
    return {
        "PROGRAMS": programs, "TOKENS": config.tokens(group), "TILE": config.tile,
        "MIN_SHARE": max(_MIN_SHARE, config.tile), "SHARING_COST": _SHARING_COST, "PART_COST": _PART_COST,
        "PLACES": next_power_of_2(most_places), "TILE_FIELDS": TILE_FIELDS, "SHARE_FIELDS": SHARE_FIELDS,
        "WHOLE_TILES": config.whole_tiles,
    }  # fmt: skip
