"""Matrix products for steps of 17 to 64 tokens: one tile of outputs a program, the reduction in a software pipeline.

At these sizes a product of a small model is over in the time that a kernel takes to start. What this one has over
cuBLAS's is programmatic dependent launch, the activation or the residual in the same kernel, and parts of a long
reduction that are added up without a second one. Knows nothing of norms or layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from worker.kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, tl, triton

MOST_ROWS = 64  # the tensor cores' tile: fewer tokens take as long
_CHUNK = 128  # reduced elements of one stage of the pipeline
# Above it a product is bound by memory, where cuBLAS is at the limit.
_MOST_WEIGHTS = 8 << 20


@dataclass(frozen=True, slots=True)
class TiledConfig:
    """How the kernel is compiled for one product."""

    block_n: int  # outputs a program; with an activation, that many of gate and of up
    splits: int  # programs that share the reduction of one tile
    num_warps: int = 4
    num_stages: int = 4


def tiled_config(outputs: int, inputs: int, *, activate: bool) -> TiledConfig | None:
    """The configuration for a product, None where cuBLAS serves it better or the shape does not divide into tiles.

    About 64 programs are best on an H200: each reads all inputs of its part of the reduction, so that twice as many
    read twice as much, and fewer leave processors without work.
    """
    if activate:
        config = TiledConfig(block_n=16, splits=1)
    elif outputs >= 2048:
        config = TiledConfig(block_n=64, splits=1)
    else:
        config = TiledConfig(block_n=32, splits=2) if inputs <= 2048 else TiledConfig(block_n=64, splits=4)
    divides = outputs % config.block_n == 0 and inputs % (config.splits * _CHUNK) == 0
    return config if divides and outputs * inputs * (1 + activate) <= _MOST_WEIGHTS else None


@triton.jit(do_not_specialize=["rows"])
def _tiled_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    partial_out_ptr,
    arrived_ptr,
    x_stride,
    out_stride,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, ROWS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * (K // SPLITS) + tl.arange(0, CHUNK)
    # Weight rows; gate and up of one output stand side by side, so that one product serves both.
    if ACTIVATE:
        pair = tl.arange(0, 2 * BLOCK_N)
        weight_row = pair % 2 * N + tile * BLOCK_N + pair // 2
        sums = tl.zeros((ROWS, 2 * BLOCK_N), dtype=tl.float32)
    else:
        weight_row = n
        sums = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    x_at = x_ptr + m[:, None] * x_stride + k[None, :]
    weight_at = weight_ptr + weight_row[None, :] * K + k[:, None]
    mask = (m < rows)[:, None]
    if DEPENDENT:
        gdc_wait()
    for _ in tl.range(0, K // SPLITS // CHUNK, num_stages=STAGES):
        x = tl.load(x_at, mask=mask, other=0.0)
        weights = tl.load(weight_at)
        sums = tl.dot(x, weights, sums, input_precision=PRECISION)
        x_at += CHUNK
        weight_at += CHUNK

    dtype = out_ptr.dtype.element_ty
    out_at = out_ptr + m[:, None] * out_stride + n[None, :]
    last = True
    if SPLITS > 1:
        part_at = (
            partial_out_ptr + tile * (SPLITS * ROWS * BLOCK_N) + m[:, None] * BLOCK_N + (n - tile * BLOCK_N)[None, :]
        )
        tl.store(part_at + split * (ROWS * BLOCK_N), sums, cache_modifier=".cg")
        # The program that comes last adds up, always in the same order. The barrier puts every thread's part before
        # the count (release); the count's acquire, and reading past the L1, put the others' before what follows.
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(arrived_ptr + tile, 0)
            sums = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
            for part in tl.static_range(SPLITS):
                sums += tl.load(part_at + part * (ROWS * BLOCK_N), cache_modifier=".cg")
        if ACTIVATE:
            gate, up = tl.split(tl.reshape(sums, (ROWS, BLOCK_N, 2)))
            gate = gate.to(dtype).to(tl.float32)
            out = ((gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)).to(tl.float32)
        else:
            out = sums
        if ADD:
            out += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_at, out.to(dtype), mask=mask)


@cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and counts of the tiles whose reduction is split; only outputs below 2,048 are.

    Kernels of one stream share it. The counts are zero whenever none of them runs.
    """
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "it would lie in the graph's memory"
    partial = torch.empty(2048 * MOST_ROWS * 4, dtype=torch.float32, device=device)
    return partial, torch.zeros(64, dtype=torch.int32, device=device)


def tiled_constants(outputs: int, inputs: int, config: TiledConfig, dtype: torch.dtype) -> dict[str, int | str]:
    """The compile-time constants of the kernel that follow from shapes."""
    return {
        "N": outputs, "K": inputs, "ROWS": MOST_ROWS, "BLOCK_N": config.block_n, "SPLITS": config.splits,
        "CHUNK": _CHUNK, "STAGES": config.num_stages, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


def tiled_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, config: TiledConfig, *, activate: bool = False,
    add: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x @ weight.T, summed in fp32, into `out`; followed by SwiGLU's silu(gate) * up, or added to what is there.

    Moves outputs * inputs weights once, and the inputs once for each tile of outputs, from the L2; 2 * rows * outputs *
    inputs flops (twice as many with the activation).

    Args:
        x: [rows, inputs], 1 to 64 rows, which may be strided.
        weight: [outputs, inputs], or with `activate` [2 * outputs, inputs], gate first; contiguous.
        out: [rows, outputs], contiguous.

    Returns:
        `out`.
    """
    rows, inputs = x.shape
    outputs = out.shape[1]
    partial, arrived = _workspace(x.device) if config.splits > 1 else (None, None)
    _tiled_linear_kernel[(outputs // config.block_n, config.splits)](
        x, weight, out, partial, arrived, x.stride(0), out.stride(0), rows, ACTIVATE=activate, ADD=add,
        **tiled_constants(outputs, inputs, config, x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **dependent_launch(x.device),
    )  # fmt: skip
    return out
