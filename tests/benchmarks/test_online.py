"""Online workloads send what they say, when they say it, and their figures tell an engine that keeps up from others.

The engine here is a transport whose tokens come at a pace of its own, in this process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from benchmarks.online import ArrivalPlan, IdlePlan, OnlineWorkloads, PoissonPlan, Round, default_plan
from benchmarks.online_report import Load, arrival_report, idle_report, poisson_report
from benchmarks.runner import RequestResult, RequestsFailedError
from benchmarks.workloads import BenchmarkRequest, LengthRange

VOCAB_SIZE = 500


def fixed(length: int) -> LengthRange:
    return LengthRange(length, length)


IDLE = IdlePlan((3, 7, 40), 4, 2, fixed(5), fixed(6), pause_s=0.0)
ARRIVAL = ArrivalPlan("arrival", 7, 100.0, fixed(9), fixed(3), 5, stream_input_len=4, stream_output_len=80)


class PacedEngine:
    """Brings a token of every running request each millisecond.

    Attributes:
        sent: the requests, in order, each with what was under way when it came.
        missing_tokens: how many of each answer are lost.
    """

    def __init__(self, max_model_len: int | None = None) -> None:
        self.sent: list[tuple[BenchmarkRequest, int]] = []
        self.missing_tokens = 0
        self._max_model_len = max_model_len
        self._running = 0

    def describe(self) -> dict[str, str | int]:
        return {}

    async def vocab_size(self) -> int | None:
        return VOCAB_SIZE

    async def max_model_len(self) -> int | None:
        return self._max_model_len

    async def close(self) -> None:
        pass

    async def send(self, request: BenchmarkRequest, temperature: float, result: RequestResult) -> None:
        assert temperature == 0
        self.sent.append((request, self._running))
        self._running += 1
        result.sent = time.perf_counter()
        for _ in range(request.output_len - self.missing_tokens):
            await asyncio.sleep(0.001)
            result.token_times.append(time.perf_counter())
        result.output_len = len(result.token_times)
        self._running -= 1

    def lengths(self) -> list[tuple[int, int]]:
        return [(len(request.prompt_token_ids), request.output_len) for request, _ in self.sent]


def workloads(engine: PacedEngine, warm_up: bool = False) -> OnlineWorkloads:
    return OnlineWorkloads(engine, VOCAB_SIZE, seed=3, warm_up=warm_up)


async def test_idle_requests_come_one_at_a_time_and_prompts_that_do_not_fit_are_left_out() -> None:
    engine = PacedEngine(max_model_len=40)
    report = idle_report(await workloads(engine).idle(IDLE))
    assert engine.lengths() == [(3, 2)] * 4 + [(7, 2)] * 4 + [(5, 6)] * 2
    assert {under_way for _, under_way in engine.sent} == {0}
    assert report.rows["time to first token, 3-token prompt"][0] == 4
    assert report.rows["inter-token latency"][0] == 2 * 5
    assert "40-token prompt" not in report.table()
    assert "A prompt of 40 tokens does not fit the engine's context and was left out." in report.table()


async def test_warm_up_requests_are_not_counted() -> None:
    engine = PacedEngine()
    run = await workloads(engine, warm_up=True).idle(IDLE)
    assert len(engine.sent) == 3 * (4 + 2) + (2 + 2)
    assert [len(results) for results in run.by_prompt_len.values()] == [4, 4, 4]
    assert len(run.streams) == 2


async def test_requests_arrive_while_all_streams_run() -> None:
    engine = PacedEngine()
    rounds = await workloads(engine).arrivals(ARRIVAL)
    assert sum(len(each.arrivals) for each in rounds) == 7
    for each in rounds:
        assert [stream.output_len for stream in each.streams] == [80] * 5
        for arrival in each.arrivals:
            assert each.all_run_from <= arrival.sent <= each.all_run_to
    report = arrival_report("arrival", rounds)
    assert report.rows["time to first token of what arrives"][0] == 7
    num_gaps, latency = report.rows["inter-token latency of the streams"]
    assert 0 < num_gaps <= len(rounds) * 5 * 79
    assert latency is not None
    assert latency.p50 >= 1
    assert report.requests == [arrival for each in rounds for arrival in each.arrivals]


async def test_streams_that_end_before_a_request_arrives_are_an_error() -> None:
    hasty = dataclasses.replace(ARRIVAL, stream_output_len=2, request_rate=0.01)
    with pytest.raises(ValueError, match="--stream-output-len"):
        await workloads(PacedEngine()).arrivals(hasty)


async def test_arrivals_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    engine = PacedEngine(max_model_len=4096)
    plan = default_plan("arrival-long")
    assert isinstance(plan, ArrivalPlan)
    with pytest.raises(ValueError, match="context of 8,208 tokens and the engine has one of 4,096"):
        await workloads(engine).arrivals(plan)
    assert engine.sent == []


def test_only_what_came_while_all_streams_ran_counts() -> None:
    early = RequestResult(1, 4, 0.0, [1.0, 2.0, 3.0, 4.0], 4)
    late = RequestResult(1, 4, 0.0, [2.5, 3.5, 4.5, 9.5], 4)
    arrival = RequestResult(1, 1, 2.6, [4.2], 1)
    report = arrival_report("arrival", [Round([early, late], [arrival])])
    # All run from 2.5 to 4: of the first stream the token at 4, of the second the one at 3.5.
    assert report.rows["inter-token latency of the streams"][0] == 2
    assert "1 of 1 arrivals got their first token when the first stream had ended" in report.table()


@pytest.mark.parametrize("workload", ["idle", "arrivals", "poisson"])
async def test_lost_tokens_fail_a_run(workload: str) -> None:
    engine = PacedEngine()
    engine.missing_tokens = 1
    plan = {"idle": IDLE, "arrivals": ARRIVAL, "poisson": PoissonPlan(5, 500.0, fixed(4), fixed(3))}[workload]
    with pytest.raises(RequestsFailedError, match="requests went wrong"):
        await getattr(workloads(engine), workload)(plan)


async def test_prompts_are_new_each_time_and_lengths_the_seed_s() -> None:
    plan = PoissonPlan(20, 1000.0, LengthRange(3, 9), LengthRange(1, 4))
    first, second = PacedEngine(), PacedEngine()
    results = await workloads(first).poisson(plan)
    await workloads(second).poisson(plan)
    assert first.lengths() == second.lengths()
    assert first.sent[0][0].prompt_token_ids != second.sent[0][0].prompt_token_ids
    report = poisson_report(results)
    assert report.rows["time to first token"][0] == 20
    assert "| output tok/s offered |" in report.table()


def served(rate: float, service_s: float, answer_s: float) -> list[RequestResult]:
    """20 s of requests, each begun when the one before has been served for `service_s`, with answers of 50 tokens."""
    results, free = [], 0.0
    for index in range(round(20 * rate)):
        sent = index / rate
        free = max(free, sent) + service_s
        results.append(RequestResult(10, 50, sent, [free + answer_s * token / 49 for token in range(50)], 50))
    return results


def test_an_engine_with_time_to_spare_keeps_up_however_long_its_answers_take() -> None:
    for answer_s in (0.1, 4.0):
        load = Load.of(served(rate=10, service_s=0.09, answer_s=answer_s))
        assert load.offered == pytest.approx(500, rel=0.01)
        assert load.achieved == pytest.approx(500, rel=0.01)
        assert load.waiting_late == pytest.approx(0.9, abs=0.02)
        assert load.keeps_up


def test_an_engine_a_tenth_too_slow_does_not_keep_up() -> None:
    results = served(rate=10, service_s=0.11, answer_s=0.5)
    load = Load.of(results)
    assert load.achieved == pytest.approx(500 / 1.1, rel=0.02)
    assert load.waiting_late > 1.5 * load.waiting_early + 1
    assert not load.keeps_up
    assert "DOES NOT keep up" in poisson_report(results).table()
