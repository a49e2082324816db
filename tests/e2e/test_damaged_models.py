"""A model whose files are damaged: it is refused by the file's name, or its requests fail, and the engine lives on."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bundled import MODEL_DIR
from frontend import Client, SamplingParams
from frontend.generation_config import load_sampling_defaults
from frontend.tokenizer import Tokenizer
from protocol.errors import ConfigError, RequestFailedError
from protocol.model_config import load_model_config
from tests.e2e.conftest import RunningEngine
from tests.support.models import make_random_model
from worker.kernels import select
from worker.models import create_model
from worker.weights import load_weights

# The one token whose embedding is no number.
BAD_TOKEN = 7
GOOD = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    model = make_random_model(tmp_path_factory.mktemp("damaged"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD_TOKEN, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    directory = tmp_path_factory.mktemp("engine")
    directory.chmod(0o700)
    flags = ("--port", "0", "--model", str(model), "--skip-tokenizer-init")
    running = RunningEngine(directory, *flags).wait_until_ready()
    yield running
    running.stop_at_any_cost()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers_are_a_failure_and_no_token(
    engine: RunningEngine, temperature: float, stream: bool
) -> None:
    body = {"prompt": [*range(20, 60), BAD_TOKEN], "temperature": temperature, "stream": stream}
    response = engine.http.post("/v1/completions", json=body)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "not a number (NaN)" in error["message"]


def test_other_requests_beside_it_are_served_and_its_blocks_are_freed_and_not_cached(engine: RunningEngine) -> None:
    good, bad = list(range(100, 150)), [*range(200, 250), BAD_TOKEN, *range(250, 300)]
    with Client(engine.address) as client:
        (alone,) = client.generate([good], GOOD)
        before = client.stats()
        for _ in range(2):
            bad_body = {"prompt": [bad, good], "max_tokens": 4, "temperature": 0}
            assert engine.http.post("/v1/completions", json=bad_body).status_code == 500
            with pytest.raises(RequestFailedError, match="not a number"):
                client.generate([bad], GOOD)
        # What the failed request has computed, even before the bad token, is not found again.
        (again,) = client.generate([bad[:50]], GOOD)
        assert again.num_cached_tokens == 0
        (after,) = client.generate([good], GOOD)
        assert after.outputs[0].token_ids == alone.outputs[0].token_ids
        stats = client.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks == before.num_free_blocks
    assert engine.http.get("/health").status_code == 200
    assert "Traceback" not in engine.output


# --- files that are refused -----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def _header(data: bytes, change: Callable[[dict], object]) -> bytes:
    """The file with another header, which tells of the same data."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _first(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "cut in the header": lambda data: data[:200],
    "cut in the data": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\x00",
    "no json": lambda data: data[:8] + b"\xff" * 64 + data[72:],
    "header of 2^64 bytes": lambda data: b"\xff" * 8 + data[8:],
    "header of 2^40 bytes": lambda data: struct.pack("<Q", 2**40) + data[8:],
    "header of nothing": lambda data: struct.pack("<Q", 0) + data[8:],
    "another type": lambda data: _header(data, lambda header: _first(header).update(dtype="F64")),
    "unknown type": lambda data: _header(data, lambda header: _first(header).update(dtype="X9")),
    "another shape": lambda data: _header(data, lambda header: _first(header)["shape"].append(2)),
    "negative shape": lambda data: _header(data, lambda header: _first(header).update(shape=[-1, 4])),
    "offsets past the end": lambda data: _header(data, lambda header: _first(header)["data_offsets"].append(2**60)),
    "deep header": lambda data: struct.pack("<Q", 20_000) + b"[" * 20_000 + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weights_file_is_refused_by_name(model: Path, damage: str) -> None:
    file = model / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    config = load_model_config(model)
    layout = create_model(config, select("cpu"), 64, torch.device("cpu"), torch.float32).checkpoint_layout()
    with pytest.raises(ConfigError, match=r"model/model\.safetensors"):
        load_weights(layout, model, lambda: None)


NOT_JSON = {"empty": b"", "cut": b'{"a": ', "bytes": b"\xff\xfe\x00", "a list": b"[]", "deep": b'{"a":' * 100_000}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_damaged_json_files_are_refused_by_name(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model/config\.json"):
        load_model_config(model)
    (model / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model/generation_config\.json"):
        load_sampling_defaults(model)
    (model / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model/tokenizer_config\.json"):
        Tokenizer.load(model, model / "tokenizer.json", 2048)
    (model / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model/tokenizer\.json"):
        Tokenizer.load(model, model / "tokenizer.json", 2048)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "8"},
        {"num_key_value_heads": 0},
        {"hidden_size": None},
        {"hidden_size": -64},
        {"hidden_size": [64]},
        {"vocab_size": 0},
        {"num_hidden_layers": 1.5},
        {"architectures": [["Qwen3ForCausalLM"]]},
        {"architectures": "Qwen3ForCausalLM"},
        {"architectures": {}},
        {"rope_parameters": [1]},
        {"rope_parameters": "a"},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": "a"},
    ],
    ids=str,
)
def test_a_config_of_wrong_values_is_refused_by_name(model: Path, change: dict) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=r"/model"):
        load_model_config(model)


@pytest.mark.parametrize("eos", ["a", [1.5], {"a": 1}, [[1]], -1], ids=str)
def test_end_of_sequence_ids_that_are_none_are_refused_by_name(model: Path, eos: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match=r"/model"):
        load_model_config(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"a": {}}},
        {"added_tokens_decoder": ["a"]},
        {"added_tokens_decoder": {"999999": {}}},
        {"chat_template": 5},
        {"chat_template": [{"a": 1}]},
        {"chat_template": "{% for %}"},
        {"chat_template": "{{ " + "(" * 100_000},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_tokenizer_settings_of_wrong_values_are_refused_by_name(model: Path, settings: dict) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json|chat template"):
        Tokenizer.load(model, model / "tokenizer.json", 2048)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_engine_says_which_file_is_damaged_and_exits(
    model: Path, name: str, start_engine: Callable[..., RunningEngine]
) -> None:
    file = model / name
    file.write_bytes(file.read_bytes()[:5000])
    engine = start_engine("--port", "0", "--model", str(model))
    assert engine.wait() in (1, 2)
    (error,) = [line for line in engine.output.splitlines() if line.startswith("error: ")]
    assert str(file) in error
    assert "Traceback" not in engine.output
