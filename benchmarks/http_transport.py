"""Requests over HTTP, to any OpenAI-compatible server: streaming completions with prompts as token ids.

Speaks HTTP/1.1 on plain asyncio streams with httptools as its parser: a general-purpose client costs more per event
than the servers measured, and the measurement would be of the client.
"""

from __future__ import annotations

import asyncio
import json
import time
from urllib.parse import urlsplit

import httptools

from benchmarks.runner import RequestResult
from benchmarks.workloads import BenchmarkRequest

_READ_BYTES = 64 * 1024


class _Response:
    """Collects what httptools parses: status, and the server-sent events that became whole since they were taken.

    Attributes:
        has_begun: the server has answered something.
        keeps_connection: the connection is good for another request. Known when the response is complete.
    """

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.has_begun = False
        self.is_complete = False
        self.keeps_connection = False
        self._body = b""

    def on_message_begin(self) -> None:
        self.has_begun = True

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.is_complete = True
        # Asked here, because the parser forgets the message's headers when it is over.
        self.keeps_connection = self.parser.should_keep_alive()

    def take_events(self) -> list[bytes]:
        """The data of each event. What comes without an id or a type has one line, "data:" and JSON."""
        *lines, self._body = self._body.split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def rest(self) -> bytes:
        return self._body


class HttpTransport:
    """A pool of connections to one server; each request has one for itself while it runs."""

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"--http must be a URL such as http://127.0.0.1:8000, got {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        # Both http://host:port and http://host:port/v1 are what people have at hand.
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._model = model
        self._returns_token_ids = False
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect(self) -> None:
        """Asks the server for its model, if none was named, and whether it returns token ids.

        Raises:
            ConnectionError: no server answers there, or not as an OpenAI-compatible one does.
        """
        if self._model is None:
            status, body = await self._exchange("GET", "/v1/models", b"")
            try:
                self._model = json.loads(body)["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                raise ConnectionError(f"{self._host}:{self._port} lists no models (status {status})") from None
        probe = {"model": self._model, "prompt": [1, 2], "max_tokens": 1, "return_token_ids": True}
        status, body = await self._exchange("POST", "/v1/completions", json.dumps(probe).encode())
        # A server that does not know the field may refuse it, and may as well ignore it.
        self._returns_token_ids = status == 200 and b'"token_ids"' in body

    def describe(self) -> dict[str, str | int]:
        return {"address": f"http://{self._host}:{self._port}{self._path}/v1", "model": self._model or ""}

    async def vocab_size(self) -> int | None:
        return None

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
        encoded = json.dumps(body).encode()
        message = self._head("POST", "/v1/completions", encoded) + encoded
        try:
            response = await self._send(message, result)
        except (OSError, httptools.HttpParserError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"
            return
        if response.parser.get_status_code() != 200:
            result.error = (
                f"status {response.parser.get_status_code()}: {response.rest()[:300].decode('utf-8', 'replace')}"
            )
        elif result.error is None and not result.output_len:
            result.error = "the server reported no usage, which is what counts the tokens"

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _send(self, request: bytes, result: RequestResult) -> _Response:
        """Sends on a connection of its own, which goes back to the pool if it is still good then.

        A server may close an idle connection at the very moment when it is used again. Where it has answered nothing
        on such a one, the request is sent once more.
        """
        while True:
            reader, writer, is_new = await self._connection()
            response = _Response()
            result.sent = time.perf_counter()
            try:
                writer.write(request)
                await self._receive(reader, response, result)
            except OSError:
                if is_new or response.has_begun:
                    raise
                continue
            finally:
                if response.keeps_connection:
                    self._idle.append((reader, writer))
                else:
                    writer.close()
            return response

    async def _receive(self, reader: asyncio.StreamReader, response: _Response, result: RequestResult) -> None:
        while not response.is_complete:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise ConnectionError("the server closed the connection")
            now = time.perf_counter()
            response.parser.feed_data(data)
            if response.parser.get_status_code() == 200:
                for event in response.take_events():
                    self._note(event, now, result)

    def _note(self, event: bytes, now: float, result: RequestResult) -> None:
        """Takes the tokens of one event. What counts is the usage that the server reports at the end."""
        if event == b"[DONE]":
            return
        chunk = json.loads(event)
        if "error" in chunk:
            result.error = str(chunk["error"])
        for choice in chunk.get("choices", ()):
            if self._returns_token_ids:
                count = len(choice.get("token_ids") or ())
            else:
                count = 1 if choice.get("text") or not result.token_times else 0
            result.token_times += [now] * count
        if chunk.get("usage"):
            result.output_len = chunk["usage"]["completion_tokens"]
            details = chunk["usage"].get("prompt_tokens_details") or {}
            result.cached_len = details.get("cached_tokens") or 0

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """A connection, and whether it is a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer, False
            writer.close()
        return *await asyncio.open_connection(self._host, self._port), True

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        reader, writer, _ = await self._connection()
        try:
            writer.write(self._head(method, path, body) + body)
            response = _Response()
            while not response.is_complete:
                data = await reader.read(_READ_BYTES)
                if not data:
                    raise ConnectionError(f"{self._host}:{self._port} closed the connection")
                response.parser.feed_data(data)
        finally:
            writer.close()
        return response.parser.get_status_code(), response.rest()

    def _head(self, method: str, path: str, body: bytes) -> bytes:
        return (
            f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
