"""Chooses, once, which implementation of the fused operations a device uses.

On a CUDA device (and in Triton's interpreter, which the tests use) these are the kernels; elsewhere they are the
plain-torch references. Both have the same signatures, so the model is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from worker.kernels import gumbel_sample, qk_norm_rope, rms_norm, silu_mul, step_metadata
from worker.kernels._triton import INTERPRETED

_MODULES: dict[str, ModuleType] = {
    "rms_norm": rms_norm,
    "add_rms_norm": rms_norm,
    "qk_norm_rope_cache": qk_norm_rope,
    "silu_mul": silu_mul,
    "step_metadata": step_metadata,
    "sample": gumbel_sample,
    "argmax_sample": gumbel_sample,
}


@dataclass(frozen=True, slots=True)
class Ops:
    """The fused operations of a step; each is documented where it is defined."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    qk_norm_rope_cache: Callable[..., torch.Tensor]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]
    step_metadata: Callable[..., None]
    sample: Callable[..., torch.Tensor]
    argmax_sample: Callable[[torch.Tensor], torch.Tensor]


def _collect(suffix: str) -> Ops:
    return Ops(**{field.name: getattr(_MODULES[field.name], field.name + suffix) for field in fields(Ops)})


TRITON = _collect("")
REFERENCE = _collect("_reference")


def select(device: torch.device | str) -> Ops:
    """The operations for `device`: Triton kernels on a GPU, plain torch on a CPU.

    In Triton's interpreter (TRITON_INTERPRET=1) the kernels run on a CPU too.
    """
    return TRITON if torch.device(device).type == "cuda" or INTERPRETED else REFERENCE
