"""Errors in the OpenAI format: which status, type and code each of the engine's errors has.

Every error response of the server is made here, those of the router included.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from frontend.openai_responses import ErrorBody, ErrorResponse
from protocol.errors import EngineOverloadedError, EngineUnavailableError, InvalidRequestError, RequestTimeoutError

_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that this engine does not serve."""


class ResponseNotFoundError(InvalidRequestError):
    """The request names a stored response that is not there."""


def require_model(name: str | None, served: str) -> None:
    """Raises ModelNotFoundError if a request names another model than the one that is served."""
    if name is not None and name != served:
        raise ModelNotFoundError(f"the model {name!r} does not exist here; this engine serves {served!r}", "model")


def error_status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, ModelNotFoundError | ResponseNotFoundError):
        return 404
    if isinstance(error, InvalidRequestError):
        return 400
    if isinstance(error, EngineOverloadedError):
        return 429
    if isinstance(error, RequestTimeoutError):
        return 504
    return 503 if isinstance(error, EngineUnavailableError) else 500


def error_body(error: Exception) -> ErrorResponse:
    """The body of a response, or of the last event of a stream that cannot go on."""
    if isinstance(error, ModelNotFoundError):
        return ErrorResponse(ErrorBody(error.message, "invalid_request_error", error.param, "model_not_found"))
    if isinstance(error, ResponseNotFoundError):
        return ErrorResponse(ErrorBody(error.message, "invalid_request_error", error.param, "response_not_found"))
    if isinstance(error, InvalidRequestError):
        return ErrorResponse(ErrorBody(error.message, "invalid_request_error", error.param))
    if isinstance(error, HTTPException):
        return ErrorResponse(ErrorBody(error.detail, "invalid_request_error", None, _CODES.get(error.status_code)))
    if isinstance(error, EngineOverloadedError):
        return ErrorResponse(ErrorBody(str(error), "rate_limit_error", None, "rate_limit_exceeded"))
    if isinstance(error, RequestTimeoutError):
        return ErrorResponse(ErrorBody(str(error), "timeout_error", error.param, "timeout"))
    code = "engine_unavailable" if isinstance(error, EngineUnavailableError) else None
    return ErrorResponse(ErrorBody(str(error), "server_error", None, code))


def error_response(request: Request, error: Exception) -> Response:
    headers = _headers(error)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error.detail = f"{request.method} {request.url.path} is not served here"
    body = msgspec.json.encode(error_body(error))
    return Response(body, error_status(error), headers, media_type="application/json")


def _headers(error: Exception) -> Mapping[str, str] | None:
    if isinstance(error, HTTPException):
        return error.headers
    if isinstance(error, EngineOverloadedError):
        return {"Retry-After": f"{error.retry_after:.0f}"}
    if isinstance(error, RequestTimeoutError):
        # OpenAI's clients would ask twice more, when the time is over that the answer was wanted in.
        return {"X-Should-Retry": "false"}
    return None


def internal_error_response(_: Request, error: Exception) -> Response:
    """For errors that only a bug can cause; the server logs them with their traceback."""
    body = ErrorResponse(ErrorBody(f"internal error: {type(error).__name__}", "server_error"))
    return Response(msgspec.json.encode(body), 500, media_type="application/json")
