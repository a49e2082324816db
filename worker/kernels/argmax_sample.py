"""Takes the most likely token of each row.

Two launches, partial maxima by stretches of the vocabulary, then one program a row, so that a single row still uses
the whole chip.
"""

from __future__ import annotations

import torch

from worker.kernels._triton import cdiv, next_power_of_2, tl, triton


@triton.jit
def _partial_kernel(
    logits_ptr,
    value_ptr,
    index_ptr,
    status_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    stretch = tl.program_id(0)
    row = tl.program_id(1)
    index = stretch * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + index, mask=index < VOCAB, other=-float("inf")).to(
        tl.float32
    )
    status = tl.where(logits < float("inf"), (logits > -float("inf")).to(tl.int32), 2)  # NaN is less than nothing
    best, offset = tl.max(logits, axis=0, return_indices=True)  # the lowest index of equals
    at = row * STRETCHES + stretch
    tl.store(value_ptr + at, best)
    tl.store(index_ptr + at, stretch * BLOCK + offset)
    tl.store(status_ptr + at, tl.max(status, axis=0))  # 2: NaN or +inf, 1: a finite logit, 0: neither


@triton.jit(do_not_specialize_on_alignment=["token_ptr"])
def _reduce_kernel(value_ptr, index_ptr, status_ptr, token_ptr, STRETCHES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < STRETCHES
    value = tl.load(value_ptr + row * STRETCHES + offsets, mask=mask, other=-float("inf"))
    index = tl.load(index_ptr + row * STRETCHES + offsets, mask=mask, other=2147483647)
    status = tl.load(status_ptr + row * STRETCHES + offsets, mask=mask, other=0)
    best = tl.max(value, axis=0)
    token = tl.min(tl.where(value == best, index, 2147483647), axis=0)
    tl.store(token_ptr + row, tl.where(tl.max(status, axis=0) == 1, token, -1))


def argmax_block(rows: int) -> int:
    """Logits a program: few rows need many programs to fill the chip, many rows save on reductions."""
    return 1024 if rows <= 8 else 2048


def argmax_sample(logits: torch.Tensor) -> torch.Tensor:
    """The arg-max of each row. Reads rows * vocab logits once.

    Args:
        logits: [rows, vocab] fp32 or bf16, rows may be strided.

    Returns:
        [rows] int32; the lowest index among equals, -1 for a row that holds NaN or +inf or has no finite logit.
    """
    rows, vocab = logits.shape
    block = min(argmax_block(rows), max(16, next_power_of_2(vocab)))
    stretches = cdiv(vocab, block)
    token = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows == 0:
        return token
    value = torch.empty((rows, stretches), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    status = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    _partial_kernel[(stretches, rows)](
        logits, value, index, status, logits.stride(0), VOCAB=vocab, BLOCK=block, STRETCHES=stretches, num_warps=4
    )
    _reduce_kernel[(rows,)](
        value, index, status, token, STRETCHES=stretches, BLOCK=next_power_of_2(stretches), num_warps=1
    )
    return token


def argmax_sample_reference(logits: torch.Tensor) -> torch.Tensor:
    """`argmax_sample` in plain torch, for any device."""
    # A NaN anywhere in a row is its maximum.
    return torch.where(logits.amax(-1).isfinite(), logits.argmax(-1).to(torch.int32), -1)
