"""From what the user said to what the engine does: finds the model, the device and the defaults that depend on them.

Runs once, in the launcher, without torch: whether there is a GPU is asked of the driver.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Literal

from protocol.address import default_address
from protocol.config import EngineConfig, EngineOptions
from protocol.errors import ConfigError
from protocol.model_config import load_model_config

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What the engine reads of a hub repository.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_FLASH_ATTN_BLOCK_SIZE = 256
_DEFAULT_BLOCK_SIZE = 16


def resolve(options: EngineOptions, run_directory: Path) -> EngineConfig:
    """Every choice taken.

    Raises:
        ConfigError: the model cannot be found or served, or an option does not go with the others.
    """
    model_path, model_name = _find_model(options.model)
    model_config = load_model_config(model_path)
    device = _choose_device(options.device)
    backend = options.attention_backend
    if backend == "auto":
        backend = "triton" if device == "cuda" else "torch"
    elif backend != "torch" and device == "cpu":
        raise ConfigError(f"--attention-backend {backend} needs a GPU; use torch on a CPU")
    block_size = options.block_size or (_FLASH_ATTN_BLOCK_SIZE if backend == "flash_attn" else _DEFAULT_BLOCK_SIZE)
    if backend == "flash_attn" and block_size % _FLASH_ATTN_BLOCK_SIZE:
        raise ConfigError(
            f"--block-size must be a multiple of {_FLASH_ATTN_BLOCK_SIZE} with flash_attn, got {block_size}"
        )
    if options.profile_dir is not None and device == "cpu":
        raise ConfigError("--profile-dir records the GPU's work and needs a GPU")
    max_model_len = options.max_model_len or model_config.max_position_embeddings
    if max_model_len > model_config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {model_config.max_position_embeddings} positions"
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else _model_dtype(model_config.dtype)
    if backend == "flash_attn" and dtype == "float32":
        raise ConfigError("--attention-backend flash_attn needs --dtype float16 or bfloat16, got float32")
    return EngineConfig(
        options=options,
        model_config=model_config,
        model_path=str(model_path),
        model_name=options.served_model_name or model_name,
        device=device,
        dtype=dtype,
        attention_backend=backend,
        block_size=block_size,
        max_model_len=max_model_len,
        address=options.ipc or default_address(),
        run_directory=str(run_directory),
    )


def _find_model(model: str | None) -> tuple[Path, str]:
    """The model's directory and the name it is served under."""
    if model is None:
        from bundled import MODEL_DIR

        return MODEL_DIR, MODEL_DIR.name
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve(), path.resolve().name
    if _HUB_ID.fullmatch(model):
        return _download(model), model
    raise ConfigError(f"--model {model}: no such directory, and not a hub id such as Qwen/Qwen3-0.6B")


def _download(hub_id: str) -> Path:
    """The hub repository's local copy, completed with a progress bar; without a network, the copy as it is."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--model {hub_id}: no such directory, and it cannot be downloaded ({reason}). Where there is a network, "
            f"run `hf download {hub_id} --local-dir DIR`, and start with --model DIR"
        ) from error


def _choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if wanted != "auto":
        return wanted
    return "cuda" if _num_gpus() else "cpu"


def _num_gpus() -> int:
    """GPUs that the NVIDIA driver offers this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _model_dtype(name: str) -> Literal["float32", "float16", "bfloat16"]:
    if name == "float32":
        return "float32"
    return "float16" if name == "float16" else "bfloat16"
