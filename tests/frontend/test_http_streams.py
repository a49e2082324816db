"""How streams are written: past readers that do not keep up, and without a task's help where they do."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections import defaultdict
from typing import Any

import pytest

from frontend.http_sending import EventStream
from tests.frontend.conftest import Frontend, wait_until

NUM_CHOICES, NUM_TOKENS = 128, 400


def request_stream(frontend: Frontend, receive_buffer: int, body: dict[str, Any]) -> socket.socket:
    """A connection on which a stream has been asked for."""
    host, port = frontend.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def read_events(connection: socket.socket) -> list[dict[str, Any]]:
    """All of a stream's events, after which the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    connection.close()
    head, _, rest = b"".join(parts).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    body = bytearray()
    while (match := re.match(rb"([0-9a-f]+)\r\n", rest)) and (size := int(match[1], 16)):
        body += rest[match.end() : match.end() + size]
        assert rest[match.end() + size :][:2] == b"\r\n"
        rest = rest[match.end() + size + 2 :]
    assert rest == b"0\r\n\r\n"
    *events, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def texts_of(events: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


def test_a_reader_that_stops_holds_nobody_up_and_gets_all_in_order_and_in_fewer_events(frontend: Frontend) -> None:
    body = {"prompt": "a b c d e f g h", "max_tokens": NUM_TOKENS, "ignore_eos": True, "n": NUM_CHOICES}
    slow = request_stream(frontend, 4096, body)
    wait_until(lambda: len(frontend.core.added) == NUM_CHOICES)
    # The core has made all its tokens while nobody reads: more than the connection holds.
    wait_until(lambda: frontend.core.num_running == 0)
    quick = read_events(request_stream(frontend, 1 << 20, body | {"n": 1}))
    events = read_events(slow)
    texts = texts_of(events)
    assert set(texts) == set(range(NUM_CHOICES))
    assert set(texts.values()) == set(texts_of(quick).values())
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons.count("length") == NUM_CHOICES
    assert len(events) < NUM_CHOICES * NUM_TOKENS / 2


def test_a_reader_that_leaves_while_it_is_behind_has_its_requests_aborted(frontend: Frontend) -> None:
    frontend.core.step_seconds = 0.005
    body = {"prompt": "a b c", "max_tokens": 400, "ignore_eos": True, "n": NUM_CHOICES}
    connection = request_stream(frontend, 4096, body)
    wait_until(lambda: len(frontend.core.added) == NUM_CHOICES)
    time.sleep(0.5)
    connection.close()
    wait_until(lambda: len(frontend.core.aborted) == NUM_CHOICES)


# --- events that are sent without a task ----------------------------------------------------------------------------


class Server:
    """An ASGI server's `send`, which waits as long as it is paused."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def send(self, message: Any) -> None:
        await self.is_open.wait()
        self.sent.append(message.get("body", b""))

    def stream(self) -> EventStream:
        return EventStream(self.send, self.send, lambda: None)


async def test_events_sent_from_outside_are_out_at_once_while_the_connection_takes_them() -> None:
    server = Server()
    stream = server.stream()
    assert stream.send_now([b"a", b"b"])
    assert server.sent == [b"ab"]


async def test_an_event_that_did_not_fit_goes_before_the_next() -> None:
    server = Server()
    stream = server.stream()
    server.is_open.clear()
    assert not stream.send_now([b"a"])
    sending = asyncio.create_task(stream.send([b"b"]))
    await asyncio.sleep(0.01)
    assert server.sent == []
    server.is_open.set()
    await sending
    await stream.end([b"c"])
    assert server.sent == [b"a", b"b", b"c"]


async def test_waiting_for_an_event_that_did_not_fit_can_be_cancelled() -> None:
    server = Server()
    stream = server.stream()
    server.is_open.clear()
    assert not stream.send_now([b"a"])
    sending = asyncio.create_task(stream.send([b"b"]))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert server.sent == []
