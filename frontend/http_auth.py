"""Asks for an API key, where the engine was started with some, before anything that takes a prompt.

State and metrics stay open, for load balancers and monitors. Keys are kept as digests and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.http_errors import error_response

_PROTECTED_PATHS = ("/tokenize", "/detokenize")
_PROTECTED_PREFIX = "/v1/"


class ApiKeyMiddleware:
    """Answers 401 in the application's place, unless a request to a protected path carries one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(_PROTECTED_PREFIX) or path in _PROTECTED_PATHS:
            problem = self._problem(scope)
            if problem is not None:
                error = HTTPException(401, problem, {"WWW-Authenticate": "Bearer"})
                await error_response(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        """What is wrong with the request's key. Takes as long for any key."""
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            return "an API key is needed: send it as the header `Authorization: Bearer KEY`"
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        if not any(matches):
            return "the API key is not one of this engine's"
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
