"""Figures follow from the times as they are defined, and a run that lost tokens does not pass."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import Distribution, RunReport, percentile, save_json
from benchmarks.runner import RequestResult, problems
from benchmarks.workloads import BenchmarkRequest, Workload

WORKLOAD = Workload("custom", [BenchmarkRequest([1, 2, 3], 3), BenchmarkRequest([4], 2)], 0.0)


def results() -> list[RequestResult]:
    return [
        RequestResult(3, 3, sent=10.0, token_times=[10.5, 10.6, 10.9], output_len=3),
        RequestResult(1, 2, sent=10.2, token_times=[10.4, 11.4], output_len=2),
    ]


def test_rates_count_from_the_first_request_sent_to_the_last_token() -> None:
    report = RunReport.of(WORKLOAD, results())
    assert report.duration_s == pytest.approx(1.4)
    assert report.output_rate == pytest.approx(5 / 1.4)
    assert report.input_rate == pytest.approx(4 / 1.4)


def test_latencies_are_what_they_are_called() -> None:
    report = RunReport.of(WORKLOAD, results())
    assert report.ttft is not None
    assert report.ttft.mean == pytest.approx(350)
    assert report.inter_token is not None
    assert report.inter_token.mean == pytest.approx(1000 * (0.1 + 0.3 + 1.0) / 3)
    assert report.per_output_token is not None
    assert report.per_output_token.mean == pytest.approx(1000 * (0.2 + 1.0) / 2)
    assert report.e2e is not None
    assert report.e2e.mean == pytest.approx(1000 * (0.9 + 1.2) / 2)


def test_of_tokens_that_came_together_one_has_waited_and_the_others_have_not() -> None:
    held_back = RequestResult(3, 6, sent=0.0, token_times=[1.0, 1.0, 1.0, 3.0, 3.0, 3.0], output_len=6)
    assert held_back.token_gaps() == [0, 0, 2, 0, 0]
    assert held_back.event_gaps() == [2]
    report = RunReport.of(WORKLOAD, [held_back])
    assert report.inter_token is not None
    assert (report.inter_token.p50, report.inter_token.max) == (0, 2000)
    assert report.event_gap is not None
    assert (report.event_gap.p50, report.event_gap.max) == (2000, 2000)
    assert "| time between events | 2000.00 |" in report.table()
    assert report.per_output_token is not None
    assert report.per_output_token.mean == pytest.approx(400)


def test_events_are_not_mentioned_where_tokens_come_one_by_one() -> None:
    assert "events" not in RunReport.of(WORKLOAD, results()).table()


def test_gaps_of_a_window_lie_wholly_in_it() -> None:
    result = RequestResult(3, 5, sent=0.0, token_times=[1.0, 2.0, 4.0, 7.0, 11.0], output_len=5)
    assert result.token_gaps(2.0, 7.0) == [2, 3]
    assert result.token_gaps(2.1, 6.9) == []
    assert result.event_gaps(end=4.0) == [1, 2]


def test_time_per_output_token_counts_tokens_and_not_events() -> None:
    # A server that returns text alone sent 5 tokens in 2 events.
    assert RequestResult(3, 5, sent=0.0, token_times=[1.0, 3.0], output_len=5).per_output_token == pytest.approx(0.5)


def test_cached_prompt_tokens_are_shown() -> None:
    report = RunReport.of(WORKLOAD, [RequestResult(300, 1, 0.0, [0.5], 1, cached_len=256)])
    assert "| of these from the prefix cache | 256 |" in report.table()


def test_percentiles_are_numpy_s() -> None:
    values = sorted(np.random.default_rng(0).random(37).tolist())
    for percent in (0, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_one_token_answers_have_no_inter_token_latency() -> None:
    report = RunReport.of(WORKLOAD, [RequestResult(3, 1, 0.0, [0.5], 1)])
    assert report.inter_token is None
    assert "| inter-token latency | - | - | - | - | - |" in report.table()
    assert Distribution.of([]) is None


def test_lost_tokens_and_failed_requests_are_noticed() -> None:
    short = RequestResult(3, 3, 0.0, [0.1, 0.2], 2)
    failed = RequestResult(3, 3, 0.0, error="status 500: oops")
    assert problems(results()) == []
    assert problems([*results(), short, failed]) == [
        "request 2: 2 tokens came back, 3 were asked for",
        "request 3: status 500: oops",
    ]


def test_the_saved_file_holds_every_time(tmp_path: Path) -> None:
    run = results()
    report = RunReport.of(WORKLOAD, run)
    save_json(tmp_path / "a" / "run.json", WORKLOAD.saved(), [report.saved(run)], {"model": "tiny"})
    saved = json.loads((tmp_path / "a" / "run.json").read_text())
    assert saved["target"] == {"model": "tiny"}
    assert saved["machine"]["cpus"] >= 1
    assert saved["machine"]["pyzmq"]
    assert saved["runs"][0]["requests"][1]["token_times"] == [10.4, 11.4]
    assert saved["runs"][0]["duration_s"] == pytest.approx(1.4)
