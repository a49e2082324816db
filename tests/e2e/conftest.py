"""Starts the real engine, as a user does, and looks after it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from frontend import Client

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


class RunningEngine:
    """`python launch.py` in a process of its own, with its output collected."""

    def __init__(self, directory: Path, *flags: str, launcher: Sequence[str] = (str(ROOT / "launch.py"),)) -> None:
        self.address = f"ipc://{directory}/engine.sock"
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "--ipc", self.address, "--device", "cpu", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    @property
    def output(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_until_ready(self) -> RunningEngine:
        with self._changed:
            ready = self._changed.wait_for(lambda: any("ready in" in line for line in self._lines), START_SECONDS)
        assert ready, self.output
        if "--no-http" not in self.process.args:
            self._wait_for("Try it:")
            (self.url,) = re.findall(r"HTTP +(http://\S+)/v1", self.output)
            self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def wait_for(self, pattern: str) -> str:
        """What the pattern's group, or the whole pattern, matches in a line, once there is such a line."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: next((match for line in self._lines if (match := re.search(pattern, line))), None),
                START_SECONDS,
            )
        assert found, self.output
        return str(found[1] if found.re.groups else found[0])

    def _wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(text in line for line in self._lines), 10), text

    def wait(self, seconds: float = 30.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, module: str) -> psutil.Process:
        return next(child for child in self.children() if module in child.cmdline())

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.wait()

    def stop_at_any_cost(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., RunningEngine]]:
    """`start_engine(*flags)` starts an engine; whatever is left at the end of the test is stopped."""
    engines: list[RunningEngine] = []

    def start(*flags: str, directory: Path | None = None, **options: Any) -> RunningEngine:
        engines.append(RunningEngine(directory or tmp_path, *flags, **options))
        return engines[-1]

    tmp_path.chmod(0o700)
    yield start
    for engine in engines:
        engine.stop_at_any_cost()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """The bundled model with default options, shared by tests that leave it as they find it."""
    directory = tmp_path_factory.mktemp("engine")
    directory.chmod(0o700)
    running = RunningEngine(directory, "--port", "0").wait_until_ready()
    yield running
    running.stop_at_any_cost()


@pytest.fixture(scope="module")
def client(engine: RunningEngine) -> Iterator[Client]:
    with Client(engine.address) as client:
        yield client
