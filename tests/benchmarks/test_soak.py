"""A soak sees what grew, what did not come back and who is gone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from pathlib import Path

import pytest

from benchmarks.processes import ProcessUse
from benchmarks.soak_http import KINDS, HttpRequests
from benchmarks.soak_looks import Allowance, Snapshot, drift, growth
from frontend import RequestFailedError
from protocol.address import AddressLock, engine_pid

BEFORE = Snapshot(
    1000, {"core.engine": ProcessUse(50.0, 18, 5), "worker.main": ProcessUse(900.0, 12, 7)}, 4000, 64, 64, 0
)
ALLOWED = Allowance(memory=8.0, gpu_memory=64.0)


def after(name: str = "core.engine", use: ProcessUse | None = None, **changes: int | None) -> Snapshot:
    processes = {**BEFORE.processes, name: use or BEFORE.processes[name]}
    return dataclasses.replace(BEFORE, num_requests=2000, processes=processes, **changes)  # type: ignore[arg-type]


def test_what_stays_the_same_or_shrinks_or_grows_a_little_is_allowed() -> None:
    assert growth([BEFORE, after()], ALLOWED) == []
    assert growth([BEFORE, after(use=ProcessUse(58.0, 20, 7), gpu_memory=4064)], ALLOWED) == []
    assert growth([BEFORE, after(use=ProcessUse(20.0, 1, 1), gpu_memory=10)], ALLOWED) == []
    assert growth([BEFORE, after(gpu_memory=None)], ALLOWED) == []


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (after(use=ProcessUse(58.5, 18, 5)), "core.engine grew by 8.5 MiB, of which 8 are allowed"),
        (after(use=ProcessUse(50.0, 21, 5)), "core.engine has 3 more open files"),
        (after(use=ProcessUse(50.0, 18, 8)), "core.engine has 3 more threads"),
        (after(gpu_memory=4065), "GPU memory grew by 65 MiB, of which 64 are allowed"),
        (after(num_free_blocks=63), "only 63 of 64 blocks came back"),
        (dataclasses.replace(after(), processes={"core.engine": ProcessUse(50.0, 18, 5)}), "worker.main ended"),
        (after("compiler", ProcessUse(9.0, 3, 1)), "compiler is a new process"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_grew_or_is_lost_is_said(now: Snapshot, message: str) -> None:
    assert growth([BEFORE, now], ALLOWED) == [message]


def test_a_jump_at_the_beginning_is_no_leak_and_steady_growth_is() -> None:
    def looks(*memory: float) -> list[Snapshot]:
        return [
            dataclasses.replace(after(use=ProcessUse(mib, 18, 5)), num_requests=1000 + 250 * index)
            for index, mib in enumerate(memory)
        ]

    assert growth(looks(50, 67, 50, 68, 68), ALLOWED) == []
    assert growth(looks(50, 55, 60, 65, 70), ALLOWED) == ["core.engine grew by 10.0 MiB, of which 8 are allowed"]


def test_between_two_idle_looks_files_are_equal_and_memory_within_some_percent() -> None:
    assert drift(BEFORE, after(), 5) == []
    assert drift(BEFORE, after(use=ProcessUse(52.5, 18, 7), gpu_memory=4200), 5) == []
    assert drift(BEFORE, after(use=ProcessUse(20.0, 18, 1), gpu_memory=None), 5) == []
    assert drift(BEFORE, after(use=ProcessUse(53.0, 18, 5)), 7) == []


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (after(use=ProcessUse(53.0, 18, 5)), "core.engine grew by 6.0 %, from 50.0 to 53.0 MiB"),
        (after(use=ProcessUse(50.0, 19, 5)), "core.engine has 19 open files and had 18"),
        (after(use=ProcessUse(50.0, 17, 5)), "core.engine has 17 open files and had 18"),
        (after(use=ProcessUse(50.0, 18, 8)), "core.engine has 3 more threads"),
        (after(gpu_memory=4201), "GPU memory grew from 4000 to 4201 MiB"),
        (after(num_free_blocks=63), "only 63 of 64 blocks came back"),
        (after("compiler", ProcessUse(9.0, 3, 1)), "compiler is a new process"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_drifted_is_said(now: Snapshot, message: str) -> None:
    assert drift(BEFORE, now, 5) == [message]


async def test_each_kind_of_http_request_must_end_as_it_should() -> None:
    """A server that answers everything alike, with 200, is right about none of them."""
    server = await asyncio.start_server(_answer_anything, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    requests = HttpRequests(f"http://127.0.0.1:{port}/v1", seed=0)
    tolerated = {"left in the stream", "cancelled"}
    for kind in set(KINDS) - tolerated:
        with pytest.raises(RequestFailedError):
            await requests.send(kind)
    await requests.close_connections()
    server.close()


async def _answer_anything(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"choices": []}'
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()


def test_the_owner_of_an_address_is_found(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    assert engine_pid(address) is None
    lock = AddressLock(address)
    assert engine_pid(address) == os.getpid()
    lock.release()
    assert engine_pid(address) is None
