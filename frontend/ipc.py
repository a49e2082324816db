"""The IPC endpoint for Python clients: one ROUTER socket, one `ClientConnection` for each client.

What a client sends never raises here: it is answered, or logged where nobody can be answered.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from typing import Any

import msgspec
import zmq

from frontend.admission import Reservation
from frontend.client_identity import ipc_client
from frontend.deadlines import time_limit
from frontend.failures import failed_of
from frontend.prompts import RenderedPrompt, is_long
from frontend.requests import RunningRequest
from frontend.service import Service
from protocol.config import parse_size
from protocol.errors import ConfigError, EngineError
from protocol.logprobs import PromptLogprobs, TokenLogprob, pack_logprobs
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    ClientMessage,
    Failed,
    Finished,
    Generate,
    GetStats,
    Heartbeat,
    Hello,
    Malformed,
    Outputs,
    Received,
    Refused,
    Started,
    Stats,
    TokenPrompt,
    Welcome,
    pack_ints,
)
from protocol.transport import AsyncChannel, encode, open_socket

logger = logging.getLogger(__name__)

# A client that misses this many heartbeats in a row is gone.
_MISSED_HEARTBEATS = 3
_WATCH_INTERVAL_S = 0.5
_MIN_HEARTBEAT_S, _MAX_HEARTBEAT_S = 0.1, 3600.0
_TOO_SLOW = "does not read its answers, and more waits for it than --max-stream-buffer allows"
# Requests that have ended count for what may wait for a client, but only the last: it may never say what it has taken.
_MOST_ENDS = 16
# Of each client. What comes is handled at once, and what a client sends beyond that waits in its own memory.
_MAX_RECEIVED = 1000
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class ClientConnection:
    """A client that has said hello, its requests, and its share of the steps that are being passed on."""

    def __init__(self, server: IpcServer, identity: bytes, heartbeat_s: float, now: float) -> None:
        self.identity = identity
        self.number = ipc_client(identity)
        self.heartbeat_s = heartbeat_s
        self.last_heard = now
        self.requests: dict[int, RunningRequest] = {}
        self._num_bytes_sent = self._num_bytes_taken = 0
        # How much had been sent at each of the last ends that have not been taken.
        self._ends_sent: deque[int] = deque(maxlen=_MOST_ENDS)
        self.encoding: dict[int, asyncio.Task[None]] = {}
        self._server = server
        self._request_ids: list[int] = []
        self._token_ids: list[int] = []
        self._texts: list[tuple[int, str]] = []
        self._finished: list[Finished] = []
        self._logprobs: list[tuple[int, TokenLogprob]] = []
        self._prompt_logprobs: list[PromptLogprobs] = []

    def add(self, request: RunningRequest, token_id: int, text: str) -> None:
        if request.logprobs:
            self._logprobs.append((len(self._token_ids), request.logprobs[-1]))
        if len(request.token_ids) == 1:
            self._add_prompt_logprobs(request)
        self._request_ids.append(request.tag)
        self._token_ids.append(token_id)
        if text:
            self._texts.append((request.tag, text))

    def finish(self, request: RunningRequest, text: str, finished: Finished) -> None:
        if not request.stream:
            self._logprobs += enumerate(request.logprobs, len(self._token_ids))
            self._add_prompt_logprobs(request)
            self._request_ids += [request.tag] * len(request.token_ids)
            self._token_ids += request.token_ids
        if text:
            self._texts.append((request.tag, text))
        self.ended(finished)
        self.requests.pop(request.tag, None)

    def _add_prompt_logprobs(self, request: RunningRequest) -> None:
        if request.prompt_is_measured:
            self._prompt_logprobs += [PromptLogprobs(request.tag, stretch) for stretch in request.prompt_logprobs]

    def ended(self, finished: Finished) -> None:
        self._finished.append(finished)
        self._ends_sent.append(self._num_bytes_sent + 1)

    def fail(self, request: RunningRequest, failed: Failed) -> None:
        self.requests.pop(request.tag, None)
        # What came before the failure goes first.
        self.flush()
        self._server.send(self, failed)

    def count_sent(self, num_bytes: int) -> None:
        self._num_bytes_sent += num_bytes

    def on_received(self, num_bytes: int) -> None:
        """The client says how much it has taken of what was sent."""
        self._num_bytes_taken = min(num_bytes, self._num_bytes_sent)
        while self._ends_sent and self._ends_sent[0] <= self._num_bytes_taken:
            self._ends_sent.popleft()

    def is_too_slow(self, most_bytes: int) -> bool:
        """Whether more waits for it than `most_bytes` for each request that runs, and for each of the last that have
        ended whose output it has not taken in full."""
        waiting = self._num_bytes_sent - self._num_bytes_taken
        return waiting > most_bytes and waiting > most_bytes * (len(self.requests) + len(self._ends_sent))

    def flush(self) -> None:
        """Sends what has gathered since the last time, as one message."""
        if not self._request_ids and not self._finished:
            return
        outputs = Outputs(
            pack_ints(self._request_ids, "<i8"),
            pack_ints(self._token_ids),
            self._texts,
            self._finished,
            pack_logprobs(self._logprobs) if self._logprobs else [],
            self._prompt_logprobs,
        )
        self._request_ids, self._token_ids, self._texts, self._finished = [], [], [], []
        self._logprobs, self._prompt_logprobs = [], []
        self._server.send(self, outputs)


class IpcServer:
    """Serves Python clients from the moment it is made; those that come before the engine is ready wait for Welcome."""

    def __init__(self, context: zmq.Context, address: str, service: Service) -> None:
        """Raises ConfigError if the address cannot be bound."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._clients: dict[bytes, ClientConnection] = {}
        self._ready = False
        self._max_stream_buffer = parse_size(service.config.options.max_stream_buffer, "--max-stream-buffer")
        try:
            socket = open_socket(context, zmq.ROUTER, bind=address, max_received=_MAX_RECEIVED)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot serve on {address}: {error.strerror}; choose another with --ipc") from error
        self._channel = AsyncChannel(socket, ClientMessage, self._on_message)
        self._watcher = self._loop.create_task(self._watch())

    def engine_ready(self) -> None:
        """Welcomes the clients that have been waiting."""
        self._ready = True
        for client in list(self._clients.values()):
            client.last_heard = self._loop.time()
            self._welcome(client)

    def send(self, client: ClientConnection, message: Any) -> None:
        """Sends to a client; one that cannot be sent to is gone, and its requests with it.

        So is one that does not read what it was sent, once that is too much to keep for it.
        """
        if client.is_too_slow(self._max_stream_buffer):
            if self._is_here(client):
                self._channel.send(Refused(f"this client {_TOO_SLOW}: its requests were aborted"), client.identity)
                self._drop(client, _TOO_SLOW)
            return
        frame = encode(message)
        client.count_sent(len(frame))
        if not self._channel.send_frame(frame, client.identity) and self._is_here(client):
            self._drop(client, "cannot be reached")

    def _is_here(self, client: ClientConnection) -> bool:
        return self._clients.get(client.identity) is client

    def close(self) -> None:
        self._watcher.cancel()
        for client in self._clients.values():
            for task in client.encoding.values():
                task.cancel()
        self._channel.close()

    def _on_message(self, identity: bytes, message: Any) -> None:
        client = self._clients.get(identity)
        if client is not None:
            client.last_heard = self._loop.time()
        if isinstance(message, Hello):
            self._on_hello(identity, message)
        elif isinstance(message, Malformed):
            # The reason may hold a part of the message, which is not for the log.
            self._refuse(identity, f"message not understood: {message.reason}", "a message was not understood")
        elif client is None:
            self._refuse(identity, f"{type(message).__name__} from an unknown client: send Hello first")
        elif isinstance(message, Generate):
            self._on_generate(client, message)
        elif isinstance(message, Abort):
            self._on_abort(client, message)
        elif isinstance(message, GetStats):
            self._on_get_stats(client, message.query_id)
        elif isinstance(message, Received):
            client.on_received(message.num_bytes)
        else:
            assert isinstance(message, Heartbeat)

    def _refuse(self, identity: bytes, reason: str, logged: str | None = None) -> None:
        logger.warning("refused a client's message: %s", logged or reason)
        client = self._clients.get(identity)
        if client is not None:
            self.send(client, Refused(reason))
        else:
            self._channel.send(Refused(reason), identity)

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            self._refuse(
                identity,
                f"this engine speaks protocol version {PROTOCOL_VERSION}, the client version "
                f"{hello.protocol_version}: use the client that came with the engine",
            )
        elif self._service.state in ("stopping", "failed"):
            self._refuse(identity, f"no new clients: {self._service.unavailable_reason}")
        elif not _MIN_HEARTBEAT_S <= hello.heartbeat_s <= _MAX_HEARTBEAT_S:
            expected = f"{_MIN_HEARTBEAT_S} to {_MAX_HEARTBEAT_S} seconds"
            self._refuse(identity, f"heartbeat_s must be {expected}, got {hello.heartbeat_s}")
        else:
            client = self._clients.get(identity)
            if client is None:
                client = ClientConnection(self, identity, hello.heartbeat_s, self._loop.time())
                self._clients[identity] = client
            client.heartbeat_s = hello.heartbeat_s
            if self._ready:
                self._welcome(client)

    def _welcome(self, client: ClientConnection) -> None:
        self.send(client, Welcome(PROTOCOL_VERSION, self._service.engine))

    def _on_generate(self, client: ClientConnection, generate: Generate) -> None:
        request_id = generate.request_id
        if not _INT64_MIN <= request_id <= _INT64_MAX:
            self._refuse(client.identity, f"request_id must be a signed 64-bit integer, got {request_id}")
            return
        if request_id in client.requests or request_id in client.encoding:
            self._refuse(client.identity, f"request_id {request_id} is running already")
            return
        try:
            self._service.require_ready()
            self._service.timeout_of(generate.timeout)
            with self._service.admission.reserve(1):
                rendered = self._service.prompts.render(generate.prompt, generate.params.truncate_prompt_tokens)
                if not is_long(rendered) and generate.params.structured_outputs is None:
                    truncate = generate.params.truncate_prompt_tokens
                    self._submit(client, generate, self._service.prompts.encode(rendered, truncate))
                    return
            num_bytes = sys.getsizeof(rendered.text) if isinstance(rendered, RenderedPrompt) else 0
            place = self._service.admission.reserve(1, num_bytes)
            task = self._loop.create_task(self._encode_and_submit(client, generate, rendered, place))
            # Not by the task itself, which may be cancelled before it begins.
            task.add_done_callback(lambda _: place.release())
            client.encoding[request_id] = task
        except Exception as error:
            self._fail(client, request_id, error)

    async def _encode_and_submit(
        self,
        client: ClientConnection,
        generate: Generate,
        rendered: RenderedPrompt | list[int],
        place: Reservation,
    ) -> None:
        arrived = time.perf_counter()
        try:
            # What came right after it, an abort perhaps, goes first: until a text is encoded, little else may run.
            await asyncio.sleep(0)
            async with time_limit(arrived, self._service.timeout_of(generate.timeout)):
                truncate = generate.params.truncate_prompt_tokens
                token_ids = await self._service.prompts.encode_in_thread(rendered, truncate)
                grammar = await self._service.grammars.of_answer(
                    generate.params.structured_outputs, generate.prompt, token_ids
                )
            self._service.require_ready()
            if self._is_here(client):
                self._submit(client, generate, token_ids, arrived, grammar)
                place.release()
        except Exception as error:
            self._fail(client, generate.request_id, error)
        finally:
            # After an abort the id may already belong to another request.
            if client.encoding.get(generate.request_id) is asyncio.current_task():
                del client.encoding[generate.request_id]

    def _submit(
        self,
        client: ClientConnection,
        generate: Generate,
        token_ids: list[int],
        arrived: float | None = None,
        grammar: str | None = None,
    ) -> None:
        params = self._service.prompts.fit_max_tokens(generate.params, token_ids)
        self._service.admission.require_tokens(len(token_ids))
        request = self._service.requests.submit(
            token_ids,
            params,
            client,
            generate.request_id,
            stream=generate.stream,
            priority=generate.priority,
            cache_salt=generate.cache_salt,
            arrival_time=arrived,
            grammar=grammar,
            timeout=self._service.timeout_of(generate.timeout),
            client=client.number,
        )
        client.requests[generate.request_id] = request
        if not isinstance(generate.prompt, TokenPrompt) or params.truncate_prompt_tokens is not None:
            self.send(client, Started(generate.request_id, pack_ints(token_ids)))

    def _fail(self, client: ClientConnection, request_id: int, error: Exception) -> None:
        """Answers a request that cannot be served. Call where the error is handled."""
        if isinstance(error, EngineError):
            self.send(client, failed_of(request_id, error))
            return
        # A bug: whoever waits is told that there is one, and the log where it is.
        logger.exception("a request could not be handled")
        self.send(client, Failed(request_id, "failed", f"internal error: {type(error).__name__}"))

    def _on_abort(self, client: ClientConnection, abort: Abort) -> None:
        """Ends requests where they are. Each is answered, so that whoever waits for one is not left waiting."""
        requests = []
        for request_id in abort.request_ids:
            request = client.requests.pop(request_id, None)
            task = client.encoding.pop(request_id, None)
            if request is not None:
                requests.append(request)
            elif task is not None:
                task.cancel()
            else:
                continue
            client.ended(Finished(request_id, "abort"))
        self._service.requests.abort(requests)
        client.flush()

    def _on_get_stats(self, client: ClientConnection, query_id: int) -> None:
        def answer(stats: Stats | None) -> None:
            if not self._is_here(client):
                return
            if stats is None:
                self.send(client, Failed(query_id, "unavailable", "the engine core does not answer"))
            else:
                self.send(client, msgspec.structs.replace(stats, query_id=query_id))

        self._service.core.query_stats(answer)

    async def _watch(self) -> None:
        """Drops clients that have fallen silent."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if not self._ready:
                # Clients that wait for Welcome have nothing to say yet.
                continue
            now = self._loop.time()
            for client in list(self._clients.values()):
                if now - client.last_heard > _MISSED_HEARTBEATS * client.heartbeat_s:
                    self._drop(client, f"has been silent for {now - client.last_heard:.1f} s")

    def _drop(self, client: ClientConnection, why: str) -> None:
        del self._clients[client.identity]
        for task in client.encoding.values():
            task.cancel()
        requests = list(client.requests.values())
        client.requests.clear()
        if requests:
            logger.warning("a client %s: aborting its %d requests", why, len(requests))
            self._service.requests.abort(requests)
