"""A kernel that writes where nothing is: an illegal memory access, which only tests ask for."""

import torch
import triton
import triton.language as tl


@triton.jit
def _store_far_away(pointer, distance):
    tl.store(pointer + distance, 1)


def access_illegal_memory() -> None:
    """The error comes later, from whatever is called next on the device."""
    _store_far_away[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"), 1 << 45)
