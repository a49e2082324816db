"""RMSNorm of each token: the norm of the steps whose products are cuBLAS's.

One program normalises one token, whose hidden state it keeps in registers. Knows nothing of layers or models.
"""

from __future__ import annotations

import torch

from worker.kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, next_power_of_2, tl, triton


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < HIDDEN
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if DEPENDENT:
        gdc_wait()
    x = tl.load(x_ptr + token * x_stride + offsets, mask=mask, other=0.0)
    x = x.to(tl.float32)
    variance = tl.sum(x * x, axis=0) / HIDDEN
    normalised = (x * tl.rsqrt(variance + eps)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_stride + offsets, normalised * weight, mask=mask)


def rms_norm_config(hidden: int) -> dict[str, int]:
    """Block and warps for one hidden state: 8 values (16 bytes of bf16) a thread until 8 warps are in use."""
    block = next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises each token by its root mean square (Zhang and Sennrich 2019), in fp32, then scales by `weight`.

    The normalised value is rounded to the dtype before the product, as transformers' Qwen3RMSNorm does.
    Moves 2 * tokens * hidden elements; 4 flops an element.

    Args:
        x: [tokens, hidden], any float dtype; tokens may be strided.
        weight: [hidden], the dtype of `x`.

    Returns:
        [tokens, hidden], contiguous, in the dtype of `x`.
    """
    tokens, hidden = x.shape
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            x,
            weight,
            out,
            x.stride(0),
            hidden,
            eps,
            HIDDEN=hidden,
            **rms_norm_config(hidden),
            **dependent_launch(x.device),
        )
    return out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch, for any device."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight
