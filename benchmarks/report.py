"""From one run's results to figures: a table to paste, and JSON with everything."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from benchmarks.runner import RequestResult
from benchmarks.workloads import Workload

_PERCENTILES = (50, 95, 99, 100)
# What the client's own speed depends on.
_PACKAGES = ("mini-vllm", "msgspec", "pyzmq", "httptools", "uvloop")


Milliseconds = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Distribution:
    mean: Milliseconds
    p50: Milliseconds
    p95: Milliseconds
    p99: Milliseconds
    max: Milliseconds

    @staticmethod
    def of(seconds: Sequence[float]) -> Distribution | None:
        """None for no values: a one-token answer has no inter-token latency."""
        if not seconds:
            return None
        ordered = sorted(seconds)
        return Distribution(
            statistics.fmean(ordered) * 1e3, *(percentile(ordered, percent) * 1e3 for percent in _PERCENTILES)
        )


def cells(figures: Distribution | None) -> str:
    """Cells of a table's row."""
    return " | ".join(["-"] * 5 if figures is None else [f"{milliseconds:.2f}" for milliseconds in astuple(figures)])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The linearly interpolated percentile of ascending values, as NumPy's default."""
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class RunReport:
    """Figures of one run. The duration is from the first request sent to the last token received.

    `inter_token` has a value a token after the first, `event_gap` one each time that something came: see
    `RequestResult.token_gaps` and `event_gaps`.
    """

    workload: str
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    duration_s: float
    ttft: Distribution | None
    inter_token: Distribution | None
    event_gap: Distribution | None
    per_output_token: Distribution | None
    e2e: Distribution | None

    @staticmethod
    def of(workload: Workload, results: list[RequestResult]) -> RunReport:
        """Figures of the requests that brought tokens; which did not is `problems`' business."""
        good = [result for result in results if result.token_times]
        if not good:
            raise ValueError("no request brought a token")
        start = min(result.sent for result in good)
        end = max(result.token_times[-1] for result in good)
        return RunReport(
            workload=workload.name,
            requests=len(good),
            input_tokens=sum(result.input_len for result in good),
            cached_tokens=sum(result.cached_len for result in good),
            output_tokens=sum(result.output_len for result in good),
            duration_s=end - start,
            ttft=Distribution.of([result.ttft for result in good]),
            inter_token=Distribution.of([gap for result in good for gap in result.token_gaps()]),
            event_gap=Distribution.of([gap for result in good for gap in result.event_gaps()]),
            per_output_token=Distribution.of(
                [result.per_output_token for result in good if result.per_output_token is not None]
            ),
            e2e=Distribution.of([result.e2e for result in good]),
        )

    @property
    def output_rate(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def input_rate(self) -> float:
        return self.input_tokens / self.duration_s

    def saved(self, results: list[RequestResult]) -> dict[str, Any]:
        """For `save_json`: the figures, and each request's times."""
        return {**asdict(self), "output_rate": self.output_rate, "requests": [asdict(result) for result in results]}

    def table(self) -> str:
        lines = [
            f"| {self.workload} | |",
            "|---|---|",
            f"| requests | {self.requests} |",
            f"| input tokens | {self.input_tokens:,} |",
            f"| of these from the prefix cache | {self.cached_tokens:,} |",
            f"| output tokens | {self.output_tokens:,} |",
            f"| duration, s | {self.duration_s:.3f} |",
            f"| output tok/s | {self.output_rate:,.0f} |",
            f"| input tok/s | {self.input_rate:,.0f} |",
            f"| total tok/s | {self.output_rate + self.input_rate:,.0f} |",
            "",
            "| ms | mean | p50 | p95 | p99 | max |",
            "|---|---|---|---|---|---|",
        ]
        for label, figures in (
            ("time to first token", self.ttft),
            ("inter-token latency", self.inter_token),
            *([("time between events", self.event_gap)] if self.event_gap != self.inter_token else []),
            ("time per output token", self.per_output_token),
            ("end to end", self.e2e),
        ):
            lines.append(f"| {label} | {cells(figures)} |")
        return "\n".join(lines)


def save_json(
    path: Path, workload: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], target: Mapping[str, str | int]
) -> None:
    """Writes what was run, the figures and times of every run, and where it was measured."""
    data = {**provenance(target), "workload": dict(workload), "runs": list(runs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def provenance(target: Mapping[str, str | int]) -> dict[str, Any]:
    """Where saved figures come from: when, by which command, of which engine, on which machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "target": dict(target),
        "machine": {
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **_versions(),
        },
    }


def _versions() -> dict[str, str]:
    """Versions of what is installed; the project itself need not be, when it is run from a checkout."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
