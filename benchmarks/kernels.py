"""Times the Triton kernels at the shapes of Qwen3-0.6B, beside the time that bytes and flops need.

    python -m benchmarks.kernels [--only decode] [--json results.json]

Each kernel runs many times in one CUDA graph, on inputs in turn that together are larger than the L2, timed by CUDA
events; the table gives the median over replays. The limit is the larger of bytes / 4.28 TB/s and flops / 702
TFLOP/s, which are what a copy and a large bf16 product reach on an H200; state others with --bandwidth and --rate.
Where the flash-attn package is installed, its time stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernel_cases import (
    Calls,
    Case,
    decode_cases,
    elementwise_cases,
    layer_cases,
    linear_cases,
    prefill_cases,
    sample_cases,
)
from benchmarks.kernel_step_cases import step_cases

GROUPS = {
    "elementwise": elementwise_cases,
    "linear": linear_cases,
    "layer": layer_cases,
    "sample": sample_cases,
    "decode": decode_cases,
    "prefill": prefill_cases,
    "step": step_cases,
}


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured, in microseconds."""

    kernel: str
    shape: str
    time: float
    limit: float
    flash_attn: float | None


def time_graph(calls: Calls, replays: int = 15) -> float:
    """Median microseconds a call, over replays of one graph that holds them all."""
    repeats = max(1, 16 // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    for replay in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return statistics.median(times)


def measure(case: Case, bandwidth: float, rate: float) -> Result:
    limit = max(case.bytes / (bandwidth * 1e6), case.flops / (rate * 1e6))
    beside = time_graph(case.beside) if case.beside else None
    return Result(case.kernel, case.shape, time_graph(case.calls), limit, beside)


def line(result: Result, flops: float) -> str:
    share = result.limit / result.time
    text = f"{result.kernel:20}{result.shape:22}{result.time:10.2f}{result.limit:10.2f}{share:8.0%}"
    if result.flash_attn:
        text += f"{result.flash_attn:12.2f}"
    if result.kernel == "prefill":
        text += f"   {flops / result.time / 1e6:.0f} TFLOP/s"
        if result.flash_attn:
            text += f", flash-attn {flops / result.flash_attn / 1e6:.0f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.28, help="memory bandwidth, TB/s")
    parser.add_argument("--rate", type=float, default=702, help="bf16 product rate, TFLOP/s")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--only", choices=GROUPS, help="one group of kernels")
    args = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"limits at {args.bandwidth} TB/s and {args.rate} TFLOP/s; times in microseconds")
    print(f"{'kernel':20}{'shape':22}{'time':>10}{'limit':>10}{'share':>8}{'flash-attn':>12}")
    results = []
    for name, cases in GROUPS.items():
        if args.only in (None, name):
            for case in cases():
                results.append(measure(case, args.bandwidth, args.rate))
                print(line(results[-1], case.flops), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
