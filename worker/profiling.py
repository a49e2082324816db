"""Records some of the worker's steps with torch's profiler: a trace to look at, and how busy the GPU was.

The share that the GPU is busy is the union of all kernels' and copies' times over the time from the first to the last.
Recording slows a step a little, so it understates.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

_TOP_KERNELS = 25


class StepProfiler:
    """Counts steps, records `first..last`, and writes `trace.json` and `summary.json`: then, or at `close` of fewer."""

    def __init__(self, directory: Path, first: int, last: int) -> None:
        self._directory = directory
        self._first, self._last = first, last
        self._step = 0
        self._profile: profile | None = None

    def before_step(self) -> None:
        self._step += 1
        if self._step == self._first:
            self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
            self._profile.start()
        elif self._step == self._last + 1 and self._profile is not None:
            self._write(self._profile, self._last - self._first + 1)
            self._profile = None

    def close(self) -> None:
        if self._profile is not None:
            self._write(self._profile, self._step - self._first + 1)
            self._profile = None
        elif self._step < self._first:
            logger.warning("no profile was written: %d steps ran, the first to record is %d", self._step, self._first)

    def _write(self, recorded: profile, num_steps: int) -> None:
        torch.cuda.synchronize()
        recorded.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._directory / "trace.json"))
        summary = summarize(list(recorded.events() or []), num_steps)
        (self._directory / "summary.json").write_text(json.dumps(summary, indent=1))


def summarize(events: list[FunctionEvent], num_steps: int) -> dict[str, object]:
    """Busy share, time a step, and the kernels with the largest shares, from a profile's events."""
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    intervals = sorted((event.time_range.start, event.time_range.end) for event in on_gpu)
    if not intervals:
        return {"steps": num_steps, "gpu_busy_share": 0.0}
    busy, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - intervals[0][0]
    by_kernel: dict[str, float] = defaultdict(float)
    for event in on_gpu:
        by_kernel[event.name[:100]] += event.time_range.elapsed_us()
    top = sorted(by_kernel.items(), key=lambda item: -item[1])[:_TOP_KERNELS]
    return {
        "steps": num_steps,
        "us_a_step": span / num_steps,
        "gpu_busy_share": busy / span,
        "kernel_shares": {name: time / busy for name, time in top},
    }
