"""A client that nobody closes: its requests end with the program or with the last reference, and nothing hangs."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend import Client, EngineUnavailableError
from protocol.messages import Abort, Generate, Message, Outputs, pack_ints
from tests.support.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
SOON_S = 5.0


class SlowEngine(ScriptedEngine):
    """Gives every request one token and never ends it; notes what is aborted."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.started: list[int] = []
        self.aborted: list[int] = []

    def answers(self, message: Message) -> Iterator[Message]:
        if isinstance(message, Generate):
            self.started.append(message.request_id)
            yield Outputs(pack_ints([message.request_id], "<i8"), pack_ints([7]))
        elif isinstance(message, Abort):
            self.aborted += message.request_ids

    def wait_until_aborted(self) -> None:
        deadline = time.monotonic() + SOON_S
        while self.aborted != self.started or not self.started:
            assert time.monotonic() < deadline, f"started {self.started}, aborted {self.aborted}"
            time.sleep(0.01)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SlowEngine]:
    engine = SlowEngine(f"ipc://{tmp_path}/engine.sock")
    engine.start()
    yield engine
    engine.stop()


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mini-vllm client"]


@pytest.mark.parametrize("end", ["raise RuntimeError('a bug of the user')", "sys.exit(1)"])
def test_a_program_that_ends_in_the_middle_of_a_stream_does_end(engine: SlowEngine, end: str) -> None:
    code = f"""
import sys
from frontend import Client
client = Client(sys.argv[1])
stream = client.stream([1, 2, 3])
next(stream)
{end}
"""
    command = [sys.executable, "-c", code, engine.address]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode == 1
    # What the user is to see, and nothing of the client's own ending.
    assert result.stderr.splitlines()[-1:] == (["RuntimeError: a bug of the user"] if "raise" in end else [])
    engine.wait_until_aborted()


def test_a_forgotten_client_closes_its_connection(engine: SlowEngine) -> None:
    client = Client(engine.address)
    stream = client.stream([1, 2, 3])
    next(stream)
    del client, stream
    gc.collect()
    engine.wait_until_aborted()
    assert not client_threads()


def test_a_client_that_the_collector_finds_in_its_own_thread_is_no_deadlock(engine: SlowEngine) -> None:
    client = Client(engine.address)
    loop, thread = client._loop, client._thread
    stream = client.stream([1, 2, 3])
    next(stream)
    cycle: list[object] = [client, stream]
    cycle.append(cycle)
    gc.disable()
    try:
        del client, stream, cycle
        loop.call_soon_threadsafe(gc.collect)
        thread.join(SOON_S)
    finally:
        gc.enable()
    assert not thread.is_alive()
    engine.wait_until_aborted()


def test_closing_again_and_calling_after_it_are_answered(engine: SlowEngine) -> None:
    client = Client(engine.address)
    stream = client.stream([1, 2, 3])
    next(stream)
    client.close()
    client.close()
    engine.wait_until_aborted()
    assert not client_threads()
    for call in (client.stats, lambda: next(stream), lambda: client.generate("a")):
        with pytest.raises(EngineUnavailableError, match="the client was closed"):
            call()
