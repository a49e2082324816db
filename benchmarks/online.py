"""Workloads of a server in use: how long one user waits while nobody else, 64 others or a stream of others are served.

| name | load | measured |
|---|---|---|
| idle | one request at a time, a pause before each; prompts of 16, 128, 1,024, 8,192 tokens | time to first token |
| | the same with 128 in, 128 out | inter-token latency |
| arrival | 64 streams run (128 in, 512 out); a 128-token request every 0.3 s | its first token, their latency |
| arrival-long | the same; an 8,192-token request every 0.5 s | the same |
| poisson | 100 requests/s for 25 s, 64-512 in, 64-256 out | both, and whether the engine keeps up |

All are greedy, streamed, and return exactly the tokens asked for. Prompts are new random ids in every run, so that no
prefix cache holds them; lengths and times of arrival are the seed's. What comes out are the requests as their client
saw them; `benchmarks.online_report` makes figures of them.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from benchmarks.runner import RequestResult, Transport, require_whole, run_workload, start_request
from benchmarks.workloads import BenchmarkRequest, LengthRange, Workload, new_requests

NAMES = ("idle", "arrival", "arrival-long", "poisson")
_GREEDY = 0.0
_POLL_S = 0.005
# What warms up and is not counted: requests of a kind that is sent one by one, and seconds of a stream of requests.
_WARMUP_REQUESTS = 2
_WARMUP_S = 2.0
# Part of a round's streams that must be left when a request arrives, so that they run as long as it waits.
_LEFT_FOR_ARRIVAL = 0.2


@dataclass(frozen=True, slots=True)
class IdlePlan:
    """`num_requests` are sent for each prompt length; `num_streams` are those whose inter-token latency is taken.

    `pause_s` comes before each: more than an engine needs for what it does after a request's last token.
    """

    prompt_lens: tuple[int, ...]
    num_requests: int
    num_streams: int
    input_len: LengthRange
    output_len: LengthRange
    pause_s: float


@dataclass(frozen=True, slots=True)
class ArrivalPlan:
    """Rounds of streams that start together, until `num_requests` have arrived while all streams of a round ran.

    Streams that begin anew one by one, as they end, would be arrivals themselves: 64 of 512 tokens at 1.3 ms are 96 a
    second. Fewer and longer ones would measure attention over long contexts.
    """

    name: str
    num_requests: int
    request_rate: float
    input_len: LengthRange
    output_len: LengthRange
    num_streams: int
    stream_input_len: int
    stream_output_len: int


@dataclass(frozen=True, slots=True)
class PoissonPlan:
    num_requests: int
    request_rate: float
    input_len: LengthRange
    output_len: LengthRange


Plan = IdlePlan | ArrivalPlan | PoissonPlan


def default_plan(name: str) -> Plan:
    """One of the workloads of the table above."""
    if name == "idle":
        return IdlePlan((16, 128, 1024, 8192), 20, 10, LengthRange(128, 128), LengthRange(128, 128), pause_s=0.1)
    if name == "poisson":
        return PoissonPlan(2500, 100.0, LengthRange(64, 512), LengthRange(64, 256))
    num_requests, interval, input_len = {"arrival": (60, 0.3, 128), "arrival-long": (16, 0.5, 8192)}[name]
    return ArrivalPlan(
        name,
        num_requests,
        1 / interval,
        LengthRange(input_len, input_len),
        LengthRange(16, 16),
        num_streams=64,
        stream_input_len=128,
        stream_output_len=512,
    )


@dataclass(slots=True)
class IdleRun:
    """Requests of each prompt length, prompt lengths that the engine's context has no room for, and longer answers."""

    by_prompt_len: dict[int, list[RequestResult]] = field(default_factory=dict)
    too_long: list[int] = field(default_factory=list)
    streams: list[RequestResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Round:
    """Streams that ran together, and the requests that arrived meanwhile."""

    streams: list[RequestResult]
    arrivals: list[RequestResult]

    @property
    def all_run_from(self) -> float:
        """When the last stream got its first token."""
        return max(stream.token_times[0] for stream in self.streams)

    @property
    def all_run_to(self) -> float:
        """When the first stream got its last token."""
        return min(stream.token_times[-1] for stream in self.streams)


class OnlineWorkloads:
    """Runs the workloads on one engine. Every method raises RequestsFailedError when a request went wrong.

    Args:
        vocab_size: bound of the random ids.
        seed: of lengths and times of arrival.
        warm_up: whether to begin with requests that are not counted.
    """

    def __init__(
        self, transport: Transport, vocab_size: int, seed: int = 0, warm_up: bool = True, show_progress: bool = False
    ) -> None:
        self._transport = transport
        self._vocab_size = vocab_size
        self._seed = seed
        self._chooser = random.Random(seed)
        self._warm_up = warm_up
        self._show_progress = show_progress

    async def idle(self, plan: IdlePlan) -> IdleRun:
        run = IdleRun()
        limit = await self._transport.max_model_len()
        # An answer of one token may take another way through an engine than the first token of several.
        two = LengthRange(2, 2)
        for prompt_len in plan.prompt_lens:
            if limit is not None and prompt_len + two.high > limit:
                run.too_long.append(prompt_len)
                continue
            fixed = LengthRange(prompt_len, prompt_len)
            run.by_prompt_len[prompt_len] = await self._one_by_one(plan.num_requests, fixed, two, plan.pause_s)
        run.streams = await self._one_by_one(plan.num_streams, plan.input_len, plan.output_len, plan.pause_s)
        return run

    async def _one_by_one(
        self, count: int, input_len: LengthRange, output_len: LengthRange, pause_s: float
    ) -> list[RequestResult]:
        num_warm_up = _WARMUP_REQUESTS if self._warm_up else 0
        results = []
        for request in self._requests(num_warm_up + count, input_len, output_len):
            await asyncio.sleep(pause_s)
            result, task = start_request(self._transport, request, _GREEDY)
            await task
            results.append(result)
        require_whole(results)
        return results[num_warm_up:]

    async def arrivals(self, plan: ArrivalPlan) -> list[Round]:
        """Raises ValueError if the engine's context has no room, or the streams end before a request arrives."""
        await self._require_room(plan)
        # Made before anything runs: drawing thousands of ids takes longer than a step.
        arriving = self._requests(plan.num_requests, plan.input_len, plan.output_len)
        rounds: list[Round] = []
        if self._warm_up:
            await self._round(plan, self._requests(1, plan.input_len, plan.output_len))
        with tqdm(total=plan.num_requests, desc=plan.name, unit="req", disable=not self._show_progress) as bar:
            while arriving:
                rounds.append(await self._round(plan, arriving))
                bar.update(len(rounds[-1].arrivals))
        return rounds

    async def _require_room(self, plan: ArrivalPlan) -> None:
        limit = await self._transport.max_model_len()
        needed = max(plan.input_len.high + plan.output_len.high, plan.stream_input_len + plan.stream_output_len)
        if limit is not None and needed > limit:
            raise ValueError(
                f"{plan.name} needs a context of {needed:,} tokens and the engine has one of {limit:,}; "
                "choose other lengths with --input-len, --output-len and --stream-output-len"
            )

    async def _round(self, plan: ArrivalPlan, arriving: list[BenchmarkRequest]) -> Round:
        """Starts all streams and, while they run, takes requests from `arriving` and sends them."""
        lengths = [LengthRange(length, length) for length in (plan.stream_input_len, plan.stream_output_len)]
        started = [
            start_request(self._transport, request, _GREEDY) for request in self._requests(plan.num_streams, *lengths)
        ]
        streams = [result for result, _ in started]
        tasks = [task for _, task in started]
        arrivals: list[RequestResult] = []
        last_arrival = (1 - _LEFT_FOR_ARRIVAL) * plan.stream_output_len
        interval = 1 / plan.request_rate
        due: float | None = None
        # How far the slowest is says that all run; how far the fastest is, that all will go on running for a while.
        while arriving and not any(task.done() for task in tasks[: len(streams)]):
            progress = [len(stream.token_times) for stream in streams]
            now = time.perf_counter()
            if max(progress) > last_arrival:
                break
            if min(progress) > 0:
                if due is None:
                    due = now + self._chooser.uniform(0, interval / 4)
                if now >= due:
                    result, task = start_request(self._transport, arriving.pop(0), _GREEDY)
                    arrivals.append(result)
                    tasks.append(task)
                    due = now + interval * self._chooser.uniform(0.5, 1.5)
            await asyncio.sleep(_POLL_S if due is None else min(_POLL_S, max(0.0, due - now)))
        await asyncio.gather(*tasks)
        require_whole(streams + arrivals)
        if not arrivals:
            raise ValueError(
                f"streams of {plan.stream_output_len} tokens end before a request arrives; "
                "make them longer with --stream-output-len"
            )
        return Round(streams, arrivals)

    async def poisson(self, plan: PoissonPlan) -> list[RequestResult]:
        if self._warm_up:
            count = min(plan.num_requests, round(plan.request_rate * _WARMUP_S) or 1)
            await self._poisson(plan, count, show_progress=False)
        return await self._poisson(plan, plan.num_requests, self._show_progress)

    async def _poisson(self, plan: PoissonPlan, count: int, show_progress: bool) -> list[RequestResult]:
        requests = self._requests(count, plan.input_len, plan.output_len)
        workload = Workload("poisson", requests, _GREEDY, plan.request_rate, seed=self._seed)
        results = await run_workload(self._transport, workload, show_progress)
        require_whole(results)
        return results

    def _requests(self, count: int, input_len: LengthRange, output_len: LengthRange) -> list[BenchmarkRequest]:
        return new_requests(count, input_len, output_len, self._vocab_size, self._chooser)
