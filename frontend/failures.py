"""Errors as exceptions and as the messages that carry them: one table for all that send or receive them."""

from __future__ import annotations

from protocol.errors import (
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
    InvalidRequestError,
    RequestFailedError,
    RequestTimeoutError,
)
from protocol.messages import Failed


def error_of(failed: Failed) -> EngineError:
    """What is raised where a request failed."""
    if failed.kind == "invalid_request":
        return InvalidRequestError(failed.message, failed.param)
    if failed.kind == "overloaded":
        return EngineOverloadedError(failed.message, failed.retry_after or 1.0)
    if failed.kind == "timeout":
        return RequestTimeoutError(failed.message, failed.param)
    if failed.kind == "unavailable":
        return EngineUnavailableError(failed.message)
    return RequestFailedError(failed.message)


def failed_of(request_id: int, error: EngineError) -> Failed:
    """The message that tells of an error."""
    if isinstance(error, InvalidRequestError):
        return Failed(request_id, "invalid_request", error.message, error.param)
    if isinstance(error, EngineOverloadedError):
        return Failed(request_id, "overloaded", str(error), None, error.retry_after)
    if isinstance(error, RequestTimeoutError):
        return Failed(request_id, "timeout", str(error), error.param)
    if isinstance(error, EngineUnavailableError):
        return Failed(request_id, "unavailable", str(error))
    return Failed(request_id, "failed", str(error))
