"""Fills a model's weights from a Hugging Face directory, or at random.

Each tensor is read from its safetensors file straight into the place the model laid out for it: no second copy of the
model is ever made, and a tensor that is missing, left over or of another shape is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from protocol.errors import ConfigError

# Present in some checkpoints, computed or unused here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def load_weights(layout: dict[str, torch.Tensor], directory: Path, on_tensor: Callable[[], None]) -> None:
    """Reads every tensor of `layout` (checkpoint name → destination) from the directory's safetensors files.

    `on_tensor` is called after each tensor. Any float dtype is converted to the destination's.

    Raises:
        ConfigError: no safetensors files, a damaged file, or tensors that do not match the layout.
    """
    missing = set(layout)
    unexpected: list[str] = []
    # A tied head may be stored as well; its destination is the embedding, which is stored too.
    is_tied = "lm_head.weight" not in layout
    for path in _safetensors_files(directory):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name in layout:
                        _copy(tensors.get_tensor(name), layout[name], name, path)
                        if name in missing:
                            missing.discard(name)
                            on_tensor()
                    elif not name.endswith(_IGNORED_SUFFIXES) and not (is_tied and name == "lm_head.weight"):
                        unexpected.append(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error
    if missing:
        raise ConfigError(f"{directory}: weights lack {_some(sorted(missing))}")
    if unexpected:
        raise ConfigError(f"{directory}: weights hold tensors that this model does not have: {_some(unexpected)}")


def _safetensors_files(directory: Path) -> list[Path]:
    """The files of the index, if there is one, else every safetensors file."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is not a safetensors index: {error!r}") from error
        paths = [directory / name for name in names]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise ConfigError(f"{directory}: weight files named by {index.name} are missing: {_some(absent)}")
        return paths
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{directory} has no *.safetensors files; --load-format dummy runs it with random weights")
    return paths


def _copy(tensor: torch.Tensor, destination: torch.Tensor, name: str, path: Path) -> None:
    if tensor.shape != destination.shape:
        raise ConfigError(
            f"{path}: {name} has shape {list(tensor.shape)}, the model's config.json makes it {list(destination.shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise ConfigError(f"{path}: {name} is {tensor.dtype}; quantized weights are not supported")
    destination.copy_(tensor)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def randomize_weights(layout: dict[str, torch.Tensor], on_tensor: Callable[[], None], seed: int = 0) -> None:
    """Random weights of a sane scale, the same for the same seed, shapes and device: for measuring speed.

    `on_tensor` is called after each tensor.
    """
    devices = {tensor.device for tensor in layout.values()}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    for name in sorted(layout):
        tensor = layout[name]
        if tensor.dim() == 1:
            tensor.fill_(1.0)  # the scale of a norm
        else:
            tensor.normal_(0.0, 0.02, generator=generators[tensor.device])
        on_tensor()
