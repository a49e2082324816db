"""Requests over HTTP, to any OpenAI-compatible server: streaming completions with prompts as token ids.

Speaks HTTP/1.1 on a bare asyncio protocol, with httptools and msgspec as its parsers: a general-purpose client costs
more per event than the servers measured, and the measurement would be of the client. Here an event of one token costs
7 µs of CPU, most of it for the read from its socket: a third of a core for 64 streams of 700 tokens/s.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec
from msgspec import Struct

from benchmarks.runner import RequestResult
from benchmarks.workloads import BenchmarkRequest


class _TokenDetails(Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(Struct, gc=False):
    completion_tokens: int
    prompt_tokens_details: _TokenDetails | None = None


class _Choice(Struct, gc=False):
    text: str | None = None
    token_ids: list[int] | None = None


class _Event(Struct, gc=False):
    """What is looked at in an event. The rest, such as a prompt's ids that come back, is skipped undecoded."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _ModelCard(Struct):
    id: str
    max_model_len: int | None = None


class _ModelList(Struct):
    data: list[_ModelCard]


_decode_event = msgspec.json.Decoder(_Event).decode
_encode = msgspec.json.encode


class _Response:
    """What httptools parses of one answer. The events of a stream go into `result` as they become whole.

    Attributes:
        status: 0 until the server has answered.
        keeps_connection: the connection is good for another request. Known when the response is complete.
        body: what came that was no whole line of a stream.
    """

    def __init__(self, result: RequestResult | None, counts_token_ids: bool) -> None:
        self.status = 0
        self.is_complete = False
        self.keeps_connection = False
        self.body = b""
        self._parser = httptools.HttpResponseParser(self)
        self._result = result
        self._counts_token_ids = counts_token_ids
        self._now = 0.0

    def feed(self, data: bytes, now: float) -> None:
        self._now = now
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._result is None or self.status != 200:
            self.body += body
            return
        *lines, self.body = (self.body + body).split(b"\n")
        for line in lines:
            # An event without an id or a type has one line, "data:" and JSON.
            if line.startswith(b"data:"):
                self._note(line[5:].strip(), self._result)

    def on_message_complete(self) -> None:
        self.is_complete = True
        # Asked here, because the parser forgets the message's headers when it is over.
        self.keeps_connection = self._parser.should_keep_alive()

    def _note(self, data: bytes, result: RequestResult) -> None:
        """Takes the tokens of one event. What counts is the usage that the server reports at the end."""
        if data == b"[DONE]":
            return
        event = _decode_event(data)
        for choice in event.choices:
            if self._counts_token_ids:
                count = len(choice.token_ids or ())
            else:
                count = 1 if choice.text or not result.token_times else 0
            result.token_times += [self._now] * count
        if event.usage is not None:
            result.output_len = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            result.cached_len = (details.cached_tokens if details is not None else None) or 0
        if event.error is not None:
            result.error = str(event.error)


class _Connection(asyncio.Protocol):
    """A connection to the server, for one exchange at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport
        self._response: _Response | None = None
        self._answered: asyncio.Future[None]

    async def exchange(self, message: bytes, response: _Response) -> None:
        """Sends a request and waits for all of its answer.

        Raises:
            ConnectionError: the server closed the connection before that.
            httptools.HttpParserError, msgspec.DecodeError: the answer is not HTTP, or its events are not JSON.
        """
        if not self.is_open:
            raise ConnectionError("the server closed the connection")
        self._response = response
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            await self._answered
        finally:
            self._response = None
            if not response.keeps_connection:
                self.close()

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.close()  # what nobody has asked for
            return
        try:
            response.feed(data, time.perf_counter())
        except (httptools.HttpParserError, msgspec.DecodeError, ValueError) as error:
            self._end(error)
        else:
            if response.is_complete:
                self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(ConnectionError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._response is None or self._answered.done():
            return
        if error is None:
            self._answered.set_result(None)
        else:
            self._answered.set_exception(error)


class HttpTransport:
    """A pool of connections to one server; each request has one for itself while it runs.

    A request's clock starts when it is sent: making a connection, where none is free, comes before that.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"--http must be a URL such as http://127.0.0.1:8000, got {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        # Both http://host:port and http://host:port/v1 are what people have at hand.
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._model = model
        self._max_model_len: int | None = None
        self._returns_token_ids = False
        self._idle: list[_Connection] = []

    async def connect(self) -> None:
        """Asks the server for its models, and whether it returns token ids.

        Raises:
            ConnectionError: no server answers there, or not as an OpenAI-compatible one does.
        """
        response = await self._ask("GET", "/v1/models", b"")
        try:
            models = msgspec.json.decode(response.body, type=_ModelList).data
        except msgspec.DecodeError:
            models = []
        if self._model is None:
            if not models:
                raise ConnectionError(f"{self._host}:{self._port} lists no models (status {response.status})")
            self._model = models[0].id
        self._max_model_len = next((card.max_model_len for card in models if card.id == self._model), None)
        probe = {"model": self._model, "prompt": [1, 2], "max_tokens": 1, "return_token_ids": True}
        response = await self._ask("POST", "/v1/completions", _encode(probe))
        # A server that does not know the field may refuse it, and may as well ignore it.
        self._returns_token_ids = response.status == 200 and b'"token_ids"' in response.body

    def describe(self) -> dict[str, str | int]:
        return {"address": f"http://{self._host}:{self._port}{self._path}/v1", "model": self._model or ""}

    async def vocab_size(self) -> int | None:
        return None

    async def max_model_len(self) -> int | None:
        return self._max_model_len

    async def send(self, request: BenchmarkRequest, temperature: float, result: RequestResult) -> None:
        body = {
            "model": self._model,
            "prompt": request.prompt_token_ids,
            "max_tokens": request.output_len,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._returns_token_ids:
            body["return_token_ids"] = True
        message = self._message("POST", "/v1/completions", _encode(body))
        try:
            response = await self._send(message, result)
        except (OSError, httptools.HttpParserError, msgspec.DecodeError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"
            return
        if response.status != 200:
            result.error = f"status {response.status}: {response.body[:300].decode('utf-8', 'replace')}"
        elif result.error is None and not result.output_len:
            result.error = "the server reported no usage, which is what counts the tokens"

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _send(self, message: bytes, result: RequestResult) -> _Response:
        """Sends on a connection of its own, which goes back to the pool if it is still good then.

        A server may close an idle connection at the very moment when it is used again. Where it has answered nothing
        on such a one, the request is sent once more.
        """
        while True:
            connection, is_new = await self._connection()
            response = _Response(result, self._returns_token_ids)
            result.sent = time.perf_counter()
            try:
                await connection.exchange(message, response)
            except OSError:
                if is_new or response.status:
                    raise
                continue
            if response.keeps_connection:
                self._idle.append(connection)
            return response

    async def _connection(self) -> tuple[_Connection, bool]:
        """A connection, and whether it is a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, False
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection, True

    async def _ask(self, method: str, path: str, body: bytes) -> _Response:
        """One exchange on a connection of its own."""
        connection, _ = await self._connection()
        response = _Response(None, False)
        try:
            await connection.exchange(self._message(method, path, body), response)
        finally:
            connection.close()
        return response

    def _message(self, method: str, path: str, body: bytes) -> bytes:
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body
