"""Imports Triton, or a stand-in that lets the plain-torch references be imported where it is not installed.

Kernels are defined through the names exported here, so that a machine without Triton (a CPU-only install) still
has the references that stand beside them; launching a kernel there fails with a message that says why.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    INTERPRETED: bool = triton.knobs.runtime.interpret  # kernels run on the CPU, in Triton's interpreter
except ImportError:
    INTERPRETED = False

    class _MissingKernel:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("this kernel needs Triton: pip install triton (Linux), or run on the CPU")

    class _MissingTriton:
        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return _MissingKernel() if function is not None else lambda function: _MissingKernel()

    triton: Any = _MissingTriton()  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

__all__ = ["INTERPRETED", "cdiv", "next_power_of_2", "tl", "triton"]


def cdiv(a: int, b: int) -> int:
    """Smallest number of `b`s that cover `a`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
