"""A small model directory with a tokenizer of its own, and the frontend process with a fake core behind it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import zmq
from tokenizers import decoders, models, pre_tokenizers, trainers

from protocol.config import EngineConfig, make_options
from protocol.launcher_messages import FromLauncher, ProcessFailed, ProcessLost, ProcessReady, ToLauncher
from protocol.model_config import ModelConfig
from protocol.transport import Channel, open_socket
from tests.frontend.fake_core import BLOCK_SIZE, FakeCore
from tests.frontend.ipc_client import Client

REPOSITORY = Path(__file__).parents[2]
MODEL_NAME = "tiny"
# The model's vocabulary is larger than the tokenizer's, as Qwen3's is.
VOCAB_SIZE = 640
MAX_MODEL_LEN = 512
START_SECONDS = 30

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'forbidden' %}{{ raise_exception('no such role here') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{%- if thinking is defined and not thinking %}{{ '<think></think>' }}{% endif %}"""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Numbers such as 1234567890 and signs !?;:",
    "Größe, naïve café, über Ängste; 日本語のテキスト、そして漢字。 Привет, мир! 🙂🙃👩‍👩‍👧‍👦 → ∑ ∞",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints 3\n",
]


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level vocabulary like Qwen's: 256 bytes, some merges, special and other added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 5, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>", "naïve token Ġ"])
    return tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class Frontend:
    """A frontend process as the launcher would start it, with a fake core."""

    def __init__(self, model: Path, **options: Any) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="frontend-")
        run_directory = Path(self._directory.name)
        self.config = make_config(model, run_directory, **options)
        self.eos = make_tokenizer().token_to_id("<|im_end|>")
        self.core = make_core(self.config)
        self._context = zmq.Context()
        self._reports = Channel(open_socket(self._context, zmq.PULL, bind=self.config.launcher_address), ToLauncher)
        self._control = Channel(
            open_socket(self._context, zmq.PUSH, connect=self.config.control_address("frontend")), None
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: ProcessReady | None = None

    def start(self, wait: bool = True) -> Frontend:
        file = Path(self.config.run_directory) / "config.json"
        self.config.save(file)
        self.core.start()
        command = [sys.executable, "-m", "frontend.server", str(file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=REPOSITORY)
        if wait:
            report = self.report()
            assert isinstance(report, ProcessReady), report
            self.ready = report
        return self

    def report(self) -> ProcessReady | ProcessFailed:
        received = self._reports.receive(START_SECONDS * 1000)
        assert received is not None, "the frontend reported nothing"
        return received[1]

    def tell(self, message: FromLauncher) -> None:
        """Says something to it as the launcher would."""
        assert self._control.send(message)

    def replace_core(self) -> FakeCore:
        """Puts another core in the place of this one, which must have stopped, and tells the frontend."""
        self.core = make_core(self.config, epoch=self.core.epoch + 1)
        self.core.start()
        self.tell(ProcessLost("core", self.core.epoch, "the core was stopped", True))
        return self.core

    @property
    def url(self) -> str:
        assert self.ready is not None
        return str(self.ready.details["http"])

    def terminate(self) -> int:
        """Asks it to stop, waits, and returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            self.process.stdin.close()
        if self.core.is_alive():
            self.core.stop()
        self._control.socket.setsockopt(zmq.LINGER, 0)
        self._control.close()
        self._reports.close()
        self._context.term()
        self._directory.cleanup()


def make_core(config: EngineConfig, epoch: int = 0) -> FakeCore:
    eos = make_tokenizer().token_to_id("<|im_end|>")
    address = config.core_address(epoch)
    return FakeCore(address, epoch=epoch, eos=eos, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


def make_config(model: Path, run_directory: Path, **options: Any) -> EngineConfig:
    options = {"model": str(model), "port": 0, **options}
    shape = ModelConfig(
        "Qwen3ForCausalLM", 64, 2, 4, 2, 16, 128, VOCAB_SIZE, MAX_MODEL_LEN, 1e-6, 1e4, True, "float32", ()
    )
    return EngineConfig(
        options=make_options(options),
        model_config=shape,
        model_path=str(model),
        model_name=MODEL_NAME,
        device="cpu",
        dtype="float32",
        attention_backend="torch",
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        address=f"ipc://{run_directory}/engine.sock",
        run_directory=str(run_directory),
    )


@pytest.fixture
def make_frontend(model_directory: Path) -> Iterator[Callable[..., Frontend]]:
    """Makes frontends that are not started yet, and ends them with the test."""
    made: list[Frontend] = []

    def make(model: Path = model_directory, **options: Any) -> Frontend:
        made.append(Frontend(model, **options))
        return made[-1]

    yield make
    for frontend in made:
        frontend.close()


@pytest.fixture(scope="session")
def shared_frontend(model_directory: Path) -> Iterator[Frontend]:
    frontend = Frontend(model_directory).start()
    yield frontend
    frontend.close()


@pytest.fixture
def frontend(shared_frontend: Frontend) -> Iterator[Frontend]:
    """A running frontend, shared by tests that leave it as they found it."""
    core = shared_frontend.core
    core.added.clear()
    core.aborted.clear()
    yield shared_frontend
    core.failure = core.fail_after = None
    core.step_seconds = 0.0
    core.may_step.set()
    # What is still on its way from this test must not count in the next one.
    wait_until(lambda: core.num_running == 0)


@pytest.fixture
def connect(frontend: Frontend) -> Iterator[Callable[..., Client]]:
    """Connects clients, to the shared frontend if not told to another, and closes them with the test."""
    clients: list[Client] = []

    def make(of: Frontend = frontend, **options: Any) -> Client:
        clients.append(Client(of.config.address, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
