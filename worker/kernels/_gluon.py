"""Imports Gluon, the level below Triton, or a stand-in where it is not to be had, as _triton.py does for Triton.

Gluon is not settled yet: names that differ between Triton 3.6 and 3.9 are made one here, and where a version does not
have what is needed, the kernels written in it are not used.
"""

from __future__ import annotations

import logging
from typing import Any

from worker.kernels._triton import MissingTriton, triton

__all__ = ["HAS_GLUON", "TensorDescriptor", "barrier", "gl", "gluon", "hopper", "load_box", "view_as"]

logger = logging.getLogger(__name__)

HAS_GLUON = False
gluon: Any = MissingTriton()
gl: Any = None
hopper: Any = None
TensorDescriptor: Any = None
load_box: Any = None
barrier: Any = None
_RENAMED: Any = None

# Before 3.6, `warp_specialize` took other arguments.
if tuple(map(int, getattr(triton, "__version__", "0.0").split(".")[:2])) >= (3, 6):
    try:
        from triton.experimental import gluon  # type: ignore[no-redef]
        from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
        from triton.experimental.gluon.language.nvidia import hopper  # type: ignore[no-redef]
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # type: ignore[no-redef]

        # Starts to copy a box of a described tensor to shared memory; a barrier counts its bytes.
        load_box = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
        # Of the threads of a partition.
        barrier = getattr(gl, "barrier", None) or gl.thread_barrier
        _RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
        HAS_GLUON = True
    except (ImportError, AttributeError) as error:
        gluon = MissingTriton()
        logger.warning("Gluon of Triton %s cannot be used, so neither can kernels for Hopper: %s",
                       triton.__version__, error)  # fmt: skip


@gluon.jit
def view_as(smem, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape and layout."""
    if _RENAMED:
        return smem.reinterpret(smem.dtype, shape, layout)
    else:
        return smem._reinterpret(smem.dtype, shape, layout)
