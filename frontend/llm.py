"""An engine of one's own: starts the processes, talks to them, and stops them when it is closed.

For programs that want answers and no server. The engine ends with the program, however that ends.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from frontend.client import Client
from frontend.client_request import Conversation, PromptInput
from frontend.outputs import RequestOutput, StreamChunk
from protocol.address import is_engine_running
from protocol.config import API_KEY_VARIABLE, make_options, option_flags
from protocol.errors import ConfigError, EngineUnavailableError
from protocol.messages import Stats
from protocol.process import LIFELINE_VARIABLE
from protocol.sampling import SamplingParams

_STOP_SECONDS = 30.0
# A large model from a slow disk takes minutes; an engine that fails says so long before.
_START_SECONDS = 3600.0


class LLM:
    """An engine and a client to it.

    Args:
        model: model directory or hub id; None takes the bundled model.
        options: the launcher's flags with underscores, such as `max_num_seqs=64` or `enforce_eager=True`. HTTP is off
            unless `http=True`.

    Raises:
        ConfigError: an option is bad, or the engine cannot start with them; the message says why.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        values: dict[str, Any] = {"http": False, **options}
        if model is not None:
            values["model"] = str(model)
        make_options(values)
        self._own_directory: Path | None = None
        if values.get("ipc") is None:
            # The launcher makes the directory, and removes it even when this program is killed.
            self._own_directory = Path(tempfile.gettempdir()) / f"mini-vllm-llm-{secrets.token_hex(6)}"
            values["ipc"] = f"ipc://{self._own_directory}/engine.sock"
        self._client: Client | None = None
        # Not among the flags: a command line is seen by every user of the machine.
        keys = values.pop("api_key", ())
        environment = {API_KEY_VARIABLE: keys if isinstance(keys, str) else ",".join(keys)} if keys else {}
        self._process, self._lifeline = _start_launcher(option_flags(values), environment)
        self._errors = _ErrorOutput(self._process)
        # Holds this object weakly, so that an LLM that is dropped is collected, and stopped by that.
        reference = weakref.ref(self)
        self._at_exit = lambda: _close_if_alive(reference)
        atexit.register(self._at_exit)
        try:
            self._client = self._connect(str(values["ipc"]))
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str) -> Client:
        """Waits until the engine is ready or has given up."""
        while True:
            try:
                # Fails at once while the launcher has not taken the address, and when it has ended.
                return Client(address, timeout=_START_SECONDS)
            except EngineUnavailableError as error:
                try:
                    # Where it has ended, or is about to, it has said why.
                    code = self._process.wait(0.1 if not is_engine_running(address) else _STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
                raise ConfigError(self._errors.last_error() or f"{error} (exit code {code})") from None

    @property
    def client(self) -> Client:
        if self._client is None:
            raise EngineUnavailableError("this LLM was closed")
        return self._client

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """See `AsyncClient.generate`."""
        return self.client.generate(prompts, sampling_params, use_tqdm, **options)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """See `AsyncClient.chat`."""
        return self.client.chat(messages, sampling_params, use_tqdm, tools=tools, **options)

    def stream(
        self, prompt: PromptInput | Conversation, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[StreamChunk]:
        """See `AsyncClient.stream`."""
        return self.client.stream(prompt, sampling_params, **options)

    def stats(self) -> Stats:
        """The engine's counters."""
        return self.client.stats()

    def close(self) -> None:
        """Stops the engine's processes and waits until they are gone. May be called again."""
        atexit.unregister(self._at_exit)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._errors.close()
        if self._own_directory is not None:
            shutil.rmtree(self._own_directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # Absent if __init__ raised before there was anything to close.
        if not hasattr(self, "_at_exit"):
            return
        if self._errors.is_own_thread or (self._client is not None and self._client.is_own_thread):
            # The collector came by in a thread that ends only when it is waited for by another one.
            threading.Thread(target=self.close, name="mini-vllm close").start()
        else:
            self.close()


def _close_if_alive(reference: weakref.ref[LLM]) -> None:
    llm = reference()
    if llm is not None:
        llm.close()


def _start_launcher(flags: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """The launcher's process, and the end of the lifeline that this program holds."""
    launcher = find_spec("launch")
    path = Path(__file__).resolve().parents[1] / "launch.py"
    if launcher is not None and launcher.origin is not None and not path.exists():
        path = Path(launcher.origin)
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, str(path), *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[read_end],
            env={**os.environ, **environment, LIFELINE_VARIABLE: str(read_end)},
            # Ctrl-C is this program's: it stops the engine when it ends.
            start_new_session=True,
        )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return process, write_end


def _launchers_error(line: str) -> str | None:
    """What a line says that went wrong, if it is one in which the launcher says that, as text or as JSON."""
    if line.startswith("error: "):
        return line.removeprefix("error: ").strip()
    try:
        record = json.loads(line)
        is_error = record["process"] == "launcher" and record["level"] == "error"
        return str(record["message"]) if is_error else None
    except (ValueError, TypeError, KeyError):
        return None


class _ErrorOutput:
    """Passes on what the launcher writes to standard error (its progress), and remembers what it said was wrong."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._stream = process.stderr
        self._error: str | None = None
        self._thread = threading.Thread(target=self._read, name="mini-vllm launcher output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for raw in self._stream:
            line = raw.decode(errors="replace")
            error = _launchers_error(line)
            if error is not None:
                self._error = error
            else:
                print(line, end="", file=sys.stderr, flush=True)

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def last_error(self) -> str | None:
        """The launcher's last error. Call when it has ended."""
        self._thread.join(5.0)
        return self._error

    def close(self) -> None:
        self._thread.join(5.0)
        self._stream.close()
