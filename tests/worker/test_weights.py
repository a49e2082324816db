"""Weights load from every form of checkpoint, straight into place, and what does not match is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import ConfigError
from protocol.model_config import load_model_config
from tests.support.models import make_random_model
from worker.kernels import select
from worker.models import create_model
from worker.weights import load_weights, randomize_weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_random_model(tmp_path, num_hidden_layers=2)


def make_layout(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = create_model(load_model_config(directory), select("cpu"), 64, torch.device("cpu"), dtype)
    layout = model.checkpoint_layout()
    for tensor in layout.values():
        tensor.fill_(float("nan"))
    return layout


def load(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    layout = make_layout(directory, dtype)
    load_weights(layout, directory, lambda: None)
    return layout


def edit(directory: Path, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors")


def test_every_tensor_arrives(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    loaded = load(checkpoint)
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize("stored_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_type_is_converted(checkpoint: Path, stored_dtype: torch.dtype) -> None:
    edit(checkpoint, lambda tensors: tensors.update({name: t.to(stored_dtype) for name, t in tensors.items()}))
    loaded = load(checkpoint, torch.bfloat16)
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(loaded[name], stored[name].to(torch.bfloat16)) for name in stored)


def test_sharded_files_are_read_by_their_index(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for part, chosen in enumerate((names[:7], names[7:]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in chosen}, checkpoint / file)
        weight_map |= dict.fromkeys(chosen, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load(checkpoint)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00002"):
        load(checkpoint)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(checkpoint)


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}))
    with pytest.raises(ConfigError, match=r"q_proj\.bias"):
        load(checkpoint)


def test_a_tensor_of_another_shape_is_named(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(4)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[4\]"):
        load(checkpoint)


def test_a_damaged_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


def test_a_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--load-format dummy"):
        load(checkpoint)


def test_dummy_weights_are_the_same_each_time(checkpoint: Path) -> None:
    first, second = make_layout(checkpoint), make_layout(checkpoint)
    randomize_weights(first, lambda: None)
    randomize_weights(second, lambda: None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in first.values())
