"""Brings what a step changes to the slots it concerns: new entries of block tables, and what is set with a request."""

from __future__ import annotations

import torch

from worker.kernels._triton import cdiv, tl, triton

# What is set with a request, int32 each: slot, cached length, top_k, the bits of temperature, top_p and min_p, and both
# halves of the seed, low one first.
FIELDS = 8
_BLOCK = 256


@triton.jit(
    do_not_specialize=["num_requests", "num_entries"], do_not_specialize_on_alignment=["entries_ptr", "block_ids_ptr"]
)
def _apply_changes_kernel(
    fields_ptr,
    entries_ptr,
    block_ids_ptr,
    block_table_ptr,
    seq_lens_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    num_requests,
    num_entries,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = index < num_entries
    entry = tl.load(entries_ptr + index, mask=is_entry, other=0)
    tl.store(block_table_ptr + entry, tl.load(block_ids_ptr + index, mask=is_entry, other=0), mask=is_entry)
    mask = index < num_requests
    field_ptr = fields_ptr + index
    slot = tl.load(field_ptr, mask=mask, other=0)
    tl.store(seq_lens_ptr + slot, tl.load(field_ptr + num_requests, mask=mask, other=0), mask=mask)
    tl.store(top_k_ptr + slot, tl.load(field_ptr + 2 * num_requests, mask=mask, other=0), mask=mask)
    for_floats = tl.load(field_ptr + 3 * num_requests, mask=mask, other=0)
    tl.store(temperature_ptr + slot, for_floats.to(tl.float32, bitcast=True), mask=mask)
    for_floats = tl.load(field_ptr + 4 * num_requests, mask=mask, other=0)
    tl.store(top_p_ptr + slot, for_floats.to(tl.float32, bitcast=True), mask=mask)
    for_floats = tl.load(field_ptr + 5 * num_requests, mask=mask, other=0)
    tl.store(min_p_ptr + slot, for_floats.to(tl.float32, bitcast=True), mask=mask)
    low = tl.load(field_ptr + 6 * num_requests, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(field_ptr + 7 * num_requests, mask=mask, other=0).to(tl.int64)
    tl.store(seeds_ptr + slot, (high << 32) | low, mask=mask)


def apply_changes(
    fields: torch.Tensor,
    entries: torch.Tensor,
    block_ids: torch.Tensor,
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
        fields: [FIELDS, requests] int32, contiguous; slots are distinct.
        entries: [n] int32, indices into the flat block table, distinct.
        block_ids: [n] int32, what these become.
        block_table: [slots + 1, max_blocks] int32, contiguous, written, and so are the following, [slots + 1] each:
        seq_lens, top_k: int32.
        temperature, top_p, min_p: float32.
        seeds: int64.
    """
    num_requests, num_entries = fields.shape[1], entries.shape[0]
    _apply_changes_kernel[(cdiv(max(num_requests, num_entries, 1), _BLOCK),)](
        fields, entries, block_ids, block_table, seq_lens, top_k, temperature, top_p, min_p, seeds,
        num_requests, num_entries, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def apply_changes_reference(
    fields: torch.Tensor,
    entries: torch.Tensor,
    block_ids: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
) -> None:
    """`apply_changes` in plain torch, for any device."""
    block_table.view(-1)[entries] = block_ids
    slots = fields[0]
    for table, values in ((seq_lens, fields[1]), (top_k, fields[2])):
        table[slots] = values
    for table, values in ((temperature, fields[3]), (top_p, fields[4]), (min_p, fields[5])):
        table[slots] = values.view(torch.float32)
    seeds[slots] = torch.stack([fields[6], fields[7]], dim=1).view(torch.int64).squeeze(1)
