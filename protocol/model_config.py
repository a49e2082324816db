"""The architecture of a model, read from the `config.json` of a Hugging Face directory.

Reads JSON only. Whoever loads weights or tokenizes gets these numbers from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from protocol.errors import ConfigError

Size = Annotated[int, Meta(ge=1)]

SUPPORTED_ARCHITECTURES = ("Qwen3ForCausalLM",)


class ModelConfig(msgspec.Struct, frozen=True):
    """Shape and constants of a decoder-only transformer."""

    architecture: str
    hidden_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[Annotated[int, Meta(ge=0)], ...]

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token holds in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def load_model_config(directory: Path) -> ModelConfig:
    """Reads and checks a model directory's configuration.

    Raises:
        ConfigError: the directory is no model, or its architecture or one of its features is not supported.
    """
    if not directory.is_dir():
        raise ConfigError(f"model path {directory} is not a directory")
    config = _read_json(directory / "config.json")
    architectures = config.get("architectures") or [config.get("model_type", "none")]
    if not isinstance(architectures, list):
        raise ConfigError(f"{directory / 'config.json'}: architectures must be a list, got {architectures!r}")
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"{directory}: architecture {architectures[0]!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _refuse_unsupported_features(directory, config)

    def get(name: str, default: Any = None) -> Any:
        value = config.get(name, default)
        if value is None:
            raise ConfigError(f"{directory / 'config.json'}: {name} is missing")
        return value

    hidden_size, num_heads = get("hidden_size"), get("num_attention_heads")
    for name, value in (("hidden_size", hidden_size), ("num_attention_heads", num_heads)):
        # The two that are computed with before they are checked.
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{directory / 'config.json'}: {name} must be a positive integer, got {value!r}")
    values = {
        "architecture": architectures[0],
        "hidden_size": hidden_size,
        "num_layers": get("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": get("num_key_value_heads", num_heads),
        "head_dim": get("head_dim", hidden_size // num_heads),
        "intermediate_size": get("intermediate_size"),
        "vocab_size": get("vocab_size"),
        "max_position_embeddings": get("max_position_embeddings"),
        "rms_norm_eps": get("rms_norm_eps", 1e-6),
        "rope_theta": _rope_parameters(config).get("rope_theta") or get("rope_theta", 10000.0),
        "tie_word_embeddings": get("tie_word_embeddings", False),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "eos_token_ids": _eos_token_ids(directory, config),
    }
    try:
        model = msgspec.convert(values, ModelConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from error
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"{directory}: num_attention_heads ({model.num_heads}) must be a multiple of "
            f"num_key_value_heads ({model.num_kv_heads})"
        )
    return model


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, which hold the base too; transformers 4 writes rope_scaling beside it.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported_features(directory: Path, config: dict[str, Any]) -> None:
    rope = _rope_parameters(config)
    if not isinstance(rope, dict):
        raise ConfigError(f"{directory / 'config.json'}: the parameters of RoPE must be an object, got {rope!r}")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    unsupported = {
        "rope_scaling": rope_type if rope_type != "default" else None,
        "attention_bias": config.get("attention_bias") or None,
        "use_sliding_window": config.get("use_sliding_window") or None,
        "hidden_act": config.get("hidden_act", "silu") if config.get("hidden_act", "silu") != "silu" else None,
        "quantization_config": "present" if config.get("quantization_config") else None,
    }
    for name, value in unsupported.items():
        if value is not None:
            raise ConfigError(f"{directory / 'config.json'}: {name} = {value!r} is not supported")


def _eos_token_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json is what generation is meant to use; config.json comes second."""
    value = None
    if (directory / "generation_config.json").is_file():
        value = _read_json(directory / "generation_config.json").get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data
