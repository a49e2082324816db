"""Options: flags and keyword arguments are one thing, and bad ones are named."""

import json
from pathlib import Path

import pytest

from protocol.config import EngineConfig, EngineOptions, make_options, option_flags, parse_arguments, parse_size
from protocol.errors import ConfigError
from protocol.model_config import load_model_config
from protocol.resolve import resolve

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}


def write_model(directory: Path, **changes: object) -> Path:
    (directory / "config.json").write_text(json.dumps(TINY | changes))
    return directory


def test_flags_and_keyword_arguments_say_the_same() -> None:
    values = {"port": 0, "max_num_seqs": 8, "enforce_eager": True, "async_scheduling": False, "dtype": "float32"}
    assert parse_arguments(option_flags(values)) == make_options(values)


def test_defaults_are_the_struct_s() -> None:
    assert parse_arguments([]) == EngineOptions()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70000}, "--port"),
        ({"port": "http"}, "--port"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ({"device": "tpu"}, "--device"),
        ({"dtype": "int4"}, "--dtype"),
        ({"block_size": 24}, "power of two"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 16}, "--max-num-batched-tokens"),
        ({"max_step_ms": -1}, "--max-step-ms"),
        ({"max_step_ms": float("nan")}, "--max-step-ms"),
        ({"profile_steps": "9-3"}, "--profile-steps"),
        ({"kv_cache_memory": "lots"}, "--kv-cache-memory"),
        ({"max_waiting": -1}, "--max-waiting"),
        ({"max_waiting_bytes": "lots"}, "--max-waiting-bytes"),
        ({"max_stream_buffer": "1KiB"}, "--max-stream-buffer must be at least 64KiB"),
        ({"max_client_share": 0}, "--max-client-share"),
        ({"request_timeout": -1}, "--request-timeout"),
        ({"api_key": "a b"}, "--api-key"),
        ({"api_key": [""]}, "--api-key"),
        ({"api_key": 5}, "--api-key"),
        ({"allowed_origins": "example.com"}, "--allowed-origins.*'example.com'"),
        ({"allowed_origins": ["https://example.com/"]}, "--allowed-origins"),
        ({"allowed_methods": ["GET POST"]}, "--allowed-methods.*'GET POST'"),
        ({"allowed_headers": ["X:"]}, "--allowed-headers.*'X:'"),
        ({"log_level": "loud"}, "--log-level"),
        ({"log_format": "xml"}, "--log-format"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_bad_option_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_options(values)


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--api-key", "a"], ("a",)),
        (["--api-key", "a", "b"], ("a", "b")),
        (["--api-key", "a", "--api-key", "b"], ("a", "b")),
        (["--api-key", '["a", "b"]'], ("a", "b")),
        (["--api-key", "[a]"], ("[a]",)),
        (["--api-key=-a"], ("-a",)),
        ([], ("c", "d")),
    ],
)
def test_lists_are_words_or_json_and_keys_come_from_the_environment_too(flags: list[str], keys: tuple[str]) -> None:
    assert parse_arguments(flags, {"MINI_VLLM_API_KEY": "c,d"}).api_key == keys


def test_an_empty_list_is_not_the_default() -> None:
    flags = option_flags({"allowed_origins": []})
    assert parse_arguments(flags).allowed_origins == ()
    assert parse_arguments([], {"MINI_VLLM_API_KEY": ""}).api_key == ()


@pytest.mark.parametrize("key", ["hush hush", "hush,hush", "húsh"])
def test_no_error_shows_a_key(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_options({"api_key": [key]})
    assert key not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        make_options({"api_key": {key: 1}})
    assert key not in str(caught.value)


def test_the_configuration_file_is_its_owners(tmp_path: Path) -> None:
    options = make_options({"model": str(write_model(tmp_path)), "device": "cpu", "api_key": "hush"})
    file = tmp_path / "saved.json"
    resolve(options, tmp_path).save(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert EngineConfig.load(file).options.api_key == ("hush",)


def test_an_unknown_flag_exits_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--no-such-flag"])
    assert caught.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 << 20), ("4GiB", 4 << 30), ("1.5KB", 1500), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1GiB", "0", "1e999GiB", "4 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        parse_size(text)


def test_model_config_reads_both_forms_of_the_rope_base(tmp_path: Path) -> None:
    assert load_model_config(write_model(tmp_path)).rope_theta == 5e5
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert load_model_config(write_model(tmp_path, **newer)).rope_theta == 1e6


def test_generation_config_decides_the_end_of_sequence(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert load_model_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_model_config(tmp_path).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "bert"}, "bert"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_config(write_model(tmp_path, **changes))


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model directory"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model_config(tmp_path)


def test_resolved_choices_survive_the_file(tmp_path: Path) -> None:
    config = resolve(make_options({"model": str(write_model(tmp_path)), "device": "cpu"}), tmp_path)
    assert (config.attention_backend, config.dtype, config.block_size) == ("torch", "float32", 16)
    config.save(tmp_path / "engine.json")
    assert EngineConfig.load(tmp_path / "engine.json") == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/model"}, "no such directory"),
        ({"model": "not a model"}, "not a hub id"),
        ({"max_model_len": 1000}, "--max-model-len"),
        ({"attention_backend": "triton", "device": "cpu"}, "needs a GPU"),
        ({"attention_backend": "flash_attn", "device": "cuda", "block_size": 16}, "multiple of 256"),
        ({"attention_backend": "flash_attn", "device": "cuda", "dtype": "float32"}, "float16 or bfloat16"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(make_options({"model": str(write_model(tmp_path)), **options}), tmp_path)
