"""Cuts the caches of a step's decode rows into work items, on the device, for every layer's decode attention.

The items are of about equal size, so that one long row among short ones leaves no SM idle, and none depends on what the
host knows: a captured step follows the lengths it finds. Knows rows and lengths, nothing of attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.kernels._gluon import HAS_GLUON
from worker.kernels._triton import LARGE_SHARED_MEMORY, capability_and_processors, next_power_of_2, tl, triton

# int32 fields of a work item (32 bytes, one sector): slot, start, end, row; the row's first item, items, length.
ITEM_FIELDS = 8


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode attention is compiled for one device."""

    tile: int  # cached tokens a loop iteration
    num_warps: int
    num_stages: int
    programs_per_sm: int  # programs that fit an SM together, which the split aims to fill
    min_chunk: int  # cached tokens of the smallest item of a row that is split
    whole_row: int = 0  # cached tokens up to which a row is not split at all
    for_hopper: bool = False  # the kernel of attention_decode_hopper.py instead of attention_decode.py's


FEW_ROWS = 8
_FEW_ROWS_ON_HOPPER = 16
# Rows up to which the portable kernel does normalisation, rotation and the cache write, too. In larger steps what that
# costs in registers, and so in programs an SM, is more than the kernel it saves.
_MOST_FUSED_ROWS = 64


def decode_config(capability: tuple[int, int], head_dim: int, element_size: int, rows: int) -> DecodeConfig:
    """The configuration for `rows` rows on a device of `capability`, within its shared memory (99 KiB on sm_89 and
    sm_120).

    Few rows do not fill the device with programs, so that each program's own loads must: larger tiles, by more warps.
    """
    token_bytes = 2 * next_power_of_2(head_dim) * element_size  # a key and a value
    large = capability in LARGE_SHARED_MEMORY
    if large and rows <= FEW_ROWS and token_bytes <= 512:
        return DecodeConfig(tile=128, num_warps=4, num_stages=4, programs_per_sm=2, min_chunk=128)
    tile = 64 if token_bytes <= 512 else 32
    return DecodeConfig(
        tile=tile,
        num_warps=2,
        num_stages=4 if large else 3,
        programs_per_sm=4 if large else 2,
        min_chunk=128,
    )


def hopper_decode_config(
    capability: tuple[int, int], group: int, head_dim: int, element_size: int, rows: int
) -> DecodeConfig | None:
    """The configuration of the kernel for Hopper, or None where it cannot run.

    Few rows get all of an SM's shared memory for a program, so that all that it reads is under way at once; and to
    combine a split row takes longer than a program alone takes for some hundred tokens. Many have two programs an SM,
    one of which attends while the other begins or ends an item.
    """
    if not HAS_GLUON or capability != (9, 0) or (head_dim, element_size) != (128, 2) or group > 8:
        return None
    if rows <= _FEW_ROWS_ON_HOPPER:
        return DecodeConfig(
            tile=128, num_warps=4, num_stages=3, programs_per_sm=1, min_chunk=128,
            whole_row=384 if rows <= 2 else 512, for_hopper=True,
        )  # fmt: skip
    return DecodeConfig(tile=64, num_warps=4, num_stages=3, programs_per_sm=2, min_chunk=128, for_hopper=True)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Device memory that scheduling and splitting need; one serves all layers, which run one after another."""

    capability: tuple[int, int]
    processors: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int
    max_rows: int
    items: torch.Tensor  # [max_rows + most splits, ITEM_FIELDS] int32
    num_items: torch.Tensor  # [1] int32
    arrived: torch.Tensor  # [max_rows, num_kv_heads] int32, items done of a row; every launch leaves it zero
    partial_out: torch.Tensor  # [max_rows + most splits, num_heads, head_dim] fp32
    partial_lse: torch.Tensor  # [max_rows + most splits, num_heads] fp32, log2 of the sum of exponentials

    @property
    def most_fused_rows(self) -> int:
        """Rows of a step of decodes alone up to which one kernel that also makes queries, keys and values of the
        product is the faster way."""
        return self.max_rows if self.plan(self.max_rows, fused=True)[0].for_hopper else _MOST_FUSED_ROWS

    def plan(self, rows: int, fused: bool = False) -> tuple[DecodeConfig, int]:
        """The configuration for a step of `rows` decode rows, and how many splits make one wave: the step has at most
        rows + splits work items. `fused`: attention also makes queries, keys and values of the product."""
        config = None
        if fused:
            group = self.num_heads // self.num_kv_heads
            config = hopper_decode_config(self.capability, group, self.head_dim, self.element_size, rows)
        if config is None:
            config = decode_config(self.capability, self.head_dim, self.element_size, rows)
        return config, _splits(self.processors, self.num_kv_heads, config)

    @staticmethod
    def create(
        *,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodeWorkspace:
        """Allocates the workspace for steps of at most `max_rows` decode rows."""
        capability, processors = capability_and_processors(device)
        shape = capability, head_dim, dtype.itemsize
        configs = [decode_config(*shape, rows) for rows in (1, FEW_ROWS + 1)]
        # That of Hopper has fewer items, and portable attention can take them: its tiles are no larger.
        hopper = [
            hopper_decode_config(capability, num_heads // num_kv_heads, *shape[1:], rows) for rows in (1, max_rows)
        ]
        most_items = max_rows + max(_splits(processors, num_kv_heads, config) for config in configs)
        assert all(config is None or config.programs_per_sm <= configs[0].programs_per_sm for config in hopper)
        return DecodeWorkspace(
            capability=capability,
            processors=processors,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            element_size=dtype.itemsize,
            max_rows=max_rows,
            items=torch.zeros((most_items, ITEM_FIELDS), dtype=torch.int32, device=device),
            num_items=torch.zeros(1, dtype=torch.int32, device=device),
            arrived=torch.zeros((max_rows, num_kv_heads), dtype=torch.int32, device=device),
            partial_out=torch.empty((most_items, num_heads, head_dim), dtype=torch.float32, device=device),
            partial_lse=torch.empty((most_items, num_heads), dtype=torch.float32, device=device),
        )


def _splits(processors: int, num_kv_heads: int, config: DecodeConfig) -> int:
    """Programs of one head that run side by side."""
    return max(1, int(processors / num_kv_heads * config.programs_per_sm))


@triton.jit
def _cut_rows(lens, in_rows, chunk, TILE: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """Items of each row, and their size, if no item is larger than `chunk`, or than WHOLE_ROW, which is not split.

    A row's items are made equal; a row without tokens keeps one item, which writes its zeros.
    """
    count = tl.where(lens <= WHOLE_ROW, 1, tl.maximum((lens + chunk - 1) // chunk, 1))
    share = ((lens + count - 1) // count + TILE - 1) // TILE * TILE
    return tl.where(in_rows, tl.maximum((lens + share - 1) // tl.maximum(share, 1), 1), 0), share


@triton.jit(
    do_not_specialize=["splits"],
    do_not_specialize_on_alignment=["row_slots_ptr", "kv_lens_ptr", "decode_rows_ptr"],
)
def _schedule_kernel(
    row_slots_ptr,
    kv_lens_ptr,
    decode_rows_ptr,
    items_ptr,
    num_items_ptr,
    splits,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    rows = tl.load(decode_rows_ptr)
    offsets = tl.arange(0, ROWS)
    in_rows = offsets < rows
    lens = tl.load(kv_lens_ptr + offsets, mask=in_rows, other=0)
    # Equal shares for all programs that run side by side, or more: rows that are cut in equal parts may fill one wave
    # of programs and little of a second, which then takes as long as the first. Of some larger shares, the one that
    # is estimated to end first is taken. None is smaller than the first, so that ceil(len / chunk), summed over rows,
    # is at most splits + rows, which bounds the launch whatever the lengths are.
    even = (tl.sum(lens, axis=0) + splits - 1) // splits
    chunk = tl.maximum((even + TILE - 1) // TILE * TILE, MIN_CHUNK)
    best = 2147483647
    for quarters in tl.static_range(4, 9):
        larger = tl.maximum((even * quarters // 4 + TILE - 1) // TILE * TILE, MIN_CHUNK)
        count, share = _cut_rows(lens, in_rows, larger, TILE, WHOLE_ROW)
        largest = tl.max(tl.where(lens > 0, share, 0), axis=0)
        # Items of about the largest size run in whole waves; smaller ones fill the gaps.
        waves = (tl.sum(tl.where(2 * share > largest, count, 0), axis=0) + splits - 1) // splits
        end = tl.maximum(largest * waves, even)
        chunk = tl.where(end < best, larger, chunk)
        best = tl.minimum(best, end)
    count, share = _cut_rows(lens, in_rows, chunk, TILE, WHOLE_ROW)
    mine = offsets == row
    items = tl.sum(tl.where(mine, count, 0), axis=0)
    length = tl.sum(tl.where(mine, lens, 0), axis=0)
    step = tl.sum(tl.where(mine, share, 0), axis=0)
    # Rows with the largest items first (Graham's longest processing time rule): what runs last is then short.
    before = (share > step) | ((share == step) & (offsets < row))
    first = tl.sum(tl.where(before, count, 0), axis=0)
    if row == 0:
        tl.store(num_items_ptr, tl.sum(count, axis=0))
    slot = tl.load(row_slots_ptr + row)
    zero = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(0, items, BLOCK):
        split = base + tl.arange(0, BLOCK)
        mask = split < items
        item_ptr = items_ptr + (first + split) * ITEM
        tl.store(item_ptr, zero + slot, mask=mask)
        tl.store(item_ptr + 1, split * step, mask=mask)
        tl.store(item_ptr + 2, tl.minimum((split + 1) * step, length), mask=mask)
        tl.store(item_ptr + 3, zero + row, mask=mask)
        tl.store(item_ptr + 4, zero + first, mask=mask)
        tl.store(item_ptr + 5, zero + items, mask=mask)
        tl.store(item_ptr + 6, zero + length, mask=mask)


def schedule_decode(
    row_slots: torch.Tensor,
    kv_lens: torch.Tensor,
    decode_rows: torch.Tensor,
    most_rows: int,
    workspace: DecodeWorkspace,
    fused: bool = False,
) -> None:
    """Cuts the decode rows into work items, once a step, for every layer's `paged_decode_attention`.

    A program a row; each computes the whole schedule from the lengths (2 KB from the L2) and writes its own part.

    Args:
        row_slots: [>= most_rows] int32, slot of each row.
        kv_lens: [>= most_rows] int32, cached tokens of each row, the step's own included; 0 for padding.
        decode_rows: [1] int32, how many of the rows, the first ones, are decode rows; of a fused step at least one.
        most_rows: the host's bound of that, at most `workspace.max_rows`.
        workspace: written.
        fused: attention will be given a transform. One without may run on such a schedule too, if not as fast.
    """
    config, splits = workspace.plan(most_rows, fused)
    assert most_rows <= workspace.max_rows
    _schedule_kernel[(most_rows,)](
        row_slots,
        kv_lens,
        decode_rows,
        workspace.items,
        workspace.num_items,
        splits,
        TILE=config.tile,
        MIN_CHUNK=config.min_chunk,
        WHOLE_ROW=config.whole_row,
        ROWS=next_power_of_2(workspace.max_rows),
        ITEM=ITEM_FIELDS,
        BLOCK=32,
        num_warps=4,
    )
