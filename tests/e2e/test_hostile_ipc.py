"""A live engine under clients that break every rule of the protocol: others are served, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from frontend import AsyncClient, Client
from protocol.address import AddressLock
from protocol.errors import EngineError
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    ChatPrompt,
    ClientMessage,
    EngineInfo,
    Failed,
    Finished,
    FrontendMessage,
    Generate,
    GetStats,
    Heartbeat,
    Hello,
    Outputs,
    Refused,
    Started,
    Stats,
    TextPrompt,
    TokenPrompt,
    Welcome,
    pack_ints,
)
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams
from protocol.transport import MAX_MESSAGE_BYTES, Decoder, encode
from tests.e2e.conftest import RunningEngine
from tests.support.mutations import mutations

HELLO = Hello(PROTOCOL_VERSION, 60.0)
FEW = SamplingParams(max_tokens=4)
VALID = [
    HELLO,
    Generate(1, TextPrompt("Once upon a time"), FEW),
    Generate(2, TokenPrompt(pack_ints([1, 2, 3])), FEW, stream=False, priority=3, cache_salt="salt"),
    Generate(3, ChatPrompt([{"role": "user", "content": "Hello"}]), SamplingParams(max_tokens=4, stop="a", n=1)),
    Generate(4, TextPrompt("a"), SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(regex="a+"))),
    Abort([1, 2, 3]),
    Heartbeat(),
    GetStats(7),
]
# The allocator keeps some of what was used, so the claim is about what a leak would take, not about nothing at all.
MOST_GROWTH_BYTES = 96 * 1024 * 1024
decode = Decoder(FrontendMessage)


class RawClient:
    """A socket at the engine, without any of the client's manners."""

    def __init__(self, address: str, identity: bytes | None = None) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.connect(address)

    def send(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.socket.send(encode(message))

    def receive(self, kind: type | None = None) -> object:
        """The next message, or the next one of a kind."""
        while self.socket.poll(20_000):
            message = decode(self.socket.recv())
            if kind is None or isinstance(message, kind):
                return message
        raise AssertionError("no answer")

    def drain(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.socket.recv_multipart(zmq.DONTWAIT)


@pytest.fixture
def raw(engine: RunningEngine) -> Iterator[Callable[..., RawClient]]:
    clients: list[RawClient] = []

    def make(**options: bytes) -> RawClient:
        clients.append(RawClient(engine.address, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.socket.close(0)


@pytest.fixture(autouse=True)
def everything_is_as_before(engine: RunningEngine) -> Iterator[None]:
    """Around each test: a normal client is served, and the frontend's descriptors and memory are what they were."""
    frontend = engine.child("frontend.server")
    _serve(engine)
    descriptors, memory = frontend.num_fds(), frontend.memory_info().rss
    yield
    _serve(engine)
    _wait_until(lambda: frontend.num_fds() <= descriptors, "descriptors are left open")
    assert frontend.memory_info().rss - memory < MOST_GROWTH_BYTES
    assert "Traceback" not in engine.output
    with Client(engine.address) as client:
        _wait_until(lambda: client.stats().num_running + client.stats().num_waiting == 0, "requests are left running")


def _serve(engine: RunningEngine) -> None:
    with Client(engine.address) as client:
        (result,) = client.generate(["The capital of Italy is"], SamplingParams(temperature=0, max_tokens=8))
        assert " Rome" in result.outputs[0].text


def _wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


@pytest.mark.parametrize("number_of_messages", [3000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_damaged_messages_are_refused_or_served(raw: Callable[..., RawClient], number_of_messages: int) -> None:
    client = raw()
    client.send(HELLO)
    client.receive(Welcome)
    for number, frame in enumerate(mutations([encode(message) for message in VALID], number_of_messages, seed=3)):
        client.socket.send(frame)
        if number % 50 == 0:
            client.drain()
    client.socket.send(encode(GetStats(-5)))
    while client.receive(Stats).query_id != -5:  # type: ignore[attr-defined]
        pass


def test_frames_of_any_number_and_form_are_refused(raw: Callable[..., RawClient]) -> None:
    client, draw = raw(), random.Random(4)
    odd = [[b""], [b"", b""], [b"a"] * 3, [b""] * 100, [encode(HELLO)] * 2, [b"", encode(HELLO)], [b"\xc1"]]
    for frames in [*odd, *([draw.randbytes(draw.choice((1, 30, 3000)))] for _ in range(300))]:
        client.socket.send_multipart(frames)
        assert isinstance(client.receive(), Refused)


def test_messages_in_a_wrong_order_are_refused(raw: Callable[..., RawClient]) -> None:
    client = raw()
    for message in VALID[1:]:
        client.send(message)
        assert isinstance(client.receive(), Refused)
    client.send(Hello(PROTOCOL_VERSION + 1), Hello(-1), Hello(2**63))
    assert all(isinstance(client.receive(), Refused) for _ in range(3))
    client.send(HELLO, HELLO, Abort([99]))
    assert all(isinstance(client.receive(), Welcome) for _ in range(2))


def test_messages_of_other_connections_are_refused(raw: Callable[..., RawClient]) -> None:
    client = raw()
    client.send(HELLO)
    client.receive(Welcome)
    info = EngineInfo("m", 1, 1, 1, 1)
    foreign = [Welcome(PROTOCOL_VERSION, info), Refused("no"), Started(1, b""), Failed(1, "failed", "x"), Stats()]
    for message in [*foreign, Outputs(b"", b"", finished=[Finished(1, "stop")])]:
        client.send(message)
        assert isinstance(client.receive(), Refused)


def test_an_id_that_is_used_again_while_it_runs_is_refused(raw: Callable[..., RawClient]) -> None:
    client = raw()
    client.send(HELLO)
    client.receive(Welcome)
    endless = Generate(1, TextPrompt("a"), SamplingParams(max_tokens=500, ignore_eos=True))
    client.send(endless, endless, endless)
    for _ in range(2):
        client.receive(Refused)
    client.send(Abort([1, 1, 1]), Generate(1, TextPrompt("a"), FEW))
    ends: list[str] = []
    while len(ends) < 2:
        outputs = client.receive(Outputs)
        ends += [finished.reason for finished in outputs.finished]  # type: ignore[attr-defined]
    assert ends == ["abort", "length"]


def test_a_message_that_is_too_large_closes_the_connection_before_it_is_read(
    raw: Callable[..., RawClient], engine: RunningEngine
) -> None:
    client = raw()
    client.send(HELLO)
    client.receive(Welcome)
    monitor = client.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    client.socket.send(bytes(MAX_MESSAGE_BYTES + 1))
    assert monitor.poll(20_000), "the connection is still there"
    client.socket.disable_monitor()
    monitor.close(0)


def test_a_prompt_as_large_as_a_message_may_be_is_refused_by_its_name(raw: Callable[..., RawClient]) -> None:
    client = raw()
    client.send(HELLO)
    client.receive(Welcome)
    client.send(Generate(1, TextPrompt("a" * (MAX_MESSAGE_BYTES - 200)), FEW))
    failed = client.receive(Failed)
    assert (failed.kind, failed.param) == ("invalid_request", "prompt")  # type: ignore[attr-defined]
    client.send(Generate(2, TokenPrompt(bytes(MAX_MESSAGE_BYTES - 400)), FEW))
    failed = client.receive(Failed)
    assert (failed.kind, failed.param) == ("invalid_request", "prompt")  # type: ignore[attr-defined]


def test_a_client_that_takes_anothers_name_gets_none_of_its_answers(raw: Callable[..., RawClient]) -> None:
    first = raw(identity=b"name")
    first.send(HELLO)
    first.receive(Welcome)
    second = raw(identity=b"name")
    second.send(HELLO)
    first.send(Generate(1, TextPrompt("Once upon a time"), FEW))
    first.receive(Started)
    assert not second.socket.poll(300)


def test_clients_that_come_and_go_leave_nothing(raw: Callable[..., RawClient], engine: RunningEngine) -> None:
    for number in range(150):
        client = RawClient(engine.address)
        client.send(HELLO, Generate(1, TextPrompt("a"), SamplingParams(max_tokens=200, ignore_eos=True)))
        if number % 3:
            client.socket.poll(20)
        client.socket.close(0)


async def test_a_python_client_survives_a_hostile_engine(tmp_path: Path) -> None:
    """What an engine must not send ends in an error of the client's, or in nothing, and never in a hang."""
    tmp_path.chmod(0o700)
    address = f"ipc://{tmp_path}/engine.sock"
    lock = AddressLock(address)
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.bind(address)
    info = EngineInfo("m", 100, 100, 16, 10)
    answers = [
        Welcome(PROTOCOL_VERSION, info),
        Started(0, pack_ints([1, 2])),
        Outputs(pack_ints([0, 5], "<i8"), pack_ints([7, 8]), [(0, "a"), (9, "b")], [Finished(12, "stop")]),
        Outputs(pack_ints([0], "<i8"), pack_ints([7]), [(0, "a")], [Finished(0, "stop")]),
        Failed(0, "failed", "x"),
        Failed(77, "failed", "x"),
        Refused("no"),
        Stats(5),
    ]
    frames = list(mutations([encode(answer) for answer in answers], 2000, seed=5))
    try:
        for start in range(0, len(frames), 200):
            client = AsyncClient(address, timeout=5)
            connecting = asyncio.ensure_future(client.connect())
            identity = await _sender_of(router, Hello)
            router.send_multipart([identity, encode(answers[0])])
            await connecting
            generating = asyncio.ensure_future(client.generate([1, 2], FEW))
            await _sender_of(router, Generate)
            for frame in frames[start : start + 200]:
                router.send_multipart([identity, frame])
            router.send_multipart([identity, encode(answers[3])])
            with contextlib.suppress(EngineError):
                await asyncio.wait_for(generating, 10)
            await client.close()
    finally:
        router.close(0)
        lock.release()


async def _sender_of(router: zmq.Socket, kind: type) -> bytes:
    """Who sent the next message of this kind; others, which earlier clients may have sent, are passed over."""
    decode = Decoder(ClientMessage)
    for _ in range(1000):
        while router.poll(0):
            identity, frame = router.recv_multipart()
            if isinstance(decode(frame), kind):
                return identity
        await asyncio.sleep(0.005)
    raise AssertionError("nothing came")
