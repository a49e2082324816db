"""Rotary position embeddings (Su et al., arXiv:2104.09864), as a table that the attention kernels read."""

from __future__ import annotations

import torch


def cos_sin_table(theta: float, head_dim: int, max_position: int, device: torch.device) -> torch.Tensor:
    """[max_position, head_dim] float32: the first half of a row holds cosines, the second half sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
