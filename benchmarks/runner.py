"""Sends a workload's requests when they are due and notes when each token came. Knows no transport.

Times are taken in this process: a request's clock starts when it is sent, the run's with the first request.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from tqdm import tqdm

from benchmarks.workloads import BenchmarkRequest, Workload


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

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: how long its reader waited for the next tokens.

        Tokens that came together count once. Counted as gaps of zero, they would flatter whoever holds tokens back.
        """
        arrivals = list(dict.fromkeys(self.token_times))
        return [later - earlier for earlier, later in itertools.pairwise(arrivals)]


class Transport(Protocol):
    """A way to an engine."""

    def describe(self) -> dict[str, str | int]:
        """What is measured: the address, the model, and what else is known of the engine."""
        ...

    async def vocab_size(self) -> int | None:
        """The engine's vocabulary, or None where it does not say."""
        ...

    async def send(self, request: BenchmarkRequest, temperature: float, result: RequestResult) -> None:
        """Runs one request to its end, filling `result`. Raises nothing but cancellation: errors are noted in it."""
        ...

    async def close(self) -> None: ...


async def run_workload(transport: Transport, workload: Workload, show_progress: bool = True) -> list[RequestResult]:
    """One run. Results are in the order of the requests."""
    slots = asyncio.Semaphore(workload.concurrency or len(workload.requests))
    results: list[RequestResult] = []
    tasks: list[asyncio.Task[None]] = []
    with tqdm(
        total=workload.output_tokens, desc=workload.name, unit="tok", disable=not show_progress, dynamic_ncols=True
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


async def _arrivals(workload: Workload) -> AsyncIterator[BenchmarkRequest]:
    """The requests, each when it is due."""
    chooser = random.Random(workload.seed)
    due = time.perf_counter()
    for request in workload.requests:
        if workload.request_rate is not None:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += chooser.expovariate(workload.request_rate)
        yield request


def problems(results: list[RequestResult]) -> list[str]:
    """What is wrong with a run: requests that failed or did not return the tokens asked for."""
    found = []
    for index, result in enumerate(results):
        if result.error is not None:
            found.append(f"request {index}: {result.error}")
        elif result.output_len != result.wanted_len:
            found.append(f"request {index}: {result.output_len} tokens came back, {result.wanted_len} were asked for")
    return found
