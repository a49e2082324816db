"""What a step leaves behind for the next one: each row's cached length, each sampled token, by slot."""

from __future__ import annotations

import torch

from worker.kernels._triton import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    tl,
    triton,
)

_BLOCK = 128


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_slots_ptr", "kv_lens_ptr"])
def _commit_lengths_kernel(
    row_slots_ptr, kv_lens_ptr, seq_lens_ptr, rows, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    slot = tl.load(row_slots_ptr + row, mask=mask, other=0)
    tl.store(seq_lens_ptr + slot, tl.load(kv_lens_ptr + row, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_slots_ptr", "token_ptr"])
def _commit_tokens_kernel(
    row_slots_ptr, token_ptr, last_token_ptr, token_ids_ptr, rows, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    slot = tl.load(row_slots_ptr + row, mask=mask, other=0)
    token = tl.load(token_ptr + row, mask=mask, other=0)
    tl.store(token_ids_ptr + row, token, mask=mask)
    tl.store(last_token_ptr + slot, tl.maximum(token, 0), mask=mask)


def commit_lengths(row_slots: torch.Tensor, kv_lens: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Keeps the rows' cached lengths by slot: seq_lens[row_slots] = kv_lens.

    Args:
        row_slots: [rows] int32, distinct but for the null slot, whose rows all have length 0.
        kv_lens: [rows] int32.
        seq_lens: [slots + 1] int32, written.
    """
    rows = row_slots.shape[0]
    _commit_lengths_kernel[(cdiv(rows, _BLOCK),)](
        row_slots, kv_lens, seq_lens, rows, BLOCK=_BLOCK, num_warps=4, **dependent_launch(row_slots.device)
    )


def commit_tokens(
    row_slots: torch.Tensor, tokens: torch.Tensor, last_token: torch.Tensor, token_ids: torch.Tensor
) -> None:
    """Keeps the sampled tokens by slot, for the next step, and in row order, for the host.

    A failed row's -1 goes to the host; the device gets 0, an id that the embedding has.

    Args:
        row_slots: [rows] int32.
        tokens: [rows] int32, as sampled.
        last_token: [slots + 1] int32, written.
        token_ids: [rows] int32, written.
    """
    rows = row_slots.shape[0]
    _commit_tokens_kernel[(cdiv(rows, _BLOCK),)](
        row_slots, tokens, last_token, token_ids, rows, BLOCK=_BLOCK, num_warps=4, **dependent_launch(row_slots.device)
    )


def commit_lengths_reference(row_slots: torch.Tensor, kv_lens: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """`commit_lengths` in plain torch, for any device."""
    seq_lens[row_slots] = kv_lens


def commit_tokens_reference(
    row_slots: torch.Tensor, tokens: torch.Tensor, last_token: torch.Tensor, token_ids: torch.Tensor
) -> None:
    """`commit_tokens` in plain torch, for any device."""
    last_token[row_slots] = tokens.clamp(min=0)
    token_ids.copy_(tokens)
