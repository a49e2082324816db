"""Brings what a step changes to the slots it concerns: new entries of block tables, and what is set with a request."""

from __future__ import annotations

import struct

import torch

from protocol.messages import AdmittedSlot
from worker.kernels._triton import cdiv, tl, triton

# What is set with a request, one after another: slot, cached length, top_k, temperature, top_p, min_p, seed.
_REQUEST = struct.Struct("<3i3fq")
FIELDS = _REQUEST.size // 4
HEADER = 2  # how many requests and entries follow
_BLOCK = 256


def pack_request(admitted: AdmittedSlot) -> bytes:
    """A request's FIELDS int32, little-endian, as the kernel reads them: three int32, three float32, one int64.

    Raises:
        struct.error, OverflowError: a value does not fit, which those of checked requests do.
    """
    return _REQUEST.pack(
        admitted.slot, admitted.num_computed_tokens, admitted.top_k,
        admitted.temperature, admitted.top_p, admitted.min_p, admitted.seed,
    )  # fmt: skip


@triton.jit
def _apply_changes_kernel(
    changes_ptr,
    block_table_ptr,
    seq_lens_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    HEADER: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_requests = tl.load(changes_ptr)
    num_entries = tl.load(changes_ptr + 1)
    entries_ptr = changes_ptr + HEADER + num_requests * FIELDS
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = index < num_entries
    entry = tl.load(entries_ptr + index, mask=is_entry, other=0)
    block = tl.load(entries_ptr + num_entries + index, mask=is_entry, other=0)
    tl.store(block_table_ptr + entry, block, mask=is_entry)
    mask = index < num_requests
    field_ptr = changes_ptr + HEADER + index * FIELDS
    slot = tl.load(field_ptr, mask=mask, other=0)
    tl.store(seq_lens_ptr + slot, tl.load(field_ptr + 1, mask=mask, other=0), mask=mask)
    tl.store(top_k_ptr + slot, tl.load(field_ptr + 2, mask=mask, other=0), mask=mask)
    temperature = tl.load(field_ptr + 3, mask=mask, other=0).to(tl.float32, bitcast=True)
    tl.store(temperature_ptr + slot, temperature, mask=mask)
    top_p = tl.load(field_ptr + 4, mask=mask, other=0).to(tl.float32, bitcast=True)
    tl.store(top_p_ptr + slot, top_p, mask=mask)
    min_p = tl.load(field_ptr + 5, mask=mask, other=0).to(tl.float32, bitcast=True)
    tl.store(min_p_ptr + slot, min_p, mask=mask)
    low = tl.load(field_ptr + 6, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(field_ptr + 7, mask=mask, other=0).to(tl.int64)
    tl.store(seeds_ptr + slot, (high << 32) | low, mask=mask)


def apply_changes(
    changes: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
) -> None:
    """Writes a step's changes to their slots, in one launch: it stands before the step's first kernel.

    Args:
        changes: [n] int32, contiguous: the numbers of requests and of entries, then for each request FIELDS int32
            (`pack_request`; slots are distinct), then the entries, which are distinct indices into the flat block
            table, then what these become. What follows is not read, so that one size serves many.
        block_table: [slots + 1, max_blocks] int32, contiguous, written, and so are the following, [slots + 1] each:
        seq_lens, top_k: int32.
        temperature, top_p, min_p: float32.
        seeds: int64.
    """
    # An entry takes two int32, a request more: there are at most half as many of either.
    _apply_changes_kernel[(cdiv(changes.shape[0], 2 * _BLOCK),)](
        changes, block_table, seq_lens, top_k, temperature, top_p, min_p, seeds,
        HEADER=HEADER, FIELDS=FIELDS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def apply_changes_reference(
    changes: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
) -> None:
    """`apply_changes` in plain torch, for any device."""
    num_requests, num_entries = changes[:HEADER].tolist()
    sizes = [num_requests * FIELDS, num_entries, num_entries]
    requests, entries, blocks = changes[HEADER : HEADER + sum(sizes)].split(sizes)
    block_table.view(-1)[entries] = blocks
    fields = requests.view(num_requests, FIELDS)
    slots = fields[:, 0]
    for column, table in enumerate((seq_lens, top_k), start=1):
        table[slots] = fields[:, column]
    for column, table in enumerate((temperature, top_p, min_p), start=3):
        table[slots] = fields[:, column].contiguous().view(torch.float32)
    seeds[slots] = fields[:, 6:].contiguous().view(torch.int64).squeeze(1)
