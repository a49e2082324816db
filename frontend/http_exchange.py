"""What every HTTP request gets, whatever it asks for: an id, and with --access-log a line when it is over.

Wraps the whole application, so that refusals of the router and internal errors have both too. Sees paths and counts,
never bodies or headers other than the id's.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontend.http_errors import error_response
from frontend.requests import RunningRequest
from protocol.errors import InvalidRequestError
from protocol.logs import current_request_id

REQUEST_ID_HEADER = "X-Request-Id"
# Long enough for what proxies make up; nothing in it can break a log line or a header.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:;/+=@,~-]{1,200}")
_LONGEST_PATH = 256
# What the log says where the client left before there was a status, as other servers do.
_CLIENT_LEFT = 499
_SCOPE_KEY = "mini_vllm.exchange"
# Where the server puts what ends the connection of a request.
ABORT_KEY = "mini_vllm.abort"
# And what it wants to be told when there is no more of an answer to come than what is being sent.
ANSWER_READY_KEY = "mini_vllm.answer_ready"

access_logger = logging.getLogger("frontend.access")


class Exchange:
    """One HTTP request and its response.

    Attributes:
        request_id: the client's own id, or a random one.
        status: of the response, once it has begun.
        send_body: the server's own `send`, for what follows the start of a response: each layer of the application
            wraps `send`, all of them to see or change the start alone, and a stream has an event for every token.
        answer_ready: to be called when there is no more of a stream to come: from then on the client has to read.
    """

    def __init__(
        self, request_id: str, send_body: Send, abort: Callable[[], None], answer_ready: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self.send_body = send_body
        self.answer_ready = answer_ready
        self._abort = abort
        self.status: int | None = None
        self._started = time.perf_counter()
        self._num_tokens: dict[str, int] = {}

    def abort(self) -> None:
        """Ends the connection where it is: what the client has not read is dropped."""
        self._abort()

    def count_tokens(self, requests: Sequence[RunningRequest], num_choices: int) -> None:
        """Notes what the requests behind this exchange took and gave, for the log. So many answer each prompt."""
        self._num_tokens = {
            "prompt_tokens": sum(len(request.prompt_token_ids) for request in requests[::num_choices]),
            "completion_tokens": sum(len(request.token_ids) for request in requests),
        }

    def log(self, scope: Scope) -> None:
        # As it was sent, since decoded it may hold line breaks; without the query, which may hold anything.
        path = scope["raw_path"].decode("ascii", "backslashreplace")
        fields = {
            "method": scope["method"],
            "path": path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}…",
            "status": _CLIENT_LEFT if self.status is None else self.status,
            "duration_ms": round((time.perf_counter() - self._started) * 1000, 1),
            "request_id": self.request_id,
            **self._num_tokens,
        }
        access_logger.info("access", extra={"fields": fields})


def exchange_of(scope: Scope) -> Exchange:
    exchange: Exchange = scope[_SCOPE_KEY]
    return exchange


class ExchangeMiddleware:
    """Gives each request its `Exchange`, and each response the request's id."""

    def __init__(self, app: ASGIApp, *, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log
        if access_log:
            # Asked for by name, so also where --log-level wants nothing else of this level.
            access_logger.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        is_sound = given is not None and _REQUEST_ID.fullmatch(given) is not None
        request_id = given.decode() if given is not None and is_sound else uuid.uuid4().hex
        exchange = Exchange(request_id, send, scope[ABORT_KEY], scope[ANSWER_READY_KEY])
        scope[_SCOPE_KEY] = exchange
        # The server gives every request a task of its own, and the variable goes with it.
        current_request_id.set(exchange.request_id)

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                header = (REQUEST_ID_HEADER.lower().encode(), exchange.request_id.encode())
                message["headers"] = [*message.get("headers", ()), header]
            return send(message)

        try:
            if given is None or is_sound:
                await self._app(scope, receive, send_with_id)
            else:
                message = f"{REQUEST_ID_HEADER} must be 1 to 200 letters, digits and ._:;/+=@,~-, got {given!r:.100}"
                error = InvalidRequestError(message, REQUEST_ID_HEADER)
                await error_response(Request(scope), error)(scope, receive, send_with_id)
        finally:
            if self._access_log:
                exchange.log(scope)
