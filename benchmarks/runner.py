"""Sends a workload's requests when they are due and notes when each token came. Knows no transport.

Times are taken in this process: a request's clock starts when it is sent, the run's with the first request.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from tqdm import tqdm

from benchmarks.workloads import BenchmarkRequest, Workload

# How often a progress bar of time is moved.
_TICK_S = 0.25


@dataclass(slots=True)
class RequestResult:
    """One request as its client saw it. Times are seconds of `time.perf_counter()`.

    Attributes:
        token_times: when each token came; tokens that came together share their time. A server that returns text alone
            does not say how many tokens an event holds: there it is one time an event that brought text.
        cached_len: prompt tokens that the engine took from its prefix cache, as far as it says.
    """

    input_len: int
    wanted_len: int
    sent: float
    token_times: list[float] = field(default_factory=list)
    output_len: int = 0
    cached_len: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.sent

    @property
    def e2e(self) -> float:
        """End-to-end latency."""
        return self.token_times[-1] - self.sent

    @property
    def per_output_token(self) -> float | None:
        """Mean time per output token after the first; None for a one-token answer."""
        if self.output_len < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_len - 1)

    def token_gaps(self, start: float = -math.inf, end: float = math.inf) -> list[float]:
        """Inter-token latencies: the time from each token to the next, of tokens that came from `start` to `end`.

        Of tokens that came together the first has all of the time that its reader waited, and the others none.
        """
        return _gaps(self.token_times, start, end)

    def event_gaps(self, start: float = -math.inf, end: float = math.inf) -> list[float]:
        """How long the reader waited each time: tokens that came together count once.

        The same as `token_gaps` where tokens come one by one. Where they do not, the zeros there flatter the median
        of whoever holds tokens back, and these do not.
        """
        return _gaps(dict.fromkeys(self.token_times), start, end)


def _gaps(times: Iterable[float], start: float, end: float) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times) if earlier >= start and later <= end]


class Transport(Protocol):
    """A way to an engine."""

    def describe(self) -> dict[str, str | int]:
        """What is measured: the address, the model, and what else is known of the engine."""
        ...

    async def vocab_size(self) -> int | None:
        """The engine's vocabulary, or None where it does not say."""
        ...

    async def max_model_len(self) -> int | None:
        """The longest sequence, prompt and answer, or None where the engine does not say."""
        ...

    async def send(self, request: BenchmarkRequest, temperature: float, result: RequestResult) -> None:
        """Runs one request to its end, filling `result` as tokens come, and `output_len` at the end.

        Raises nothing but cancellation: errors are noted in the result.
        """
        ...

    async def close(self) -> None: ...


def start_request(
    transport: Transport, request: BenchmarkRequest, temperature: float
) -> tuple[RequestResult, asyncio.Task[None]]:
    """Sends a request; the task ends with it."""
    result = RequestResult(len(request.prompt_token_ids), request.output_len, time.perf_counter())
    return result, asyncio.create_task(transport.send(request, temperature, result))


def settle() -> None:
    """Takes what exists now out of the garbage collector's sight: to look at all of it is a pause of the client."""
    gc.collect()
    gc.freeze()


async def run_workload(
    transport: Transport, workload: Workload, show_progress: bool = True, keep_bar: bool = True
) -> list[RequestResult]:
    """One run. Results are in the order of the requests. The progress bar stays when it is full, or makes room."""
    slots = asyncio.Semaphore(workload.concurrency or len(workload.requests))
    results: list[RequestResult] = []
    tasks: list[asyncio.Task[None]] = []
    with tqdm(
        total=workload.output_tokens,
        desc=workload.name,
        unit="tok",
        disable=not show_progress,
        dynamic_ncols=True,
        leave=keep_bar,
    ) as bar:

        async def run_one(request: BenchmarkRequest, result: RequestResult) -> None:
            try:
                await transport.send(request, workload.temperature, result)
            finally:
                slots.release()
                bar.update(result.output_len)

        async for request in _arrivals(workload):
            await slots.acquire()
            result = RequestResult(len(request.prompt_token_ids), request.output_len, time.perf_counter())
            results.append(result)
            tasks.append(asyncio.create_task(run_one(request, result)))
        await asyncio.gather(*tasks)
    return results


async def run_users(
    transport: Transport,
    workload: Workload,
    requests: Iterator[BenchmarkRequest],
    duration_s: float,
    show_progress: bool = True,
    keep_bar: bool = True,
) -> list[RequestResult]:
    """A run of `workload.concurrency` users: each sends its next request when its last has ended, for `duration_s`.

    `requests` is endless and stands in for the workload's own. Those under way when the time is over run to their end;
    after one that failed nothing more is sent. Results are in the order sent.
    """
    results: list[RequestResult] = []
    has_failed = False
    start = time.perf_counter()
    with tqdm(
        total=duration_s,
        desc=workload.name,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        disable=not show_progress,
        dynamic_ncols=True,
        leave=keep_bar,
    ) as bar:

        async def show_time() -> None:
            while not bar.disable:
                bar.set_postfix_str(f"{len(results)} requests sent", refresh=False)
                bar.update(min(duration_s, time.perf_counter() - start) - bar.n)
                await asyncio.sleep(_TICK_S)

        async def use() -> None:
            nonlocal has_failed
            while time.perf_counter() - start < duration_s and not has_failed:
                result, task = start_request(transport, next(requests), workload.temperature)
                results.append(result)
                await task
                has_failed |= result.error is not None

        clock = asyncio.create_task(show_time())
        try:
            await asyncio.gather(*(use() for _ in range(workload.concurrency or 1)))
        finally:
            clock.cancel()
    return results


async def _arrivals(workload: Workload) -> AsyncIterator[BenchmarkRequest]:
    """The requests, each when it is due."""
    chooser = random.Random(workload.seed)
    due = time.perf_counter()
    for request in workload.requests:
        if workload.request_rate is not None:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += chooser.expovariate(workload.request_rate)
        yield request


class RequestsFailedError(Exception):
    """A run is not to be counted. The message says what went wrong with the first of its requests."""


def require_whole(results: list[RequestResult]) -> None:
    """Raises RequestsFailedError unless every request returned the tokens asked for."""
    wrong = problems(results)
    if wrong:
        raise RequestsFailedError(
            "\n".join([*wrong[:10], f"error: {len(wrong)} of {len(results)} requests went wrong"])
        )


def problems(results: list[RequestResult]) -> list[str]:
    """What is wrong with a run: requests that failed or did not return the tokens asked for."""
    found = []
    for index, result in enumerate(results):
        if result.error is not None:
            found.append(f"request {index}: {result.error}")
        elif result.output_len != result.wanted_len:
            found.append(f"request {index}: {result.output_len} tokens came back, {result.wanted_len} were asked for")
    return found
