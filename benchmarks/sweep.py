"""Latency against throughput: one server measured at a range of loads, and plots of one or more servers.

    python -m benchmarks.sweep --concurrency 1,2,4,8,16 --name "2 cores" --json two.json
    python -m benchmarks.sweep --rate 1,2,5,10 --http http://127.0.0.1:8000 --name other --json other.json
    python -m benchmarks.sweep --plot two.json other.json --out sweep

Measures over IPC or over HTTP, as the benchmark client does, and prints a row for each load. The file is written after
every point, so that Ctrl-C loses none but the one under way. Plots become sweep.png and sweep.svg.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.client import add_target_options, connect, exit_code, id_bound
from benchmarks.report import Distribution, RunReport, provenance
from benchmarks.runner import RequestsFailedError, Transport, require_whole, run_users, run_workload, settle
from benchmarks.sweep_file import Point, Sweep, SweepWorkload, load_sweep, require_name, require_writable, save_sweep
from benchmarks.workloads import BenchmarkRequest, LengthRange, Workload, new_requests

_DEFAULT_DURATION_S = 30.0
# What warms up and is not counted: as many requests as the highest concurrency, or so many, with short answers.
_WARMUP_REQUESTS = 8
_WARMUP_OUTPUT_LEN = 8

# Options of measuring alone, and of plotting alone.
_MEASURING = (
    *("name", "json", "ipc", "http", "model", "vocab_size", "input_len", "output_len"),
    *("num_requests", "duration", "temperature", "seed", "warmup"),
)
_PLOTTING = ("out", "title")


def _concurrencies(text: str) -> tuple[float, ...]:
    """`1,2,4`. Raises ValueError, or argparse's own error, for anything but different positive integers."""
    return _loads(text, [int(value) for value in text.split(",")])


def _rates(text: str) -> tuple[float, ...]:
    """`0.5,1,2`. Raises ValueError, or argparse's own error, for anything but different positive numbers."""
    return _loads(text, [float(value) for value in text.split(",")])


def _loads(text: str, loads: Sequence[float]) -> tuple[float, ...]:
    if not all(0 < load < math.inf for load in loads):
        raise argparse.ArgumentTypeError(f"every value must be positive, got {text!r}")
    if len(set(loads)) < len(loads):
        raise argparse.ArgumentTypeError(f"no value may stand there twice, got {text!r}")
    return tuple(loads)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n", 1)[0])
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--concurrency", type=_concurrencies, metavar="N,N,…", help="measure with so many requests under way at once"
    )
    what.add_argument(
        "--rate", type=_rates, metavar="R,R,…", help="measure with so many requests sent a second (a Poisson process)"
    )
    what.add_argument(
        "--plot", type=Path, nargs="+", metavar="FILE", help="draw what was saved, of one or more servers"
    )
    add_target_options(parser)
    load = parser.add_argument_group("what is sent")
    load.add_argument("--input-len", type=LengthRange.parse, metavar="N or A-B", help="default: 128")
    load.add_argument("--output-len", type=LengthRange.parse, metavar="N or A-B", help="default: 128")
    size = load.add_mutually_exclusive_group()
    size.add_argument("--num-requests", type=int, help="requests at each load")
    size.add_argument(
        "--duration", type=float, metavar="SECONDS", help=f"how long to send at each load ({_DEFAULT_DURATION_S:g})"
    )
    load.add_argument("--temperature", type=float, help="default: 0")
    load.add_argument("--seed", type=int, help="of lengths and times of arrival; prompts are always new (default: 0)")
    load.add_argument(
        "--warmup", action=argparse.BooleanOptionalAction, help="begin with short requests that are not counted (yes)"
    )
    saved = parser.add_argument_group("what is saved")
    saved.add_argument("--name", help="what plots call the server (default: its model)")
    saved.add_argument("--json", type=Path, metavar="FILE", help="where the figures of every point go")
    drawn = parser.add_argument_group("what is drawn")
    drawn.add_argument("--out", type=Path, metavar="PATH", help="the plot, as PATH.png and PATH.svg (default: sweep)")
    drawn.add_argument("--title", help="default: model and lengths")
    parsed = parser.parse_args(arguments)
    _require_sense(parser, parsed)
    return parsed


def _require_sense(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    for name in _MEASURING if parsed.plot else _PLOTTING:
        if getattr(parsed, name) is not None:
            parser.error(f"{_flag(name)} {'does not go' if parsed.plot else 'goes only'} with --plot")
    for name in ("num_requests", "duration", "vocab_size"):
        value = getattr(parsed, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{_flag(name)} must be positive, got {value}")
    if parsed.temperature is not None and not 0 <= parsed.temperature < math.inf:
        parser.error(f"--temperature must not be negative, got {parsed.temperature}")
    if not parsed.plot and parsed.json is None:
        parser.error("--json FILE is needed: what is measured is saved there")
    if parsed.name is not None:
        try:
            require_name(parsed.name)
        except ValueError as error:
            parser.error(f"--name: {error}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The loads, and what is sent at each: `num_requests`, or as many as in `duration_s`; the other one is None."""

    swept: Literal["concurrency", "request_rate"]
    loads: tuple[float, ...]
    input_len: LengthRange
    output_len: LengthRange
    temperature: float
    num_requests: int | None
    duration_s: float | None
    seed: int

    @staticmethod
    def of(arguments: argparse.Namespace) -> SweepPlan:
        duration_s = arguments.duration
        if arguments.num_requests is None and duration_s is None:
            duration_s = _DEFAULT_DURATION_S
        return SweepPlan(
            swept="concurrency" if arguments.concurrency else "request_rate",
            loads=arguments.concurrency or arguments.rate,
            input_len=arguments.input_len or LengthRange(128, 128),
            output_len=arguments.output_len or LengthRange(128, 128),
            temperature=arguments.temperature or 0.0,
            num_requests=arguments.num_requests,
            duration_s=duration_s,
            seed=arguments.seed or 0,
        )

    def saved(self) -> SweepWorkload:
        return SweepWorkload(
            input_len=str(self.input_len),
            output_len=str(self.output_len),
            temperature=self.temperature,
            num_requests=self.num_requests,
            duration_s=self.duration_s,
            seed=self.seed,
        )


class Measurement:
    """Measures one engine at the loads of a plan, one after another.

    Args:
        vocab_size: bound of the random ids.
    """

    def __init__(self, transport: Transport, plan: SweepPlan, vocab_size: int, show_progress: bool = False) -> None:
        self._transport = transport
        self._plan = plan
        self._vocab_size = vocab_size
        self._show_progress = show_progress

    async def require_room(self) -> None:
        """Raises ValueError if the longest request does not fit the engine's context."""
        limit = await self._transport.max_model_len()
        needed = self._plan.input_len.high + self._plan.output_len.high
        if limit is not None and needed > limit:
            raise ValueError(
                f"--input-len and --output-len make up to {needed:,} tokens and the engine's context has {limit:,}"
            )

    async def warm_up(self) -> None:
        """Raises RequestsFailedError."""
        plan = self._plan
        count = int(max(plan.loads)) if plan.swept == "concurrency" else _WARMUP_REQUESTS
        output_len = min(_WARMUP_OUTPUT_LEN, plan.output_len.high)
        short = LengthRange(output_len, output_len)
        requests = new_requests(count, plan.input_len, short, self._vocab_size, random.Random())
        workload = Workload("warm-up", requests, plan.temperature)
        require_whole(await run_workload(self._transport, workload, self._show_progress, keep_bar=False))

    async def points(self) -> AsyncIterator[Point]:
        """Raises RequestsFailedError when a request went wrong: its point does not count, and no later one is run."""
        for index, load in enumerate(self._plan.loads):
            name = f"{self._plan.swept.replace('_', ' ')} {load:g} ({index + 1} of {len(self._plan.loads)})"
            settle()
            yield Point.of(load, await self._run(load, name))

    async def _run(self, load: float, name: str) -> RunReport:
        plan = self._plan
        is_rate = plan.swept == "request_rate"
        # Begun anew at each load, so that all loads are of the same lengths.
        lengths = random.Random(plan.seed)
        if plan.duration_s is not None and not is_rate:
            workload = Workload(name, [], plan.temperature, concurrency=int(load))
            results = await run_users(
                self._transport, workload, self._endless(lengths), plan.duration_s, self._show_progress, keep_bar=False
            )
        else:
            count = plan.num_requests or max(1, round(load * (plan.duration_s or 0)))
            requests = new_requests(count, plan.input_len, plan.output_len, self._vocab_size, lengths)
            rate, concurrency = (load, None) if is_rate else (None, int(load))
            workload = Workload(name, requests, plan.temperature, rate, concurrency, plan.seed)
            results = await run_workload(self._transport, workload, self._show_progress, keep_bar=False)
        require_whole(results)
        return RunReport.of(workload, results)

    def _endless(self, lengths: random.Random) -> Iterator[BenchmarkRequest]:
        while True:
            yield from new_requests(1, self._plan.input_len, self._plan.output_len, self._vocab_size, lengths)


def table_head(load_name: str) -> str:
    columns = [
        "output tok/s",
        "tok/s per user",
        "TTFT p50, ms",
        "p99",
        "ITL p50, ms",
        "p99",
        "end to end p50, ms",
        "p99",
    ]
    return f"| {load_name} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}"


def table_row(point: Point) -> str:
    user = "-" if point.user_tokens_per_s is None else f"{point.user_tokens_per_s:,.1f}"
    latencies = [_two(figures) for figures in (point.ttft_ms, point.inter_token_ms, point.e2e_ms)]
    return f"| {point.load:g} | {point.output_tokens_per_s:,.0f} | {user} | {' | '.join(latencies)} |"


def _two(figures: Distribution | None) -> str:
    return "- | -" if figures is None else f"{figures.p50:,.2f} | {figures.p99:,.2f}"


async def measure(arguments: argparse.Namespace) -> int:
    """Measures, prints and saves point after point; what was measured stays saved, however it ends."""
    plan = SweepPlan.of(arguments)
    transport = await connect(arguments)
    points: list[Point] = []
    try:
        vocab_size = await id_bound(arguments, transport)
        measurement = Measurement(transport, plan, vocab_size, show_progress=sys.stderr.isatty())
        await measurement.require_room()
        target = transport.describe()
        name = arguments.name or str(target["model"])
        require_name(name)
        require_writable(arguments.json)
        if arguments.warmup is not False:
            await measurement.warm_up()
        async for point in measurement.points():
            points.append(point)
            sweep = Sweep(
                name=name,
                swept=plan.swept,
                workload=plan.saved(),
                points=points,
                **provenance(target),
            )
            save_sweep(arguments.json, sweep)
            if len(points) == 1:
                print(table_head(sweep.load_name))
            print(table_row(point), flush=True)
    except RequestsFailedError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        where = f"{len(points)} of {len(plan.loads)} points are in {arguments.json}"
        print(where if points else "no point was measured", file=sys.stderr)
        await transport.close()
    return 0


def plot(arguments: argparse.Namespace) -> int:
    try:
        from benchmarks.sweep_plot import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("error: plots need matplotlib, which is not installed: pip install 'matplotlib>=3.9'", file=sys.stderr)
        return 2
    try:
        sweeps = [load_sweep(path) for path in arguments.plot]
        for path in draw(sweeps, arguments.out or Path("sweep"), arguments.title):
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    arguments = parse_arguments()
    return plot(arguments) if arguments.plot else exit_code(measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
