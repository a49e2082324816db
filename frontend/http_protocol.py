"""One HTTP connection, with the bounds that uvicorn's own has not: on header, on time, and on how many there are.

Time is bounded both ways: for a request to come, and for what is left of an answer to be taken.

Refuses in the OpenAI format before there is an application to do so. Knows nothing of paths and bodies.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from frontend.http_exchange import ABORT_KEY, ANSWER_READY_KEY
from frontend.openai_responses import ErrorBody, ErrorResponse

# Of the request line and all headers of one request; also of what follows a body in chunks.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 256
# What a client must take of a finished answer in each `receive_timeout_s`, or all that is left of it. By default a
# hundredth of the pace at which the longest body has to come.
LEAST_READ_BYTES = 256 * 1024
# Left for what is no HTTP connection: sockets to the core and to Python clients, files.
_RESERVED_DESCRIPTORS = 128


def max_connections() -> int:
    """As many as there are descriptors for: with more, nothing else could open a socket or a file."""
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED_DESCRIPTORS, 1)


logger = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """`receive_timeout_s` and `most_connections` are set by subclasses, since uvicorn makes the connections."""

    receive_timeout_s: float
    most_connections: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the header that is coming in: what the parser has told of, and what has come since it began.
        self._header_bytes = self._raw_header_bytes = 0
        self._is_in_header = False
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None
        self._num_unread = 0  # when the timer was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._refuse(503, f"more than {self.most_connections} connections are open")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_reading()
        super().connection_lost(exc)

    # --- time for what comes --------------------------------------------------------------------------------------

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.receive_timeout_s, self._on_timeout)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        """A request that has begun is not there as a whole, or a new connection has sent nothing."""
        if self.flow.read_paused:
            # It is this side that does not read: an answer before this request is under way.
            self._arm()
        elif self._is_in_header or (self.cycle is not None and not self.cycle.response_started):
            self._refuse(408, f"the request did not come within {self.receive_timeout_s:g} s (--receive-timeout)")
        else:
            self.transport.close()

    # --- time for what goes ---------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._require_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        # What it has taken cannot be told from what is left once more is written.
        self._num_unread = sys.maxsize

    def _require_reading(self) -> None:
        """There is no more of an answer to come: from now on it is the client that has to take it."""
        self._disarm_reading()
        if self.parser is None:
            return  # the connection is lost
        self._num_unread = self.transport.get_write_buffer_size()
        if self._num_unread:
            self._reading_timer = self.loop.call_later(self.receive_timeout_s, self._check_reading)

    def _check_reading(self) -> None:
        self._reading_timer = None
        num_unread = self.transport.get_write_buffer_size()
        if not num_unread:
            return
        if self._num_unread - num_unread >= LEAST_READ_BYTES:
            self._require_reading()
            return
        logger.warning("a client does not read its answer, of which %d bytes wait: closing its connection", num_unread)
        self.transport.abort()

    def _disarm_reading(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    # --- what has come --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        was_in_header = self._is_in_header
        super().data_received(data)
        if was_in_header and self._is_in_header:
            # The parser tells of a line only at its end, and takes any length till then.
            self._raw_header_bytes += len(data)
            self._require_short(self._raw_header_bytes)

    def on_message_begin(self) -> None:
        if self._timer is None:
            self._arm()
        self._is_in_header = True
        self._header_bytes = self._raw_header_bytes = 0
        if not self.flow.write_paused:
            # Of the answer before this request little is left. This one's is a matter of its own.
            self._disarm_reading()
        super().on_message_begin()
        # A request can end its connection at once, without waiting for a client that does not read.
        self.scope[ABORT_KEY] = self.transport.abort  # type: ignore[literal-required]
        self.scope[ANSWER_READY_KEY] = self._require_reading  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        self._header_bytes += len(url)
        self._require_short(self._header_bytes)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        self._require_short(self._header_bytes)
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refuse(431, f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._is_in_header = False
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        if not self._is_refused:
            super().on_message_complete()

    def _require_short(self, num_bytes: int) -> None:
        if num_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")

    # --- refusals -------------------------------------------------------------------------------------------------

    def _refuse(self, status: int, message: str) -> None:
        """Answers in the application's place, unless an answer is under way, and closes the connection."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._disarm()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            kind = "invalid_request_error" if status < 500 else "server_error"
            body = msgspec.json.encode(ErrorResponse(ErrorBody(message, kind)))
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")
