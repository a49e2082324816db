"""How many KV-cache blocks fit, and the tensor that holds them."""

from __future__ import annotations

import logging

import torch

from protocol.config import EngineConfig, parse_size
from protocol.errors import ConfigError

logger = logging.getLogger(__name__)


def allocate_kv_cache(config: EngineConfig, num_blocks: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], keys then values, zeroed.

    Zeros, since the null block is read by padding rows of some kernels and must be finite.
    """
    model = config.model_config
    shape = (model.num_layers, 2, num_blocks, config.block_size, model.num_kv_heads, model.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def block_bytes(config: EngineConfig, dtype: torch.dtype) -> int:
    return config.block_size * config.model_config.kv_bytes_per_token(dtype.itemsize)


def num_blocks_on_cpu(config: EngineConfig, dtype: torch.dtype) -> int:
    """Blocks, with the null block, that `--kv-cache-memory` pays for; no more than all sequences could fill."""
    if config.options.num_gpu_blocks_override is not None:
        return config.options.num_gpu_blocks_override + 1
    affordable = parse_size(config.options.kv_cache_memory) // block_bytes(config, dtype)
    useful = config.options.max_num_seqs * -(-config.max_model_len // config.block_size)
    return min(affordable, useful) + 1


def num_blocks_on_gpu(config: EngineConfig, dtype: torch.dtype, peak_bytes: int) -> int:
    """Blocks, with the null block, that fit beside everything else.

    Args:
        peak_bytes: most memory in use on the device, by anyone, while the largest step ran.

    Raises:
        ConfigError: nothing is left for the cache.
    """
    if config.options.num_gpu_blocks_override is not None:
        return config.options.num_gpu_blocks_override + 1
    total = torch.cuda.mem_get_info()[1]
    allowed = int(total * config.options.gpu_memory_utilization)
    num_blocks = (allowed - peak_bytes) // block_bytes(config, dtype)
    if num_blocks < 2:
        raise ConfigError(
            f"no GPU memory is left for the KV cache: --gpu-memory-utilization "
            f"{config.options.gpu_memory_utilization} allows {allowed / 2**30:.1f} GiB and the model needs "
            f"{peak_bytes / 2**30:.1f} GiB; raise it, or lower --max-num-batched-tokens or --max-num-seqs"
        )
    return num_blocks


def bounded_model_len(config: EngineConfig, num_blocks: int) -> int:
    """The context length that one sequence can really have, given the pool.

    Raises:
        ConfigError: the user asked for more than fits.
    """
    capacity = (num_blocks - 1) * config.block_size
    if capacity < 1:
        raise ConfigError(
            f"--kv-cache-memory {config.options.kv_cache_memory} does not hold one block of {config.block_size} "
            "tokens; raise it, or lower --block-size"
        )
    if config.max_model_len <= capacity:
        return config.max_model_len
    if config.options.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} does not fit in the KV cache of {capacity} tokens; "
            "lower it, or give the cache more memory (--gpu-memory-utilization, --kv-cache-memory)"
        )
    logger.warning("context length bounded to %d tokens, which is what the KV cache holds", capacity)
    return capacity
