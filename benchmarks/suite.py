"""Measures every named workload, each with an engine started as it should be for it, and prints tables to paste.

    python -m benchmarks.suite
    python -m benchmarks.suite --workload seed,idle --runs 1 -- --model ~/Qwen3-0.6B

What follows `--` are flags of the launcher, in place of the shape of Qwen3-0.6B with random weights. The workloads of
throughput go over IPC, with the prefix cache off; those of a server in use go over HTTP. Each is run by a benchmark
client of its own, and workloads that want the same engine share one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import online
from benchmarks.command import run_command
from benchmarks.workloads import NAMES
from frontend import EngineError

_ROOT = Path(__file__).parents[1]
_MODEL = ("--model", str(_ROOT / "benchmarks/models/qwen3-0.6b"), "--load-format", "dummy", "--skip-tokenizer-init")
# As many requests as each workload has at once, or may have: fewer are left to wait where that is what is measured.
_MAX_NUM_SEQS = {"nano": 512, "seed": 64, "single": 1, "b8": 8, "prefill": 512, "longctx": 512}
_STOP_SECONDS = 60.0

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a run of a workload of throughput comes down to."""

    name: str
    value: Callable[[Run], float]
    digits: int


_OUTPUT_RATE = Figure("output tok/s", lambda run: run["output_rate"], 0)
_FIGURES = {
    "prefill": Figure("input tok/s", lambda run: run["input_tokens"] / run["duration_s"], 0),
    "longctx": Figure("seconds", lambda run: run["duration_s"], 3),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine, and how long it took to be ready."""

    ipc: str
    http: str | None
    seconds: float


def engine_flags(workload: str) -> tuple[str, ...]:
    """How the engine is started for a workload; one of a server in use wants nothing but the defaults."""
    if workload in online.NAMES:
        return ()
    return ("--no-enable-prefix-caching", "--max-num-seqs", str(_MAX_NUM_SEQS[workload]))


@contextlib.asynccontextmanager
async def running_engine(flags: tuple[str, ...]) -> AsyncIterator[Engine]:
    """Starts an engine, waits until it is ready, and stops it in the end.

    Raises:
        EngineError: it did not start, for the reason that it gave.
    """
    with tempfile.TemporaryDirectory(prefix="mini-vllm-suite-") as directory:
        own = ("--ipc", f"ipc://{directory}/engine.sock", "--port", "0", "--log-format", "json")
        command = [sys.executable, str(_ROOT / "launch.py"), *flags, *own]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=PIPE)
        assert process.stderr is not None
        try:
            ready = await _wait_until_ready(process.stderr)
            rest = asyncio.create_task(_pass_on(process.stderr))
            yield Engine(ready["ipc"], ready.get("http"), ready["seconds"])
        finally:
            await _stop(process)
        await rest


async def _wait_until_ready(log: asyncio.StreamReader) -> dict[str, Any]:
    """The record that says that the engine is ready."""
    reason = "the engine ended before it was ready"
    async for line in log:
        record = _record(line)
        if record.get("message") == "ready":
            return record
        if record.get("level") == "error":
            reason = record["message"]
    raise EngineError(reason)


async def _pass_on(log: asyncio.StreamReader) -> None:
    """Shows what goes wrong while the engine runs."""
    async for line in log:
        record = _record(line)
        if record.get("level") in ("warning", "error"):
            print(record["message"], file=sys.stderr)


def _record(line: bytes) -> dict[str, Any]:
    """A record of the log. What an interpreter prints before there is a log is an error as it stands."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return {"level": "error", "message": line.decode(errors="replace").rstrip()}
    return record


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def measure(engine: Engine, workload: str, num_runs: int, vocab_size: int | None, file: Path) -> str:
    """Runs a workload and saves its figures. Returns what the client printed.

    Raises:
        EngineError: the client failed, or there is no HTTP for a workload that goes over it.
    """
    if workload in online.NAMES:
        if engine.http is None:
            raise EngineError(f"--workload {workload} goes over HTTP, and the launcher was told --no-http")
        target = ["--http", engine.http]
    else:
        target = ["--ipc", engine.ipc]
    if vocab_size is not None:
        target += ["--vocab-size", str(vocab_size)]
    options = ["--workload", workload, "--runs", str(num_runs), "--json", str(file)]
    command = [sys.executable, "-m", "benchmarks.client", *target, *options]
    process = await asyncio.create_subprocess_exec(*command, cwd=_ROOT, stdout=PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        await _stop(process)
    if process.returncode:
        raise EngineError(f"the benchmark client failed at --workload {workload} (exit code {process.returncode})")
    return output.decode()


def row_of(workload: str, runs: list[Run]) -> str:
    """A row of the table of throughput."""
    figure = _FIGURES.get(workload, _OUTPUT_RATE)
    values = sorted(figure.value(run) for run in runs)
    median, low, high = (f"{value:,.{figure.digits}f}" for value in (statistics.median(values), values[0], values[-1]))
    return f"| {workload}, {figure.name} | {_MAX_NUM_SEQS[workload]} | {median} | {low} to {high} |"


async def run(arguments: argparse.Namespace) -> int:
    base = tuple(arguments.launch_flags) or _MODEL
    throughput = ["| workload | `--max-num-seqs` | median | lowest to highest |", "|---|---|---|---|"]
    online_tables: list[str] = []
    starts = ["| engine | ready, s |", "|---|---|"]
    engines: dict[tuple[str, ...], list[str]] = {}
    for workload in arguments.workload:
        engines.setdefault(engine_flags(workload), []).append(workload)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for flags, workloads in engines.items():
        print(f"starting the engine for {', '.join(workloads)}", file=sys.stderr)
        async with running_engine((*base, *flags)) as engine:
            starts.append(f"| {' '.join(flags) or 'default flags'} | {engine.seconds:.1f} |")
            for workload in workloads:
                print(f"measuring {workload}", file=sys.stderr)
                file = arguments.out / f"{workload}.json"
                output = await measure(engine, workload, arguments.runs, arguments.vocab_size, file)
                if workload in online.NAMES:
                    online_tables.append(output.strip())
                else:
                    throughput.append(row_of(workload, json.loads(file.read_text())["runs"]))
    tables = [throughput] if len(throughput) > 2 else []
    print("\n\n".join(["\n".join(table) for table in (*tables, starts)] + online_tables))
    return 0


def _workloads(text: str) -> list[str]:
    """`seed,idle`. Raises ValueError for anything else."""
    names = text.split(",")
    for name in names:
        if name not in NAMES + online.NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES + online.NAMES)}")
    return names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__.split("\n", 1)[0], usage="%(prog)s [options] [-- FLAGS]"
    )
    parser.add_argument(
        "--workload", type=_workloads, default=[*NAMES, *online.NAMES], metavar="NAME,NAME,…", help="default: all"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each workload, after one that is not counted")
    parser.add_argument("--out", type=Path, default=Path("results/suite"), help="where every figure and time is saved")
    parser.add_argument("--vocab-size", type=int, help="bound of the random ids, where it is less than 10,000")
    parser.add_argument("launch_flags", nargs="*", metavar="FLAGS", help="flags of the launcher, after --")
    parsed = parser.parse_args(arguments)
    if parsed.runs < 1:
        parser.error(f"--runs must be positive, got {parsed.runs}")
    return parsed


def main() -> int:
    return run_command(run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
