"""Imports Triton, or a stand-in that lets the plain-torch references be imported where it is not installed.

Kernels are defined through the names exported here, so that a machine without Triton (a CPU-only install) still
has the references that stand beside them; launching a kernel there fails with a message that says why.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch


class _MissingKernel:
    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("this kernel needs Triton: pip install triton (Linux), or run on the CPU")


class MissingTriton:
    """Stands in for Triton where kernels are defined."""

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        return _MissingKernel() if function is not None else lambda function: _MissingKernel()


# Triton 3.10 leaves out fused multiply-adds unless asked; the kernels' speed counts on them.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    INTERPRETED: bool = triton.knobs.runtime.interpret  # kernels run on the CPU, in Triton's interpreter
except ImportError:
    INTERPRETED = False
    triton: Any = MissingTriton()  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]
    gdc_launch_dependents = gdc_wait = None

__all__ = [
    "INTERPRETED",
    "LARGE_SHARED_MEMORY",
    "MissingTriton",
    "capability_and_processors",
    "cdiv",
    "constant",
    "dependent_launch",
    "gdc_launch_dependents",
    "gdc_wait",
    "next_power_of_2",
    "tl",
    "triton",
]


# Compute capabilities whose blocks may have at least 163 KiB of shared memory; others have 99 KiB.
LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


def constant(value: float) -> Any:
    """A number in a module that its kernels read."""
    return value if tl is None else tl.constexpr(value)


@cache
def capability_and_processors(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; for Triton's interpreter, those of a very small sm_80."""
    if device.type != "cuda":
        return (8, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes part in programmatic dependent launch, where the device has it.

    Such a kernel lets the next one begin at once, and itself waits (`gdc_wait`) before it touches what another kernel
    writes. Every program must wait, also one with nothing to do: that a kernel has finished then means that all before
    it have. Before the wait it may read what earlier steps wrote, or what a kernel wrote that an ordinary launch has
    already waited for, and write nothing.
    """
    on = device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9
    return {"DEPENDENT": on, **({"launch_pdl": True} if on else {})}


def cdiv(a: int, b: int) -> int:
    """Smallest number of `b`s that cover `a`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
