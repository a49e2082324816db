"""The Python client against an endpoint that the test plays itself: what it says, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from frontend import (
    AsyncClient,
    Client,
    EngineUnavailableError,
    InvalidRequestError,
    RequestFailedError,
    SamplingParams,
)
from frontend.outputs import StreamChunk
from protocol.address import AddressLock
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    ChatPrompt,
    ClientMessage,
    EngineInfo,
    Failed,
    Finished,
    Generate,
    GetStats,
    Hello,
    Outputs,
    Refused,
    Started,
    Stats,
    TextPrompt,
    TokenPrompt,
    Welcome,
    pack_ints,
    unpack_ints,
)
from protocol.transport import Channel, open_socket

ENGINE = EngineInfo("tiny", 512, 640, 16, 64)
WELCOME = Welcome(PROTOCOL_VERSION, ENGINE)
WAIT_S = 10.0
# Longer than the client needs to notice anything, much shorter than WAIT_S.
SOON_S = 3.0


class Endpoint:
    """The engine's end of the address: its lock, and a socket that does what the test says."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = AddressLock(address)
        self._context = zmq.Context()
        self.channel = Channel(open_socket(self._context, zmq.ROUTER, bind=address), ClientMessage)
        self.peer = b""

    async def expect(self, kind: type) -> Any:
        """The next message, which must be of this kind."""
        deadline = time.monotonic() + WAIT_S
        while (received := self.channel.receive()) is None:
            assert time.monotonic() < deadline, f"no {kind.__name__} came"
            await asyncio.sleep(0.002)
        self.peer, message = received
        assert isinstance(message, kind), message
        return message

    def send(self, message: msgspec.Struct) -> None:
        assert self.channel.send(message, self.peer)

    def send_bytes(self, *frames: bytes) -> None:
        self.channel.socket.send_multipart([self.peer, *frames])

    def outputs(
        self, rows: Sequence[tuple[int, int]], texts: Sequence[tuple[int, str]] = (), finished: Sequence[Finished] = ()
    ) -> None:
        """One step: (request id, token) pairs, and what else belongs to it."""
        ids, tokens = [row[0] for row in rows], [row[1] for row in rows]
        self.send(Outputs(pack_ints(ids, "<i8"), pack_ints(tokens), list(texts), list(finished)))

    def close_socket(self) -> None:
        self.channel.close()
        self._context.term()

    def release(self) -> None:
        """The engine's process is gone: the lock with it, though its socket may still be there."""
        self._lock.release()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine.sock"


@pytest.fixture
def endpoint(address: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(address)
    yield endpoint
    if not endpoint.channel.socket.closed:
        endpoint.close_socket()


async def connect(endpoint: Endpoint) -> AsyncClient:
    client = AsyncClient(endpoint.address)
    connecting = asyncio.create_task(client.connect())
    hello = await endpoint.expect(Hello)
    assert hello.protocol_version == PROTOCOL_VERSION
    endpoint.send(WELCOME)
    assert await connecting == ENGINE
    return client


@pytest.fixture
async def client(endpoint: Endpoint) -> AsyncIterator[AsyncClient]:
    client = await connect(endpoint)
    yield client
    await client.close()


async def failure(awaitable: Any) -> BaseException:
    """What a call raises, which it must soon."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await asyncio.wait_for(awaitable, SOON_S)
    return caught.value


def in_background(awaitable: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(awaitable)


# --- the handshake --------------------------------------------------------------------------------------------------


async def answered_hello(endpoint: Endpoint, answer: Callable[[], None]) -> BaseException:
    client = AsyncClient(endpoint.address)
    connecting = in_background(failure(client.connect()))
    await endpoint.expect(Hello)
    answer()
    return await connecting


async def test_another_protocol_version_of_the_engine_is_named(endpoint: Endpoint) -> None:
    answer = Welcome(PROTOCOL_VERSION + 1, ENGINE)
    error = await answered_hello(endpoint, lambda: endpoint.send(answer))
    assert isinstance(error, EngineUnavailableError)
    assert f"protocol version {PROTOCOL_VERSION + 1}, not {PROTOCOL_VERSION}" in str(error)
    assert endpoint.address in str(error)


async def test_a_refusal_reaches_the_user_in_the_engines_words(endpoint: Endpoint) -> None:
    error = await answered_hello(endpoint, lambda: endpoint.send(Refused("no new clients: the engine is stopping")))
    assert isinstance(error, EngineUnavailableError)
    assert "no new clients: the engine is stopping" in str(error)


@pytest.mark.parametrize("frames", [[b"\xc1"], [b""], [b"\x93\x01\x02\x03"], [os.urandom(64)], [b"a", b"b"]], ids=len)
async def test_malformed_bytes_in_answer_to_hello_are_an_error(endpoint: Endpoint, frames: list[bytes]) -> None:
    error = await answered_hello(endpoint, lambda: endpoint.send_bytes(*frames))
    assert isinstance(error, EngineUnavailableError)
    assert "cannot be understood" in str(error)


async def test_an_endpoint_that_closes_before_its_welcome_is_an_error(endpoint: Endpoint) -> None:
    error = await answered_hello(endpoint, endpoint.close_socket)
    assert isinstance(error, EngineUnavailableError)
    assert "has closed the connection" in str(error)


async def test_an_engine_that_does_not_become_ready_in_time_is_an_error(endpoint: Endpoint) -> None:
    error = await failure(AsyncClient(endpoint.address, timeout=0.1).connect())
    assert isinstance(error, EngineUnavailableError)
    assert "not ready within 0.1 s" in str(error)


async def test_a_welcome_that_comes_late_is_waited_for(endpoint: Endpoint) -> None:
    connecting = in_background(AsyncClient(endpoint.address).connect())
    await endpoint.expect(Hello)
    assert not (await asyncio.wait([connecting], timeout=0.2))[0]
    endpoint.send(WELCOME)
    assert await connecting == ENGINE


@pytest.mark.parametrize("leftover", [False, True], ids=["nothing there", "a socket and a lock file of a crash"])
def test_no_engine_is_an_error_at_once_that_leaves_no_thread(address: str, leftover: bool) -> None:
    if leftover:
        crashed = Endpoint(address)
        os.close(crashed._lock._fd)
    start = time.monotonic()
    with pytest.raises(EngineUnavailableError, match=r"no engine is running at .* `python launch.py`"):
        Client(address)
    assert time.monotonic() - start < 1
    assert not [thread for thread in threading.enumerate() if thread.name == "mini-vllm client"]
    if leftover:
        crashed.close_socket()


# --- requests -------------------------------------------------------------------------------------------------------


async def test_prompts_go_out_in_order_and_results_come_back_in_order(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = in_background(client.generate(["a", [7, 8]], use_tqdm=False, priority=-3, cache_salt="mine"))
    first, second = [await endpoint.expect(Generate) for _ in range(2)]
    assert (first.prompt, second.prompt) == (TextPrompt("a"), TokenPrompt(pack_ints([7, 8])))
    assert [each.stream for each in (first, second)] == [False, False]
    assert {(each.priority, each.cache_salt) for each in (first, second)} == {(-3, "mine")}
    endpoint.send(Started(first.request_id, pack_ints([1, 2, 3])))
    # The second ends first.
    endpoint.outputs(
        [(second.request_id, 5)],
        [(second.request_id, "B")],
        [Finished(second.request_id, "stop", 5, num_cached_tokens=4)],
    )
    endpoint.outputs(
        [(first.request_id, 1), (first.request_id, 2)],
        [(first.request_id, "A")],
        [Finished(first.request_id, "length")],
    )
    one, two = await calling
    assert (one.prompt, one.prompt_token_ids, one.outputs[0].text, one.outputs[0].token_ids) == (
        "a",
        [1, 2, 3],
        "A",
        [1, 2],
    )
    assert (one.outputs[0].finish_reason, one.outputs[0].stop_reason, one.num_cached_tokens) == ("length", None, 0)
    assert (two.prompt, two.prompt_token_ids, two.outputs[0].text, two.outputs[0].token_ids) == (None, [7, 8], "B", [5])
    assert (two.outputs[0].finish_reason, two.outputs[0].stop_reason, two.num_cached_tokens) == ("stop", 5, 4)
    assert one.finished
    assert one.metrics.arrival_time <= one.metrics.token_times[0] <= one.metrics.finished_time


async def test_a_steps_tokens_for_many_requests_reach_each_in_order(endpoint: Endpoint, client: AsyncClient) -> None:
    count, steps = 200, 5

    async def read(index: int) -> list[StreamChunk]:
        return [chunk async for chunk in client.stream([index + 1], SamplingParams(max_tokens=steps))]

    readers = [asyncio.create_task(read(index)) for index in range(count)]
    ids = []
    for index in range(count):
        request = await endpoint.expect(Generate)
        assert request.stream
        assert unpack_ints(request.prompt.token_ids).tolist() == [index + 1]
        ids.append(request.request_id)
    for step in range(steps):
        # Another order of rows in every step.
        order = ids[step:] + ids[:step]
        finished = [Finished(request_id, "length") for request_id in order] if step == steps - 1 else []
        endpoint.outputs(
            [(request_id, 10 * ids.index(request_id) + step) for request_id in order],
            [(request_id, f"{ids.index(request_id)}.{step} ") for request_id in reversed(order)],
            finished,
        )
    for index, chunks in enumerate(await asyncio.wait_for(asyncio.gather(*readers), WAIT_S)):
        assert [token for chunk in chunks for token in chunk.token_ids] == [10 * index + step for step in range(steps)]
        assert "".join(chunk.text for chunk in chunks) == "".join(f"{index}.{step} " for step in range(steps))
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"


async def test_the_times_of_a_running_request_can_be_looked_at(endpoint: Endpoint, client: AsyncClient) -> None:
    times: list[float] = []
    request = in_background(client.run_request([1, 2], SamplingParams(max_tokens=3), token_times=times))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 7)])
    async with asyncio.timeout(SOON_S):
        while not times:
            await asyncio.sleep(0.002)
    assert not request.done()
    endpoint.outputs([(request_id, 8)], finished=[Finished(request_id, "length")])
    result = await request
    assert result.outputs[0].token_ids == [7, 8]
    assert result.metrics.token_times is times
    assert len(times) == 2
    assert result.metrics.first_token_time == times[0]


async def test_messages_about_unknown_requests_are_ignored(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = in_background(client.generate("a", use_tqdm=False))
    request_id = (await endpoint.expect(Generate)).request_id
    for unknown in (request_id + 1, -1, 2**62):
        endpoint.send(Started(unknown, pack_ints([1])))
        endpoint.outputs([(unknown, 1), (request_id, 2)], [(unknown, "x")], [Finished(unknown, "stop")])
        endpoint.send(Failed(unknown, "failed", "x"))
        endpoint.send(Stats(unknown))
    endpoint.outputs([], [(request_id, "y")], [Finished(request_id, "stop")])
    # And what is said of a request that is over.
    endpoint.outputs([(request_id, 3)], [(request_id, "z")], [Finished(request_id, "length")])
    (result,) = await calling
    assert (result.outputs[0].token_ids, result.outputs[0].text) == ([2, 2, 2], "y")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("invalid_request", InvalidRequestError),
        ("unavailable", EngineUnavailableError),
        ("failed", RequestFailedError),
    ],
)
async def test_a_failure_is_a_typed_error_and_the_others_of_the_call_are_aborted(
    endpoint: Endpoint, client: AsyncClient, kind: Any, expected: type[Exception]
) -> None:
    calling = in_background(failure(client.generate(["a", "b", "c"], use_tqdm=False)))
    ids = [(await endpoint.expect(Generate)).request_id for _ in range(3)]
    endpoint.send(Failed(ids[0], kind, "it is what it is", "prompt"))
    error = await calling
    assert type(error) is expected
    assert str(error) == "it is what it is"
    if isinstance(error, InvalidRequestError):
        assert error.param == "prompt"
    assert (await endpoint.expect(Abort)).request_ids == ids[1:]


async def test_a_failure_in_a_stream_comes_after_what_came_before_it(endpoint: Endpoint, client: AsyncClient) -> None:
    stream = client.stream("a")
    first = in_background(anext(stream))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 4)], [(request_id, "w")])
    assert await first == StreamChunk("w", [4])
    endpoint.send(Failed(request_id, "failed", "not a number"))
    assert isinstance(await failure(anext(stream)), RequestFailedError)


async def test_tokens_that_come_together_with_the_failure_are_not_lost(endpoint: Endpoint, client: AsyncClient) -> None:
    stream = client.stream("a")
    first = in_background(anext(stream))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 4)], [(request_id, "w")])
    endpoint.send(Failed(request_id, "failed", "not a number"))
    assert await first == StreamChunk("w", [4])
    assert isinstance(await failure(anext(stream)), RequestFailedError)


async def test_a_streamed_conversation_has_tools_and_template_options(endpoint: Endpoint, client: AsyncClient) -> None:
    messages, tool = [{"role": "user", "content": "hello"}], {"type": "function", "function": {"name": "f"}}
    stream = client.stream(messages, tools=[tool], chat_template_kwargs={"enable_thinking": False})
    first = in_background(anext(stream))
    request = await endpoint.expect(Generate)
    assert request.prompt == ChatPrompt(messages, [tool], {"enable_thinking": False})
    endpoint.outputs([(request.request_id, 4)], [], [Finished(request.request_id, "length")])
    await first


@pytest.mark.parametrize("options", [{"tools": []}, {"chat_template_kwargs": {}}], ids=str)
async def test_a_streamed_prompt_has_neither(endpoint: Endpoint, client: AsyncClient, options: dict[str, Any]) -> None:
    error = await failure(anext(client.stream("a", **options)))
    assert isinstance(error, InvalidRequestError)
    assert error.param in options
    await still_works(endpoint, client)


async def test_cancelling_and_leaving_abort_once_and_only_what_runs(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = asyncio.create_task(client.generate(["a", "b"], use_tqdm=False))
    ids = [(await endpoint.expect(Generate)).request_id for _ in range(2)]
    endpoint.outputs([(ids[0], 1)], [], [Finished(ids[0], "length")])
    statistics = in_background(client.stats())
    endpoint.send(Stats((await endpoint.expect(GetStats)).query_id))
    await statistics
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert (await endpoint.expect(Abort)).request_ids == [ids[1]]

    stream = client.stream("c")
    first = in_background(anext(stream))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 1)])
    await first
    await stream.aclose()
    assert (await endpoint.expect(Abort)).request_ids == [request_id]


async def test_closing_the_client_aborts_what_runs_and_ends_who_waits(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = in_background(failure(client.generate("a", use_tqdm=False)))
    request_id = (await endpoint.expect(Generate)).request_id
    await client.close()
    assert "the client was closed" in str(await calling)
    assert (await endpoint.expect(Abort)).request_ids == [request_id]
    await client.close()
    assert "the client was closed" in str(await failure(client.generate("a", use_tqdm=False)))


# --- an endpoint that goes wrong ------------------------------------------------------------------------------------


async def three_waiters(endpoint: Endpoint, client: AsyncClient) -> list[asyncio.Task[BaseException]]:
    async def read() -> None:
        async for _ in client.stream("b"):
            pass

    waiters = [in_background(failure(client.generate("a", use_tqdm=False))), in_background(failure(read()))]
    for _ in waiters:
        await endpoint.expect(Generate)
    waiters.append(in_background(failure(client.stats())))
    await endpoint.expect(GetStats)
    return waiters


async def test_an_endpoint_that_closes_its_socket_ends_everything_that_waits(
    endpoint: Endpoint, client: AsyncClient
) -> None:
    waiters = await three_waiters(endpoint, client)
    endpoint.close_socket()
    for error in await asyncio.gather(*waiters):
        assert isinstance(error, EngineUnavailableError)
        assert "has closed the connection" in str(error)
    assert isinstance(await failure(client.generate("a", use_tqdm=False)), EngineUnavailableError)
    assert isinstance(await failure(client.stats()), EngineUnavailableError)


async def test_what_was_sent_before_the_socket_closed_still_counts(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = in_background(client.generate("a", use_tqdm=False))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 9)], [(request_id, "last")], [Finished(request_id, "length")])
    endpoint.close_socket()
    assert (await calling)[0].outputs[0].text == "last"


async def test_a_dead_engine_whose_socket_is_still_there_is_noticed(endpoint: Endpoint, client: AsyncClient) -> None:
    waiters = await three_waiters(endpoint, client)
    endpoint.release()
    for error in await asyncio.gather(*waiters):
        assert isinstance(error, EngineUnavailableError)
        assert "the engine is gone" in str(error)


async def test_malformed_bytes_end_everything_that_waits(endpoint: Endpoint, client: AsyncClient) -> None:
    waiters = await three_waiters(endpoint, client)
    endpoint.send_bytes(b"\xc1\xc1")
    for error in await asyncio.gather(*waiters):
        assert isinstance(error, EngineUnavailableError)
        assert "cannot be understood" in str(error)


# --- what never leaves the client -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"prompts": None}, "prompts"),
        ({"prompts": [1.5]}, "prompt"),
        ({"prompts": "a", "sampling_params": {"temperature": 0}}, "sampling_params"),
        ({"prompts": "a", "sampling_params": []}, "sampling_params"),
        ({"prompts": "a", "priority": "high"}, "priority"),
        ({"prompts": "a", "priority": 2**31}, "priority"),
        ({"prompts": "a", "priority": True}, "priority"),
        ({"prompts": "a", "cache_salt": 5}, "cache_salt"),
        ({"prompts": "half of a pair: \ud83d"}, None),
    ],
    ids=ascii,
)
async def test_bad_input_is_refused_before_it_is_sent_and_the_client_goes_on(
    endpoint: Endpoint, client: AsyncClient, arguments: dict[str, Any], param: str | None
) -> None:
    async def read() -> None:
        stream_arguments = {"prompt" if name == "prompts" else name: value for name, value in arguments.items()}
        async for _ in client.stream(**stream_arguments):
            pass

    error = await failure(client.generate(use_tqdm=False, **arguments))
    assert isinstance(error, InvalidRequestError)
    assert error.param == param
    error = await failure(read())
    assert isinstance(error, InvalidRequestError)
    assert error.param == ("prompt" if param == "prompts" else param)
    await still_works(endpoint, client)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{1: "hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": object()}]}, None),
        ({"messages": [{"role": "user", "content": "a"}], "tools": ["f"]}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {1: 2}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a"}], "priority": None}, "priority"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else str(value),
)
async def test_a_bad_chat_is_refused_before_it_is_sent_and_the_client_goes_on(
    endpoint: Endpoint, client: AsyncClient, arguments: dict[str, Any], param: str | None
) -> None:
    error = await failure(client.chat(use_tqdm=False, **arguments))
    assert isinstance(error, InvalidRequestError)
    assert error.param == param
    await still_works(endpoint, client)


async def still_works(endpoint: Endpoint, client: AsyncClient) -> None:
    calling = in_background(client.generate("a", use_tqdm=False))
    request_id = (await endpoint.expect(Generate)).request_id
    endpoint.outputs([(request_id, 1)], [], [Finished(request_id, "length")])
    assert (await calling)[0].outputs[0].token_ids == [1]
