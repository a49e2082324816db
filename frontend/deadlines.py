"""How long a request may take, from its arrival to its end: what may be asked for, and the error when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

from protocol.errors import InvalidRequestError, RequestTimeoutError


def timeout_of(given: float | None, default: float) -> float | None:
    """The seconds that a request gets: those that it asks for, or else the server's default, of which 0 is no limit.

    Raises:
        InvalidRequestError: it asks for what is no time.
    """
    if given is None:
        return default or None
    if not (math.isfinite(given) and given > 0):
        raise InvalidRequestError.out_of_range("timeout", given, "a positive number of seconds")
    return given


def timeout_error(timeout: float) -> RequestTimeoutError:
    return RequestTimeoutError(f"the request was not finished within its timeout of {timeout:g} s", "timeout")


def seconds_left(arrival_time: float, timeout: float) -> float:
    """Until the deadline of a request that arrived then, of `time.perf_counter()`; 0 if it has passed."""
    return max(arrival_time + timeout - time.perf_counter(), 0.0)


@contextlib.asynccontextmanager
async def time_limit(arrival_time: float, timeout: float | None) -> AsyncIterator[None]:
    """Bounds what is awaited before a request is running. Raises RequestTimeoutError when its time is over."""
    if timeout is None:
        yield
        return
    try:
        async with asyncio.timeout(seconds_left(arrival_time, timeout)):
            yield
    except TimeoutError:
        raise timeout_error(timeout) from None
