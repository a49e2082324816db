"""How much may wait: requests, the tokens of their prompts, and the bytes of prompts that are no tokens yet.

Bytes wait from the moment that they are read, and a request from its arrival until its first token. What is over a
limit is refused before it reaches the core, and told when to come again. Knows counts only: nothing of HTTP, of
clients, or of what a request asks for.
"""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

import msgspec

from protocol.config import EngineOptions, parse_size
from protocol.errors import EngineOverloadedError

# Seconds over which the rate is observed at which requests stop waiting.
_MEMORY_S = 10.0
_LONGEST_RETRY_S = 600.0


class AdmissionLimits(msgspec.Struct, frozen=True):
    """The most that may wait; 0 is no limit."""

    requests: int
    tokens: int
    num_bytes: int

    @staticmethod
    def of(options: EngineOptions) -> AdmissionLimits:
        size = options.max_waiting_bytes
        return AdmissionLimits(
            options.max_waiting, options.max_waiting_tokens, parse_size(size, "--max-waiting-bytes", zero_is_none=True)
        )


class Admission:
    """Counts what waits. What finds nothing waiting is taken whatever its size, so that nothing is refused for ever.

    Attributes:
        num_requests, num_tokens: that wait in the core.
        num_refused: requests that were over a limit; a body that was refused while it was read is one.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        # Of requests whose prompts are being made into tokens.
        self._num_reserved = 0
        self._num_bytes = 0
        self._request_rate = _Rate()
        self._token_rate = _Rate()

    def reserve(self, num_requests: int = 0, num_bytes: int = 0) -> Reservation:
        """Room for requests whose prompts are still to be tokenized, `num_bytes` of them in memory.

        Raises:
            EngineOverloadedError: there is no room.
        """
        place = Reservation(self)
        place.add(num_requests, num_bytes)
        return place

    def take(self, place: Reservation, num_requests: int, num_bytes: int) -> None:
        """See `Reservation.add`."""
        waiting = self.num_requests + self._num_reserved
        is_beside_others = waiting > place.num_requests
        total_bytes = self._num_bytes + num_bytes
        if num_requests and is_beside_others:
            wanted = waiting + num_requests
            self._require(wanted, self._limits.requests, "requests", "--max-waiting", num_requests)
            # Here already, so that a full engine does not tokenize what it then refuses.
            self._require(self.num_tokens, self._limits.tokens, "tokens", "--max-waiting-tokens", num_requests)
        if num_bytes and (is_beside_others or self._num_bytes > place.num_bytes):
            self._require(total_bytes, self._limits.num_bytes, "bytes", "--max-waiting-bytes", max(num_requests, 1))
        self._num_reserved += num_requests
        self._num_bytes = total_bytes

    def require_tokens(self, num_tokens: int, num_requests: int = 1) -> None:
        """Raises EngineOverloadedError if there is no room for requests with so many tokens in all."""
        if self.num_requests:
            wanted = self.num_tokens + num_tokens
            self._require(wanted, self._limits.tokens, "tokens", "--max-waiting-tokens", num_requests)

    def begin(self, num_tokens: int) -> None:
        """A request with so many tokens waits from now on."""
        self.num_requests += 1
        self.num_tokens += num_tokens

    def end(self, num_tokens: int, *, is_answered: bool) -> None:
        """It no longer waits, since it has had its first token, or has ended without one."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if is_answered:
            now = time.perf_counter()
            self._request_rate.count(1, now)
            self._token_rate.count(num_tokens, now)

    def release(self, num_requests: int, num_bytes: int) -> None:
        self._num_reserved -= num_requests
        self._num_bytes -= num_bytes

    def _require(self, wanted: int, limit: int, what: str, flag: str, num_requests: int) -> None:
        """Refuses so many requests if more is wanted than a limit that is set."""
        if not limit or wanted <= limit:
            return
        self.num_refused += num_requests
        retry_after = self._seconds_until(wanted - limit, what)
        raise EngineOverloadedError(
            f"the engine is overloaded: {wanted} {what} would wait, of which {flag} allows {limit}; "
            f"try again in {retry_after:.0f} s",
            retry_after,
        )

    def _seconds_until(self, excess: int, what: str) -> float:
        """Whole seconds in which so much stops waiting, at the rate of the last seconds; 1 if there is none yet."""
        rate = (self._token_rate if what == "tokens" else self._request_rate).per_second(time.perf_counter())
        # Bytes wait for the tokenizer, which is quick.
        if not rate or what == "bytes":
            return 1.0
        return float(min(max(math.ceil(excess / rate), 1), _LONGEST_RETRY_S))


class Reservation:
    """Room taken for requests on their way to the core. As a context manager it is released at the end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_requests = 0
        self.num_bytes = 0

    def add(self, num_requests: int = 0, num_bytes: int = 0) -> None:
        """Takes more room.

        Raises:
            EngineOverloadedError: there is none, and others wait, or are being read. Nothing more is taken then.
        """
        self._admission.take(self, num_requests, num_bytes)
        self.num_requests += num_requests
        self.num_bytes += num_bytes

    def release(self) -> None:
        """The requests count as waiting by now, or will never. May be called again."""
        self._admission.release(self.num_requests, self.num_bytes)
        self.num_requests = self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class _Rate:
    """An amount per second that forgets exponentially."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._first: float | None = None
        self._last = 0.0

    def count(self, amount: float, now: float) -> None:
        if self._first is None:
            self._first = self._last = now
        self._amount = self._amount * math.exp((self._last - now) / _MEMORY_S) + amount
        self._last = now

    def per_second(self, now: float) -> float:
        if self._first is None or now <= self._first:
            return 0.0
        # What has been seen of the time that is remembered: at first that is little.
        seen = _MEMORY_S * (1 - math.exp((self._first - now) / _MEMORY_S))
        return self._amount * math.exp((self._last - now) / _MEMORY_S) / seen
