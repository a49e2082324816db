"""The engine's options: one frozen struct, from which the launcher's flags and `LLM`'s keyword arguments are both made.

Options carry vLLM's names where they mean the same. They are parsed once, by the launcher, written to the engine's
private directory, and read by each process from there; nothing deeper reads flags or the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from protocol.errors import ConfigError
from protocol.logs import LogFormat, LogLevel
from protocol.model_config import ModelConfig

PositiveInt = Annotated[int, Meta(ge=1)]

# Read by the launcher beside its flags, since a command line is seen by every user of the machine.
API_KEY_VARIABLE = "MINI_VLLM_API_KEY"
# Python clients say what they have taken when it has become a quarter of this.
MIN_STREAM_BUFFER = 64 * 1024
# Options whose value no message may show.
_SECRETS = ("api_key",)


def _option(default: Any, help: str) -> Any:
    """A field whose help text is kept for the flag that is made from it."""
    _HELP.append(help)
    return default


_HELP: list[str] = []


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a user can set when starting an engine. `launch.py --help` and the README list the same texts."""

    model: str | None = _option(None, "model directory or hub id; default: the bundled tiny model")
    served_model_name: str | None = _option(None, "model name in the API; default: the model's directory name or id")
    host: str = _option("127.0.0.1", "address of the HTTP server")
    port: Annotated[int, Meta(ge=0, le=65535)] = _option(8000, "port of the HTTP server; 0 takes a free one")
    http: bool = _option(True, "serve HTTP beside IPC")
    ipc: str | None = _option(None, "ZeroMQ endpoint for Python clients, ipc:///…/engine.sock; default: per user")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "where the model runs; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _option(
        "auto", "type of weights and activations; auto is the model's own on a GPU and float32 on a CPU"
    )
    load_format: Literal["auto", "dummy"] = _option("auto", "auto reads safetensors; dummy makes random weights")
    skip_tokenizer_init: bool = _option(False, "serve without a tokenizer: token ids in and out")
    reasoning_parser: Literal["auto", "none", "qwen3"] = _option(
        "auto", "how thoughts in an answer are told from it; auto is what the chat template shows"
    )
    tool_call_parser: Literal["auto", "none", "hermes"] = _option(
        "auto",
        "how function calls are found in an answer; hermes is Qwen3's form; auto is what the chat template shows",
    )
    max_model_len: Annotated[int, Meta(ge=2)] | None = _option(
        None, "longest sequence, prompt and answer; default: the model's, bounded by the cache"
    )
    max_num_seqs: PositiveInt = _option(256, "most sequences running at once")
    max_client_share: Annotated[float, Meta(gt=0, le=1)] = _option(
        0.5, "share of the KV cache from which on a client is passed over while others wait for blocks; 1: no cap"
    )
    max_num_batched_tokens: PositiveInt = _option(
        8192, "token budget of a step; longer prompts are prefilled in chunks"
    )
    max_step_ms: Annotated[float, Meta(ge=0)] = _option(
        6.0, "milliseconds that a step with prefill may take while other requests generate; 0: no bound"
    )
    block_size: PositiveInt | None = _option(
        None, "tokens in a KV-cache block, a power of two; default: 16, or 256 with flash_attn"
    )
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = _option(0.9, "share of GPU memory the engine may use")
    kv_cache_memory: str = _option("1GiB", "size of the KV cache on a CPU, such as 512MiB or 4GiB")
    num_gpu_blocks_override: PositiveInt | None = _option(None, "number of KV-cache blocks, instead of measuring")
    enable_prefix_caching: bool = _option(True, "reuse the KV blocks of equal prompt beginnings")
    async_scheduling: bool = _option(True, "keep two steps in flight")
    attention_backend: Literal["auto", "torch", "triton", "flash_attn"] = _option(
        "auto", "auto is triton on a GPU and torch on a CPU"
    )
    enforce_eager: bool = _option(False, "run without CUDA graphs")
    num_threads: PositiveInt | None = _option(None, "threads of the worker on a CPU; default: the CPUs it may use")
    max_waiting: Annotated[int, Meta(ge=0)] = _option(
        4096, "most requests that wait for their first token; more are answered 429; 0: no limit"
    )
    max_waiting_tokens: Annotated[int, Meta(ge=0)] = _option(
        8388608, "most prompt tokens of requests that wait; 0: no limit"
    )
    max_waiting_bytes: str = _option(
        "256MiB", "most bytes of bodies being read and prompts not tokenized yet, such as 64MiB; 0: no limit"
    )
    max_stream_buffer: str = _option(
        "4MiB", "most bytes that a stream's client may leave unread before its request is aborted, such as 512KiB"
    )
    request_timeout: Annotated[float, Meta(ge=0)] = _option(
        0.0, "seconds in which a request must be finished that has no timeout of its own; 0: any time"
    )
    shutdown_timeout: Annotated[float, Meta(ge=0)] = _option(
        5.0, "seconds that running requests get to finish when the engine is stopped"
    )
    step_timeout: Annotated[float, Meta(gt=0)] | None = _option(
        None, "seconds after which a worker or core that does not answer is killed; default: 60, on a CPU 600"
    )
    give_up_after: PositiveInt = _option(
        3, "deaths of the worker or the core, within --give-up-window, at which the engine gives up"
    )
    give_up_window: Annotated[float, Meta(gt=0)] = _option(60.0, "seconds in which deaths are counted")
    profile_dir: str | None = _option(
        None, "record a profiler trace of some steps of the GPU worker into this directory"
    )
    profile_steps: str = _option("100-200", "the steps to record, counted from the first")
    api_key: tuple[str, ...] = _option(
        (), "keys of which /v1 asks for one; default: those in MINI_VLLM_API_KEY, separated by commas"
    )
    allowed_origins: tuple[str, ...] = _option(("*",), "origins whose web pages may use the HTTP API")
    allowed_methods: tuple[str, ...] = _option(("*",), "HTTP methods that such pages may use")
    allowed_headers: tuple[str, ...] = _option(("*",), "HTTP headers that such pages may send")
    allow_credentials: bool = _option(False, "let such pages send cookies and the like")
    access_log: bool = _option(False, "log a line for each HTTP request")
    max_body_size: str = _option("32MiB", "longest body of an HTTP request")
    receive_timeout: Annotated[float, Meta(gt=0)] = _option(
        30.0,
        "seconds in which an HTTP request must have come, or 256 KiB of its answer be read; else it is cut off",
    )
    log_level: LogLevel = _option("info", "least severe records that are logged")
    log_format: LogFormat = _option("text", "log lines for people or, as json, for programs")


_HELP_BY_FIELD = dict(zip(EngineOptions.__struct_fields__, _HELP, strict=True))
_LISTS = {name for name, hint in get_type_hints(EngineOptions).items() if get_origin(hint) is tuple}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher made of the options: every choice taken, every path resolved. Each process reads it."""

    options: EngineOptions
    model_config: ModelConfig
    model_path: str
    model_name: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float16", "bfloat16"]
    attention_backend: Literal["torch", "triton", "flash_attn"]
    block_size: int
    max_model_len: int
    address: str
    run_directory: str
    epoch: int = 0  # which start of a process this configuration is for, counted over all of the engine's

    def core_address(self, epoch: int) -> str:
        """Where the core of an epoch serves frontends."""
        return f"ipc://{self.run_directory}/core-{epoch}"

    def worker_address(self, epoch: int) -> str:
        """Where core and worker meet in an epoch."""
        return f"ipc://{self.run_directory}/worker-{epoch}"

    def control_address(self, process: str) -> str:
        """Where a process listens to the launcher."""
        return f"ipc://{self.run_directory}/to-{process}-{self.epoch}"

    @property
    def launcher_address(self) -> str:
        return f"ipc://{self.run_directory}/launcher.sock"

    @property
    def step_timeout(self) -> float:
        """Seconds. A step of a large model takes a CPU minutes."""
        return self.options.step_timeout or (60.0 if self.device == "cuda" else 600.0)

    def save(self, path: Path) -> None:
        # It holds the API keys.
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(self))

    @staticmethod
    def load(path: Path) -> EngineConfig:
        return msgspec.json.decode(path.read_bytes(), type=EngineConfig)


def make_options(values: Mapping[str, Any]) -> EngineOptions:
    """Options from keyword arguments.

    Raises:
        ConfigError: an option does not exist or has a bad value; the error names it as a flag.
    """
    unknown = sorted(set(values) - set(EngineOptions.__struct_fields__))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; options: {', '.join(EngineOptions.__struct_fields__)}")
    values = {name: [value] if name in _LISTS and isinstance(value, str) else value for name, value in values.items()}
    for name, value in values.items():
        try:
            msgspec.convert({name: value}, EngineOptions)
        except msgspec.ValidationError as error:
            shown = "" if name in _SECRETS else f" (got {value!r})"
            raise ConfigError(f"{_flag(name)}: {str(error).split(' - at')[0]}{shown}") from error
    options = msgspec.convert(values, EngineOptions)
    if options.max_num_batched_tokens < options.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({options.max_num_batched_tokens}) must be at least --max-num-seqs "
            f"({options.max_num_seqs}), since every running sequence computes a token in each step"
        )
    if options.block_size is not None and options.block_size & (options.block_size - 1):
        raise ConfigError(f"--block-size must be a power of two, got {options.block_size}")
    parse_size(options.kv_cache_memory)
    parse_size(options.max_waiting_bytes, "--max-waiting-bytes", zero_is_none=True)
    if parse_size(options.max_stream_buffer, "--max-stream-buffer") < MIN_STREAM_BUFFER:
        raise ConfigError(f"--max-stream-buffer must be at least 64KiB, got {options.max_stream_buffer}")
    parse_size(options.max_body_size, "--max-body-size")
    parse_steps(options.profile_steps)
    _check_http_options(options)
    return options


def _check_http_options(options: EngineOptions) -> None:
    for key in options.api_key:
        if re.fullmatch(r"[!-+\--~]+", key) is None:
            raise ConfigError("--api-key: a key must be of printable ASCII characters, without spaces and commas")
    for origin in options.allowed_origins:
        if origin not in ("*", "null") and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin) is None:
            raise ConfigError(
                f"--allowed-origins: an origin is * or a scheme and a host, such as https://example.com, got {origin!r}"
            )
    for name, values in (("allowed_methods", options.allowed_methods), ("allowed_headers", options.allowed_headers)):
        for value in values:
            if re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", value, re.ASCII) is None:
                raise ConfigError(f"{_flag(name)}: {value!r} is not a name that HTTP allows")


def parse_arguments(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> EngineOptions:
    """Options from a command line, and the API keys, if it has none, from the environment.

    Exits with code 2 on an unknown flag, as argparse does.

    Raises:
        ConfigError: a flag has a bad value.
    """
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Serves a Qwen3-family model over an OpenAI-compatible HTTP API and over IPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    hints = get_type_hints(EngineOptions)
    defaults = EngineOptions()
    for name, help_text in _HELP_BY_FIELD.items():
        kind = _scalar_type(hints[name])
        default = getattr(defaults, name)
        shown = help_text if default is None or kind is bool else f"{help_text} (default: {default})"
        if kind is bool:
            shown = f"{help_text} (default: {'on' if default else 'off'})"
            parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=shown)
        elif name in _LISTS:
            shown = help_text if not default else f"{help_text} (default: {' '.join(default)})"
            parser.add_argument(_flag(name), type=_list_items, nargs="+", action="extend", help=shown, metavar="VALUE")
        elif get_origin(kind) is Literal:
            parser.add_argument(_flag(name), choices=get_args(kind), help=shown)
        else:
            parser.add_argument(_flag(name), type=kind, help=shown, metavar=kind.__name__.upper())
    values = vars(parser.parse_args(arguments))
    for name in _LISTS & values.keys():
        values[name] = [item for items in values[name] for item in items]
    if "api_key" not in values and environment.get(API_KEY_VARIABLE):
        values["api_key"] = environment[API_KEY_VARIABLE].split(",")
    return make_options(values)


def _list_items(text: str) -> list[str]:
    """The values in one word of a command line: several as a JSON list, as vLLM writes them, or the word itself."""
    if text.startswith("["):
        try:
            return msgspec.json.decode(text, type=list[str])
        except msgspec.DecodeError:
            pass
    return [text]


def help_rows() -> list[tuple[str, str, str]]:
    """(flag, default, help) of every option, for the table in the README."""
    rows = []
    for name, help_text in _HELP_BY_FIELD.items():
        default = getattr(EngineOptions(), name)
        shown = ("on" if default else "off") if isinstance(default, bool) else f"`{default}`"
        if isinstance(default, tuple):
            shown = f"`{' '.join(default)}`" if default else ""
        shown = "" if default is None else shown
        rows.append((_flag(name), shown, help_text))
    return rows


def option_flags(options: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as these keyword arguments."""
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(_flag(name) if value else _flag(name).replace("--", "--no-", 1))
        elif name in _LISTS:
            flags += [_flag(name), json.dumps([value] if isinstance(value, str) else list(value))]
        elif value is not None:
            flags += [_flag(name), str(value)]
    return flags


def parse_size(text: str, flag: str = "--kv-cache-memory", *, zero_is_none: bool = False) -> int:
    """Bytes of a size such as `512MiB`, `4GiB`, `2GB` or a plain number. 0 is one only where it means no limit.

    Raises:
        ConfigError: the text is no size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{flag} must be a size such as 512MiB or 4GiB, got {text!r}") from None
    if size < 0 or (size == 0 and not zero_is_none):
        raise ConfigError(f"{flag} must be positive, got {text!r}")
    return size


def parse_steps(text: str) -> tuple[int, int]:
    """(first, last) of a range such as `100-200`. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--profile-steps must be a range of steps such as 100-200, got {text!r}")
    return int(match[1]), int(match[2])


def usable_cpus() -> int:
    """CPUs this process may run on, which a container or `taskset` may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _scalar_type(hint: Any) -> Any:
    """The one type that a flag's text is turned into, from an optional or annotated hint."""
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    if get_origin(hint) is Literal or not arguments:
        return hint
    return _scalar_type(arguments[0])
