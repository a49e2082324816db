"""Matrix products with what stands around them in a decoder layer: RMSNorm before, SiLU · mul or the residual after.

A step of few tokens is decided by how fast the weights stream in, and by what each kernel waits for. Up to
`MOST_ROWS` tokens one kernel does the whole operation: it asks for its weights before it waits for the kernel that
makes its input (programmatic dependent launch), so that memory is busy across the kernels' boundaries. Above, the norm
is a kernel of its own (rms_norm.py), and the product that of tiled_linear.py up to 64 tokens; beyond, it is cuBLAS's,
with silu_mul.py after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from worker.kernels._triton import (
    INTERPRETED,
    LARGE_SHARED_MEMORY,
    capability_and_processors,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_2,
    tl,
    triton,
)
from worker.kernels.rms_norm import rms_norm, rms_norm_reference
from worker.kernels.silu_mul import silu_mul, silu_mul_reference
from worker.kernels.tiled_linear import MOST_ROWS as MOST_TILED_ROWS
from worker.kernels.tiled_linear import TiledConfig, tiled_config, tiled_linear

MOST_ROWS = 16  # above it the inputs take more than the weights
_MOST_INPUTS = 4096
_PIECE = 1024  # reduced elements that are multiplied together; a longer reduction takes several pieces


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How the kernel is compiled for one product."""

    block_n: int  # outputs a program
    num_warps: int
    splits: int  # parts of the reduction that the tensor cores add up side by side; 1: plain fp32 multiply-adds


def linear_config(
    rows: int, outputs: int, inputs: int, *, activate: bool, small_memory: bool = False
) -> LinearConfig | None:
    """The configuration for a product of `rows` tokens; None where another kernel is the faster.

    One row is multiplied and added in fp32, by many small programs that need no shared memory. More rows go through
    the tensor cores, a part of the reduction to each warp: one warp after another would add up their latency.
    `small_memory` is for devices of 99 KiB of shared memory a block.
    """
    if rows > MOST_ROWS or inputs > _MOST_INPUTS or (rows > 1 and outputs > 16384):
        return None
    if rows == 1:
        block_n = 4 if inputs <= 1024 and not activate else 2
        return LinearConfig(block_n=block_n, num_warps=2 if inputs <= 3072 and outputs <= 16384 else 4, splits=1)
    # The weights are the tall side of the tensor cores' tiles, the tokens the narrow one. A program's weights must fit
    # in shared memory beside a piece of the inputs.
    bytes_an_output = 2 * inputs * (1 + activate)
    for block_n in (32, 16) if rows <= 8 and inputs <= 1024 and not activate else (16,):
        if block_n * bytes_an_output <= (64 if small_memory else 128) * 1024:
            return LinearConfig(block_n=block_n, num_warps=4, splits=4)
    return None


@triton.jit
def _finish(out, out_ptr, at, mask, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATE: tl.constexpr,
            ADD: tl.constexpr):  # fmt: skip
    """The epilogue for sums [BLOCK_N, ROWS], or [2 * BLOCK_N, ROWS] with gate and up of an output in turn."""
    dtype = out_ptr.dtype.element_ty
    if ACTIVATE:
        gate, up = tl.split(tl.permute(tl.reshape(out, (BLOCK_N, 2, ROWS)), (0, 2, 1)))
        gate = gate.to(dtype).to(tl.float32)
        out = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
    if ADD:
        out += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(dtype), mask=mask)


@triton.jit
def _weights(weight_ptr, row, in_rows, piece, K: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):
    """[SPLITS, weight rows, CHUNK]: a piece of the reduction of the given weight rows."""
    k = piece * (SPLITS * CHUNK) + tl.arange(0, SPLITS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = (k < K)[:, None, :] & in_rows[None, :, None]
    return tl.load(weight_ptr + row[None, :, None].to(tl.int64) * K + k[:, None, :], mask=mask, other=0.0)


@triton.jit
def _inputs(x_ptr, gain_ptr, x_stride, rows, squares, piece, K: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
            SPLITS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """[SPLITS, CHUNK, ROWS]: the same piece of the inputs, times the norm's gain, and their squares added up [ROWS].

    The norm's other factor, one a row, comes after the product: the product need not wait until it is known.
    """
    k = piece * (SPLITS * CHUNK) + tl.arange(0, SPLITS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    row = tl.arange(0, ROWS)[None, None, :]
    x = tl.load(x_ptr + row * x_stride + k[:, :, None], mask=(row < rows) & (k < K)[:, :, None], other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        squares += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
        x = (wide * gain[:, :, None].to(tl.float32)).to(x.dtype)
    return x, squares


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    eps,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    FMA: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Weight rows; gate and up of one output stand side by side, so that one product serves both.
    if ACTIVATE:
        pair = tl.arange(0, 2 * BLOCK_N)
        column = tl.program_id(0) * BLOCK_N + pair // 2
        weight_row = pair % 2 * N + column
    else:
        column = n
        weight_row = n
    in_columns = column < N
    m = tl.arange(0, ROWS)
    at = n[:, None] + m[None, :] * out_stride
    mask = (n < N)[:, None] & (m < rows)[None, :]

    if FMA:
        k = tl.arange(0, SPLITS * CHUNK * PIECES)
        in_k = k < K
        weights = tl.load(
            weight_ptr + weight_row[:, None].to(tl.int64) * K + k[None, :],
            mask=in_columns[:, None] & in_k[None, :],
            other=0.0,
        )
        if NORM:
            gain = tl.load(norm_ptr + k, mask=in_k, other=0.0)
        if DEPENDENT:
            gdc_wait()
        for row in tl.static_range(ROWS):
            x = tl.load(x_ptr + row * x_stride + k, mask=k < tl.where(row < rows, K, 0), other=0.0)
            wide = x.to(tl.float32)
            scale = 1.0
            if NORM:
                scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / K + eps)
                wide *= gain.to(tl.float32)
            sums = tl.sum(weights.to(tl.float32) * wide[None, :], axis=1) * scale
            out_mask = (n < tl.where(row < rows, N, 0))[:, None]
            _finish(sums[:, None], out_ptr, row * out_stride + n[:, None], out_mask, BLOCK_N, 1, ACTIVATE, ADD)
        return

    w0 = _weights(weight_ptr, weight_row, in_columns, 0, K, SPLITS, CHUNK)
    if PIECES > 1:
        w1 = _weights(weight_ptr, weight_row, in_columns, 1, K, SPLITS, CHUNK)
    if PIECES > 2:
        w2 = _weights(weight_ptr, weight_row, in_columns, 2, K, SPLITS, CHUNK)
    if PIECES > 3:
        w3 = _weights(weight_ptr, weight_row, in_columns, 3, K, SPLITS, CHUNK)
    if DEPENDENT:
        gdc_wait()
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    x, squares = _inputs(x_ptr, norm_ptr, x_stride, rows, squares, 0, K, NORM, ROWS, SPLITS, CHUNK)
    sums = tl.dot(w0, x, input_precision=PRECISION)
    if PIECES > 1:
        x, squares = _inputs(x_ptr, norm_ptr, x_stride, rows, squares, 1, K, NORM, ROWS, SPLITS, CHUNK)
        sums = tl.dot(w1, x, sums, input_precision=PRECISION)
    if PIECES > 2:
        x, squares = _inputs(x_ptr, norm_ptr, x_stride, rows, squares, 2, K, NORM, ROWS, SPLITS, CHUNK)
        sums = tl.dot(w2, x, sums, input_precision=PRECISION)
    if PIECES > 3:
        x, squares = _inputs(x_ptr, norm_ptr, x_stride, rows, squares, 3, K, NORM, ROWS, SPLITS, CHUNK)
        sums = tl.dot(w3, x, sums, input_precision=PRECISION)
    out = tl.sum(sums, axis=0)
    if NORM:
        out *= tl.rsqrt(squares / K + eps)[None, :]
    _finish(out, out_ptr, at, mask, BLOCK_N, ROWS, ACTIVATE, ADD)


def linear_constants(
    rows: int, outputs: int, inputs: int, config: LinearConfig, dtype: torch.dtype
) -> dict[str, int | str]:
    """The compile-time constants of the kernel that follow from shapes."""
    fma = config.splits == 1
    piece = next_power_of_2(inputs)
    if not fma:
        piece = min(_PIECE, max(piece, 16 * config.splits))
    tall = 8 if rows <= 8 else MOST_ROWS
    return {
        "N": outputs, "K": inputs, "ROWS": next_power_of_2(rows) if fma else tall, "BLOCK_N": config.block_n,
        "SPLITS": config.splits, "CHUNK": piece // config.splits, "PIECES": cdiv(inputs, piece),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "FMA": fma,
    }  # fmt: skip


def _config(x: torch.Tensor, outputs: int, *, activate: bool = False) -> LinearConfig | TiledConfig | None:
    """How one of the two kernels would be run for this input; None for cuBLAS.

    That has fp32, a dtype for checking, and fp16, in which an input times the norm's gain may be too large. The tiled
    kernel is for devices with dependent launch, which is what it gains from, and with the shared memory for its stages.
    """
    rows, inputs = x.shape
    if rows == 0 or (x.dtype != torch.bfloat16 and not INTERPRETED):
        return None
    capability = capability_and_processors(x.device)[0]
    small_memory = capability not in LARGE_SHARED_MEMORY
    if MOST_ROWS < rows <= MOST_TILED_ROWS and (INTERPRETED or (capability >= (9, 0) and not small_memory)):
        return tiled_config(outputs, inputs, activate=activate)
    return linear_config(rows, outputs, inputs, activate=activate, small_memory=small_memory)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, norm_weight: torch.Tensor | None, eps: float,
    config: LinearConfig, *, activate: bool = False, add: bool = False,
) -> torch.Tensor:  # fmt: skip
    rows, inputs = x.shape
    outputs = out.shape[1]
    _linear_kernel[(cdiv(outputs, config.block_n),)](
        x, norm_weight, weight, out, x.stride(0), out.stride(0), eps, rows,
        NORM=norm_weight is not None, ACTIVATE=activate, ADD=add,
        **linear_constants(rows, outputs, inputs, config, x.dtype),
        num_warps=config.num_warps, num_stages=1, **dependent_launch(x.device),
    )  # fmt: skip
    return out


def norm_linear(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019), then a product: rms_norm(x) @ weight.T.

    The kernel multiplies by the norm's gain before the product and by the rows' factors after it, in fp32; transformers
    rounds the normalised value instead, which is as far from the exact result.
    Moves outputs * inputs weights and rows * (inputs + outputs) values; 2 * rows * outputs * inputs flops.

    Args:
        x: [tokens, inputs] bf16, fp16 or fp32; tokens may be strided.
        norm_weight: [inputs].
        eps: of the norm.
        weight: [outputs, inputs], contiguous.

    Returns:
        [tokens, outputs], contiguous, in the dtype of `x`.
    """
    config = _config(x, weight.shape[0])
    if config is None:
        return linear(rms_norm(x, norm_weight, eps), weight)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if isinstance(config, TiledConfig):
        return tiled_linear(rms_norm(x, norm_weight, eps), weight, out, config)
    return _launch(x, weight, out, norm_weight, eps, config)


def norm_linear_silu_mul(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm, the fused gate_up product, and SwiGLU (Shazeer 2020): silu(gate) * up, rounded where transformers does.

    Args:
        x: [tokens, inputs]; tokens may be strided.
        norm_weight: [inputs].
        eps: of the norm.
        weight: [2 * intermediate, inputs], gate first, contiguous.

    Returns:
        [tokens, intermediate], contiguous, in the dtype of `x`.
    """
    config = _config(x, weight.shape[0] // 2, activate=True)
    if config is None:
        return silu_mul(linear(rms_norm(x, norm_weight, eps), weight))
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    if isinstance(config, TiledConfig):
        return tiled_linear(rms_norm(x, norm_weight, eps), weight, out, config, activate=True)
    return _launch(x, weight, out, norm_weight, eps, config, activate=True)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Adds a product to the residual stream in place: residual += x @ weight.T, summed in fp32 and rounded once.

    Args:
        x: [tokens, inputs]; tokens may be strided.
        weight: [outputs, inputs], contiguous.
        residual: [tokens, outputs], contiguous; overwritten.
    """
    config = _config(x, weight.shape[0])
    if config is None:
        residual.addmm_(x, weight.t())
    elif isinstance(config, TiledConfig):
        tiled_linear(x, weight, residual, config, add=True)
    else:
        _launch(x, weight, residual, None, 0.0, config, add=True)


def norm_linear_reference(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """`norm_linear` in plain torch, for any device."""
    return linear(rms_norm_reference(x, norm_weight, eps), weight)


def norm_linear_silu_mul_reference(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """`norm_linear_silu_mul` in plain torch, for any device."""
    return silu_mul_reference(linear(rms_norm_reference(x, norm_weight, eps), weight))


def linear_add_reference(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """`linear_add` in plain torch, for any device."""
    residual.addmm_(x, weight.t())
