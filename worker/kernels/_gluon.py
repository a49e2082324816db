"""Imports Gluon, the level below Triton, or a stand-in where it is not installed, as _triton.py does for Triton.

Names that differ between Triton 3.6 and 3.9 are made one here.
"""

from __future__ import annotations

from typing import Any

from worker.kernels._triton import MissingTriton, triton

__all__ = ["HAS_GLUON", "TensorDescriptor", "gl", "gluon", "hopper", "load_box", "view_as"]

# Before that, warps could be specialised in another way only.
HAS_GLUON = tuple(map(int, getattr(triton, "__version__", "0.0").split(".")[:2])) >= (3, 6)

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    load_box = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
    _RENAMED: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
else:
    gluon: Any = MissingTriton()  # type: ignore[no-redef]
    gl = hopper = TensorDescriptor = load_box = _RENAMED = None


@gluon.jit
def view_as(smem, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape and layout."""
    if _RENAMED:
        return smem.reinterpret(smem.dtype, shape, layout)
    else:
        return smem._reinterpret(smem.dtype, shape, layout)
