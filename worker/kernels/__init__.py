"""Fused operations of a decoding step, each a Triton kernel beside its plain-torch reference.

`select(device)` gives the set that a device uses.
"""

from worker.kernels.ops import Ops, select

__all__ = ["Ops", "select"]
