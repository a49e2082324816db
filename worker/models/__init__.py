"""Model families, one file each. `create_model` picks the file for an architecture."""

from __future__ import annotations

import torch

from protocol.model_config import ModelConfig
from worker.kernels import Ops
from worker.models.qwen3 import Qwen3

MODELS = {"Qwen3ForCausalLM": Qwen3}


def create_model(config: ModelConfig, ops: Ops, max_model_len: int, device: torch.device, dtype: torch.dtype) -> Qwen3:
    """The model with uninitialised weights, ready for `worker.weights` to fill."""
    return MODELS[config.architecture](config, ops, max_model_len, device, dtype)
