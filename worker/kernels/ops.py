"""Chooses, once, which implementation of the fused operations a device uses.

On a CUDA device (and in Triton's interpreter, which the tests use) these are the kernels; elsewhere they are the
plain-torch references. Both have the same signatures, so the model is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from worker.kernels import (
    apply_changes,
    argmax_sample,
    commit_step,
    edit_logits,
    filter_threshold,
    fused_linear,
    gumbel_sample,
    qk_norm_rope,
    rms_norm,
    silu_mul,
    step_metadata,
)
from worker.kernels._triton import INTERPRETED

_MODULES: dict[str, ModuleType] = {
    "rms_norm": rms_norm,
    "norm_linear": fused_linear,
    "norm_linear_silu_mul": fused_linear,
    "linear_add": fused_linear,
    "qk_norm_rope_cache": qk_norm_rope,
    "silu_mul": silu_mul,
    "apply_changes": apply_changes,
    "step_metadata": step_metadata,
    "commit_lengths": commit_step,
    "commit_tokens": commit_step,
    "sample": gumbel_sample,
    "argmax_sample": argmax_sample,
    "filter_threshold": filter_threshold,
    "edit_logits": edit_logits,
    "record_tokens": edit_logits,
}


@dataclass(frozen=True, slots=True)
class Ops:
    """The fused operations of a step; each is documented where it is defined."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    norm_linear: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]
    norm_linear_silu_mul: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]
    linear_add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    qk_norm_rope_cache: Callable[..., torch.Tensor]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]
    apply_changes: Callable[..., None]
    step_metadata: Callable[..., None]
    commit_lengths: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    commit_tokens: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    sample: Callable[..., torch.Tensor]
    argmax_sample: Callable[[torch.Tensor], torch.Tensor]
    filter_threshold: Callable[..., torch.Tensor]
    edit_logits: Callable[..., torch.Tensor]
    record_tokens: Callable[..., None]


def _collect(suffix: str) -> Ops:
    return Ops(**{field.name: getattr(_MODULES[field.name], field.name + suffix) for field in fields(Ops)})


TRITON = _collect("")
REFERENCE = _collect("_reference")


def select(device: torch.device | str) -> Ops:
    """The operations for `device`: Triton kernels on a GPU, plain torch on a CPU.

    In Triton's interpreter (TRITON_INTERPRET=1) the kernels run on a CPU too.
    """
    return TRITON if torch.device(device).type == "cuda" or INTERPRETED else REFERENCE
