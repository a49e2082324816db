"""Sockets in the file system are their user's alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import stat
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from protocol.messages import Step
from protocol.transport import AsyncChannel, Channel, open_socket

NOBODY = 65534


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """A socket in a directory that everybody can enter."""
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if directory.stat().st_uid == os.getuid():
            directory.chmod(0o755)
    context = zmq.Context()
    bound = open_socket(context, zmq.ROUTER, bind=f"ipc://{tmp_path}/a.sock")
    yield tmp_path / "a.sock"
    bound.close(0)
    context.term()


def greeting(path: Path, uid: int) -> str:
    """What a process of that user gets from the socket: "greeted", "closed" or "denied"."""
    outcomes = ["greeted", "closed", "denied"]
    child = os.fork()
    if child == 0:
        code = 9
        try:
            os.setuid(uid)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(path))
                code = 0 if connection.recv(1) else 1
        except PermissionError:
            code = 2
        except ConnectionError:
            code = 1
        finally:
            os._exit(code)
    return outcomes[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def test_a_socket_is_made_with_the_mode_0600(bound: Path) -> None:
    assert stat.S_IMODE(bound.stat().st_mode) == 0o600
    assert bound.stat().st_uid == os.getuid()


def test_binding_leaves_the_modes_of_other_files_alone(bound: Path) -> None:
    (bound.parent / "file").touch()
    usual = os.umask(0o022)
    os.umask(usual)
    assert stat.S_IMODE((bound.parent / "file").stat().st_mode) == 0o666 & ~usual


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_kept_out_by_the_mode_and_without_it_by_the_kernels_word(bound: Path) -> None:
    assert greeting(bound, os.getuid()) == "greeted"
    assert greeting(bound, NOBODY) == "denied"
    bound.chmod(0o666)
    assert greeting(bound, NOBODY) == "closed"
    assert greeting(bound, os.getuid()) == "greeted"


async def test_messages_that_come_as_fast_as_they_are_handled_leave_others_their_turn(tmp_path: Path) -> None:
    context = zmq.Context()
    address = f"ipc://{tmp_path}/engine.sock"
    sender = open_socket(context, zmq.PAIR, bind=address)
    receiver = open_socket(context, zmq.PAIR)
    receiver.connect(address)
    events: list[str] = []

    def on_message(identity: bytes, message: object) -> None:
        time.sleep(AsyncChannel.TURN_S)
        events.append("message")

    channel = AsyncChannel(receiver, Step, on_message, on_turn_end=lambda: events.append("end"))
    try:
        assert sender.poll(10_000, zmq.POLLOUT)
        for _ in range(100):
            assert Channel(sender, Step).send(Step(0, 0))
        async with asyncio.timeout(30):
            while events.count("message") < 100:
                await asyncio.sleep(0)
                events.append("other")
        # Every turn has its end before others have theirs, and few messages.
        pairs = list(itertools.pairwise(events))
        assert ("message", "other") not in pairs
        assert ("end", "end") not in pairs
        turns = [kind for kind, _ in itertools.groupby(kind for kind in events if kind != "end")]
        assert turns.count("message") >= 50
    finally:
        channel.close()
        sender.close(linger=0)
        context.term()


async def test_one_peer_that_floods_and_others_that_trickle_leave_others_their_turn(tmp_path: Path) -> None:
    """Each message of one that trickles wakes the reader, while the flood keeps it busy."""
    context = zmq.Context()
    address = f"ipc://{tmp_path}/engine.sock"
    receiver = open_socket(context, zmq.ROUTER, bind=address)
    flood, *trickles = [open_socket(context, zmq.DEALER) for _ in range(4)]
    for sender in (flood, *trickles):
        sender.connect(address)
    num_received = 0

    def on_message(identity: bytes, message: object) -> None:
        nonlocal num_received
        num_received += 1
        time.sleep(AsyncChannel.TURN_S / 10)

    channel = AsyncChannel(receiver, Step, on_message)
    try:
        for _ in range(5000):
            assert Channel(flood, Step).send(Step(0, 0))
        pauses = []
        async with asyncio.timeout(60):
            while num_received < 4000:
                for sender in trickles:
                    Channel(sender, Step).send(Step(0, 0))
                began = time.perf_counter()
                await asyncio.sleep(0)
                pauses.append(time.perf_counter() - began)
        assert statistics.median(pauses) < 6 * AsyncChannel.TURN_S
    finally:
        channel.close()
        for sender in (flood, *trickles):
            sender.close(linger=0)
        context.term()


def test_no_more_messages_wait_to_be_received_than_allowed(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    context = zmq.Context()
    receiver = open_socket(context, zmq.ROUTER, bind=address, max_received=10)
    sender = context.socket(zmq.DEALER)
    sender.setsockopt(zmq.SNDHWM, 1)
    sender.connect(address)
    num_sent = 0
    try:
        # Larger than what the kernel keeps, so that little but the two queues is counted.
        while sender.poll(300, zmq.POLLOUT):
            sender.send(bytes(1 << 20), zmq.DONTWAIT)
            num_sent += 1
            assert num_sent < 100
        assert num_sent >= 10
    finally:
        sender.close(linger=0)
        receiver.close(linger=0)
        context.term()
