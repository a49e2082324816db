"""Keys of logits: integers in their order, so that a search among them ends at an exact one."""

from __future__ import annotations

import torch

from worker.kernels._triton import tl, triton

# Low bits of a logit's float32 that its own type does not have: a key leaves them out.
KEY_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def key_of(value, SHIFT: tl.constexpr):
    """int32, in the order of the values; exact for values that the logits' type holds. Both zeros have the same."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> SHIFT
    return tl.where(key == -1, 0, key)


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The fp32 value of a key."""
    bits = key << SHIFT
    return tl.where(key >= 0, bits, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
