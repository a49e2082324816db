"""From the requests of an online workload to figures: what `benchmarks.online` measured, as a table to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.online import IdleRun, Round
from benchmarks.report import Distribution, cells
from benchmarks.runner import RequestResult

# An engine that brings less than this part of the tokens asked for is falling behind.
_KEEPS_UP_FROM = 0.98


@dataclass(slots=True)
class OnlineReport:
    """Attributes:
    rows: how many values, and their distribution, by what they are.
    facts: what else was found, by what it is.
    notes: what the reader must know, in sentences.
    requests: those of which the times are saved.
    """

    workload: str
    rows: dict[str, tuple[int, Distribution | None]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    requests: list[RequestResult] = field(default_factory=list)

    def add(self, label: str, seconds: Sequence[float]) -> None:
        self.rows[label] = (len(seconds), Distribution.of(seconds))

    def add_gaps(self, label: str, token_gaps: Sequence[float], event_gaps: Sequence[float]) -> None:
        """Inter-token latency, and the time between events if tokens came together somewhere."""
        self.add(label, token_gaps)
        if len(token_gaps) != len(event_gaps):
            self.add(f"{label}, between events", event_gaps)

    def table(self) -> str:
        lines = [f"| {self.workload}, ms | values | mean | p50 | p95 | p99 | max |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {label} | {count:,} | {cells(figures)} |" for label, (count, figures) in self.rows.items()]
        if self.facts:
            lines += ["", "| | |", "|---|---|"]
            lines += [f"| {label} | {value} |" for label, value in self.facts.items()]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)

    def saved(self) -> dict[str, Any]:
        """For `save_json`: the figures, and the requests' times."""
        return asdict(self)


def idle_report(run: IdleRun) -> OnlineReport:
    report = OnlineReport("idle")
    for prompt_len, results in run.by_prompt_len.items():
        report.add(f"time to first token, {prompt_len:,}-token prompt", [result.ttft for result in results])
        report.requests += results
    report.add_gaps("inter-token latency", *_gaps(run.streams))
    report.requests += run.streams
    for prompt_len in run.too_long:
        report.notes.append(f"A prompt of {prompt_len:,} tokens does not fit the engine's context and was left out.")
    return report


def arrival_report(name: str, rounds: list[Round]) -> OnlineReport:
    """The streams' latency is that of tokens that came while all streams of their round ran."""
    report = OnlineReport(name)
    report.requests = [arrival for each in rounds for arrival in each.arrivals]
    report.add("time to first token of what arrives", [arrival.ttft for arrival in report.requests])
    token_gaps: list[float] = []
    event_gaps: list[float] = []
    for each in rounds:
        more = _gaps(each.streams, each.all_run_from, each.all_run_to)
        token_gaps += more[0]
        event_gaps += more[1]
    report.add_gaps("inter-token latency of the streams", token_gaps, event_gaps)
    seconds = sum(each.all_run_to - each.all_run_from for each in rounds)
    report.facts = {
        "streams running": str(len(rounds[0].streams)),
        "rounds": str(len(rounds)),
        "seconds while all of them ran": f"{seconds:.2f}",
        "arrivals a second of that": f"{len(report.requests) / seconds:.2f}",
    }
    late = sum(arrival.token_times[0] > each.all_run_to for each in rounds for arrival in each.arrivals)
    if late:
        report.notes.append(
            f"{late} of {len(report.requests)} arrivals got their first token when the first stream had ended: "
            "make the streams longer with --stream-output-len."
        )
    return report


@dataclass(frozen=True, slots=True)
class Load:
    """Whether an engine keeps up with requests that come at a rate of their own.

    Looked at from a quarter of the time of arrivals, when the engine has filled, to the last arrival, when it begins to
    empty. `offered` are the output tokens a second that requests sent then asked for, `achieved` those received then:
    in an engine that keeps up they differ by chance alone, and in one that does not, what it owes grows all the time.
    `waiting_early` and `waiting_late` are how many requests waited for their first token, on average over the second
    and over the last quarter.
    """

    requests_per_s: float
    offered: float
    achieved: float
    waiting_early: float
    waiting_late: float

    @staticmethod
    def of(results: list[RequestResult]) -> Load:
        start, end = min(result.sent for result in results), max(result.sent for result in results)
        duration = end - start
        early, late = start + duration / 4, end - duration / 4
        asked = sum(result.wanted_len for result in results if early < result.sent <= end)
        # Where a server does not say how many tokens an event holds, each counts for its share.
        brought = sum(
            result.output_len / len(result.token_times)
            for result in results
            for when in result.token_times
            if early < when <= end
        )
        return Load(
            requests_per_s=(len(results) - 1) / duration,
            offered=asked / (end - early),
            achieved=brought / (end - early),
            waiting_early=_mean_waiting(results, early, start + duration / 2),
            waiting_late=_mean_waiting(results, late, end),
        )

    @property
    def keeps_up(self) -> bool:
        return self.achieved >= _KEEPS_UP_FROM * self.offered and self.waiting_late <= 1.5 * self.waiting_early + 1


def _mean_waiting(results: list[RequestResult], start: float, end: float) -> float:
    """How many requests waited for their first token, on average from `start` to `end`."""
    waited = sum(max(0.0, min(end, result.token_times[0]) - max(start, result.sent)) for result in results)
    return waited / (end - start)


def poisson_report(results: list[RequestResult]) -> OnlineReport:
    report = OnlineReport("poisson", requests=results)
    report.add("time to first token", [result.ttft for result in results])
    report.add_gaps("inter-token latency", *_gaps(results))
    report.add("end to end", [result.e2e for result in results])
    load = Load.of(results)
    report.facts = {
        "requests/s sent": f"{load.requests_per_s:.1f}",
        "output tok/s offered": f"{load.offered:,.0f}",
        "output tok/s achieved": f"{load.achieved:,.0f} ({load.achieved / load.offered:.1%})",
        "requests waiting for their first token, early and late": f"{load.waiting_early:.1f}, {load.waiting_late:.1f}",
    }
    report.notes.append(
        f"The engine {'keeps up' if load.keeps_up else 'DOES NOT keep up'} (it does if it brings "
        f"{_KEEPS_UP_FROM:.0%} of what is asked for, and no more than half again as many requests, and one, wait for "
        "their first token late as early)."
    )
    return report


def _gaps(results: list[RequestResult], *window: float) -> tuple[list[float], list[float]]:
    return (
        [gap for result in results for gap in result.token_gaps(*window)],
        [gap for result in results for gap in result.event_gaps(*window)],
    )
