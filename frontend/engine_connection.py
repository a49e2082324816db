"""A Python client's connection to a running engine: handshake, heartbeat, and who gets what comes in.

Knows requests as what is sent and what comes back for each, not what users call for: that is `frontend.async_client`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from typing import Any

import zmq

from frontend.client_request import ClientRequest, check_options
from protocol.address import is_engine_running
from protocol.errors import EngineUnavailableError, InvalidRequestError
from protocol.logprobs import unpack_logprobs
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    EngineInfo,
    Failed,
    FrontendMessage,
    Generate,
    GetStats,
    Heartbeat,
    Hello,
    Outputs,
    Prompt,
    Received,
    Refused,
    Started,
    Stats,
    TokenPrompt,
    Welcome,
    unpack_ints,
)
from protocol.sampling import SamplingParams
from protocol.transport import MAX_MESSAGE_BYTES, AsyncChannel, DisconnectWatch, encode, open_socket

HEARTBEAT_S = 5.0
# How many bytes a client takes before it says so: a quarter of the least that --max-stream-buffer can be.
RECEIVED_EVERY_BYTES = 16 * 1024
# How often a client looks whether the engine is still there.
LOOK_S = 0.5


class EngineConnection:
    """One connection and the requests on it. Used from one event loop.

    Args:
        address: the engine's `ipc://` address.
        timeout: seconds to wait for an engine that is still starting.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._requests: dict[int, ClientRequest] = {}
        self._request_ids = itertools.count()
        self._queries: dict[int, asyncio.Future[Stats]] = {}
        self._channel: AsyncChannel | None = None
        self._gone: str | None = None
        self._num_bytes_confirmed = 0

    async def connect(self) -> EngineInfo:
        """Connects and returns what the engine says of itself.

        Raises:
            EngineUnavailableError: no engine is there, it does not become ready in time, or it refuses this client.
        """
        if not is_engine_running(self.address):
            raise EngineUnavailableError(
                f"no engine is running at {self.address}; start one with `python launch.py`, or pass its address"
            )
        self._welcome: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        socket = open_socket(zmq.Context.instance(), zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._watch = DisconnectWatch(socket, self._on_disconnect)
        self._channel = AsyncChannel(socket, FrontendMessage, self._on_message)
        socket.connect(self.address)
        self._channel.send(Hello(PROTOCOL_VERSION, HEARTBEAT_S))
        self._heart = asyncio.get_running_loop().create_task(self._beat())
        try:
            engine = await asyncio.wait_for(asyncio.shield(self._welcome), self._timeout)
        except TimeoutError:
            await self.close()
            raise EngineUnavailableError(
                f"the engine at {self.address} was not ready within {self._timeout:g} s"
            ) from None
        except BaseException:
            await self.close()
            raise
        return engine

    async def close(self) -> None:
        """Aborts what is running and closes the connection. May be called again."""
        if self._channel is None:
            return
        if self._gone is None and self._requests:
            # They stay in the table: whoever waits for one is told below.
            self._channel.send(Abort(list(self._requests)))
        self._heart.cancel()
        self._watch.close()
        self._channel.close()
        self._channel = None
        self._lose("the client was closed")

    async def _beat(self) -> None:
        """Tells the engine that this client lives, and notices when the engine does not."""
        last_beat = time.monotonic()
        while self._gone is None:
            await asyncio.sleep(LOOK_S)
            if not is_engine_running(self.address):
                self._lose("the engine is gone")
            elif self._channel is not None and time.monotonic() - last_beat > HEARTBEAT_S / 2:
                last_beat = time.monotonic()
                self._channel.send(Heartbeat())

    def _on_disconnect(self) -> None:
        # What came before the end counts, however much of it still waits.
        if self._channel is not None and not self._channel.socket.closed:
            self._channel.take_all()
        self._lose("the engine has closed the connection")

    def _lose(self, reason: str) -> None:
        """Ends everything that waits: nothing more will come."""
        if self._gone is not None:
            return
        self._gone = reason
        if not self._welcome.done():
            self._welcome.set_exception(EngineUnavailableError(f"{reason} ({self.address})"))
            # Nobody looks at it when the client was closed first.
            self._welcome.exception()
        for request in self._requests.values():
            request.error = EngineUnavailableError(f"{reason} before the request was finished ({self.address})")
            request.wake()
        self._requests.clear()
        for query in self._queries.values():
            if not query.done():
                query.set_exception(EngineUnavailableError(f"{reason} ({self.address})"))
        self._queries.clear()

    def require_connected(self) -> AsyncChannel:
        """Raises EngineUnavailableError if nothing can be sent."""
        if self._channel is None or self._gone is not None:
            raise EngineUnavailableError(f"{self._gone or 'the client is not connected'} ({self.address})")
        return self._channel

    def _on_message(self, _: bytes, message: Any) -> None:
        channel = self._channel
        if channel is not None and channel.num_bytes_received - self._num_bytes_confirmed > RECEIVED_EVERY_BYTES:
            self._num_bytes_confirmed = channel.num_bytes_received
            channel.send(Received(channel.num_bytes_received))
        if isinstance(message, Outputs):
            self._on_outputs(message)
        elif isinstance(message, Started):
            request = self._requests.get(message.request_id)
            if request is not None:
                request.prompt_token_ids = unpack_ints(message.prompt_token_ids).tolist()
        elif isinstance(message, Failed):
            request = self._requests.pop(message.request_id, None)
            query = self._queries.pop(message.request_id, None)
            if request is not None:
                request.fail(message)
            elif query is not None and not query.done():
                query.set_exception(EngineUnavailableError(f"{message.message} ({self.address})"))
        elif isinstance(message, Stats):
            query = self._queries.pop(message.query_id, None)
            if query is not None and not query.done():
                query.set_result(message)
        elif isinstance(message, Welcome):
            if message.protocol_version != PROTOCOL_VERSION:
                self._lose(f"the engine speaks protocol version {message.protocol_version}, not {PROTOCOL_VERSION}")
            elif not self._welcome.done():
                self._welcome.set_result(message.engine)
        elif isinstance(message, Refused):
            self._lose(message.reason)
        else:
            self._lose(f"the engine sent a message that cannot be understood: {message}")

    def _on_outputs(self, outputs: Outputs) -> None:
        """A step's tokens, or those of several, of all requests of this client, in one message."""
        now = time.perf_counter()
        requests = self._requests
        touched: dict[int, ClientRequest] = {}
        ids, tokens = unpack_ints(outputs.request_ids, "<i8").tolist(), unpack_ints(outputs.token_ids).tolist()
        for request_id, token in zip(ids, tokens, strict=True):
            request = requests.get(request_id)
            if request is not None:
                request.token_ids.append(token)
                request.metrics.token_times.append(now)
                if request.waiter is not None and not request.waits_for_end:
                    touched[request_id] = request
        for table in outputs.logprobs:
            for row, measured in unpack_logprobs(table):
                request = requests.get(ids[row])
                if request is not None:
                    request.logprobs.append(measured)
        for stretch in outputs.prompt_logprobs:
            request = requests.get(stretch.request_id)
            if request is not None:
                request.prompt_logprobs.append(stretch.tokens)
        for request_id, text in outputs.texts:
            request = requests.get(request_id)
            if request is not None:
                request.text_parts.append(text)
        for finished in outputs.finished:
            request = requests.pop(finished.request_id, None)
            if request is not None:
                request.finished = finished
                request.metrics.finished_time = now
                touched[request.request_id] = request
        for request in touched.values():
            if request.metrics.first_token_time is None and request.metrics.token_times:
                request.metrics.first_token_time = request.metrics.token_times[0]
            request.wake()

    def submit(
        self, prompt: Prompt, params: SamplingParams, stream: bool, options: Mapping[str, Any]
    ) -> list[ClientRequest]:
        """Sends a request for each answer that is wanted. Raises as `AsyncClient.generate` does."""
        check_options(**options)
        requests: list[ClientRequest] = []
        try:
            for index in range(params.n):
                requests.append(self.submit_choice(prompt, params, index, stream, options))
        except BaseException:
            self.abort([request.request_id for request in requests])
            raise
        return requests

    def submit_choice(
        self, prompt: Prompt, params: SamplingParams, index: int, stream: bool, options: Mapping[str, Any]
    ) -> ClientRequest:
        """Sends the request for one of the answers."""
        params = params.choice(index)
        ids = unpack_ints(prompt.token_ids).tolist() if isinstance(prompt, TokenPrompt) else []
        request = ClientRequest(next(self._request_ids), prompt, params, ids, time.perf_counter(), index)
        generate = Generate(request.request_id, prompt, params, stream, **options)
        try:
            frame = encode(generate)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            # Half of a surrogate pair in a text, or an object in a message that is no JSON.
            raise InvalidRequestError(f"the request cannot be encoded: {error}") from error
        if len(frame) > MAX_MESSAGE_BYTES:
            # The engine would cut off this client, with everything else that it has running.
            raise InvalidRequestError(f"the request takes {len(frame)} bytes, of which {MAX_MESSAGE_BYTES} are allowed")
        if not self.require_connected().send_frame(frame):
            raise EngineUnavailableError(f"the engine does not take requests at the moment ({self.address})")
        self._requests[request.request_id] = request
        return request

    def abort(self, request_ids: list[int]) -> None:
        """Ends those of them that have not ended."""
        running = [request_id for request_id in request_ids if self._requests.pop(request_id, None) is not None]
        if running and self._channel is not None and self._gone is None:
            self._channel.send(Abort(running))

    async def stats(self) -> Stats:
        """The engine's counters. Raises EngineUnavailableError if it cannot be asked."""
        query_id = next(self._request_ids)
        query: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        channel = self.require_connected()
        if not channel.send(GetStats(query_id)):
            raise EngineUnavailableError(f"the engine does not take queries at the moment ({self.address})")
        self._queries[query_id] = query
        return await query
