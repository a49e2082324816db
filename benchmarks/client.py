"""The benchmark client: a process of its own that measures a running engine, over IPC or over HTTP.

    python -m benchmarks.client --workload nano
    python -m benchmarks.client --workload arrival --http http://127.0.0.1:8000
    python -m benchmarks.client --num-requests 200 --input-len 64-512 --output-len 64-256 --request-rate 20

Prints tables, saves JSON on request, and exits with code 1 if a request did not return the tokens asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from benchmarks import online
from benchmarks.http_transport import HttpTransport
from benchmarks.ipc_transport import IpcTransport
from benchmarks.online_report import OnlineReport, arrival_report, idle_report, poisson_report
from benchmarks.report import RunReport, save_json
from benchmarks.runner import RequestsFailedError, Transport, require_whole, run_workload, settle
from benchmarks.workloads import MAX_TOKEN_ID, NAMES, LengthRange, Workload, named_workload, random_requests
from frontend import AsyncClient, EngineError

# The options that make a workload of one's own, and those that change an online one, with the names of their plans.
_CUSTOM = ("num_requests", "input_len", "output_len", "shared_prefix")
_ONLINE = {
    "num_requests": "num_requests",
    "input_len": "input_len",
    "output_len": "output_len",
    "request_rate": "request_rate",
    "prompt_lens": "prompt_lens",
    "streams": "num_streams",
    "stream_output_len": "stream_output_len",
}


def _lengths(text: str) -> tuple[int, ...]:
    """`16,128`. Raises ValueError for anything else."""
    lengths = tuple(int(length) for length in text.split(","))
    if min(lengths) < 1:
        raise ValueError(f"a length must be at least 1, got {text!r}")
    return lengths


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """The options that `connect` and `id_bound` read."""
    target = parser.add_argument_group("what is measured")
    target.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    target.add_argument("--http", metavar="URL", help="measure an OpenAI-compatible server instead")
    target.add_argument("--model", help="model name for --http (default: the first that the server lists)")
    target.add_argument(
        "--vocab-size", type=int, help="bound of the random ids (default: the engine's, at most 10,000)"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--workload", choices=NAMES + online.NAMES, help="a named workload; without one, the options below make one"
    )
    add_target_options(parser)
    custom = parser.add_argument_group("a workload of your own, or another size of an online one")
    custom.add_argument(
        "--num-requests", type=int, help="default: 100; online: of each prompt length, or those that arrive"
    )
    custom.add_argument("--input-len", type=LengthRange.parse, metavar="N or A-B", help="default: 128")
    custom.add_argument("--output-len", type=LengthRange.parse, metavar="N or A-B", help="default: 128")
    custom.add_argument("--shared-prefix", type=int, help="ids that begin every prompt, on top of its length")
    custom.add_argument("--temperature", type=float, help="default: 0, or the named workload's")
    custom.add_argument("--seed", type=int, default=0)
    size = parser.add_argument_group("online workloads only")
    size.add_argument("--prompt-lens", type=_lengths, metavar="N,N,…", help="idle: prompts timed to their first token")
    size.add_argument(
        "--streams", type=int, help="requests whose latency is taken: one by one if idle, else running together"
    )
    size.add_argument("--stream-output-len", type=int, help="arrival: tokens of each stream of a round")
    timing = parser.add_argument_group("how it is run")
    timing.add_argument("--request-rate", type=float, help="requests a second, Poisson (default: all at once)")
    timing.add_argument("--concurrency", type=int, help="most requests under way at once (default: no bound)")
    timing.add_argument(
        "--warmup", action=argparse.BooleanOptionalAction, default=True, help="begin with a run that is not counted"
    )
    timing.add_argument("--runs", type=int, default=1)
    timing.add_argument("--json", type=Path, metavar="FILE", help="save every figure and time")
    parsed = parser.parse_args(arguments)
    counts = ("num_requests", "runs", "request_rate", "concurrency", "vocab_size", "streams", "stream_output_len")
    for name in counts:
        value = getattr(parsed, name)
        if value is not None and value <= 0:
            parser.error(f"{_flag(name)} must be positive, got {value}")
    if parsed.shared_prefix is not None and parsed.shared_prefix < 0:
        parser.error(f"--shared-prefix must not be negative, got {parsed.shared_prefix}")
    for name in _meaningless(parsed):
        parser.error(f"{_flag(name)} does not go with --workload {parsed.workload}")
    return parsed


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _meaningless(arguments: argparse.Namespace) -> list[str]:
    """Options that were given and that the workload does not have."""
    only_online = set(_ONLINE) - set(_CUSTOM) - {"request_rate"}
    if arguments.workload is None:
        without = only_online
    elif arguments.workload in NAMES:
        without = only_online | set(_CUSTOM)
    else:
        fields = {field.name for field in dataclasses.fields(online.default_plan(arguments.workload))}
        without = {"shared_prefix", "temperature", "concurrency"}
        without |= {option for option, name in _ONLINE.items() if name not in fields}
    return [name for name in sorted(without) if getattr(arguments, name) is not None]


def make_workload(arguments: argparse.Namespace, vocab_size: int) -> Workload:
    if arguments.workload is not None:
        base = named_workload(arguments.workload, vocab_size)
    else:
        requests = random_requests(
            arguments.num_requests or 100,
            arguments.input_len or LengthRange(128, 128),
            arguments.output_len or LengthRange(128, 128),
            vocab_size,
            arguments.shared_prefix or 0,
            arguments.seed,
        )
        base = Workload("custom", requests, 0.0)
    return Workload(
        base.name,
        base.requests,
        base.temperature if arguments.temperature is None else arguments.temperature,
        arguments.request_rate,
        arguments.concurrency,
        arguments.seed,
    )


def make_plan(arguments: argparse.Namespace) -> online.Plan:
    given = {name: getattr(arguments, option) for option, name in _ONLINE.items()}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(online.default_plan(arguments.workload), **changes)


async def connect(arguments: argparse.Namespace) -> Transport:
    if arguments.http is not None:
        transport = HttpTransport(arguments.http, arguments.model)
        await transport.connect()
        return transport
    client = AsyncClient(arguments.ipc)
    await client.connect()
    return IpcTransport(client)


async def id_bound(arguments: argparse.Namespace, transport: Transport) -> int:
    """The vocabulary that random ids are drawn from."""
    return arguments.vocab_size or await transport.vocab_size() or MAX_TOKEN_ID + 1


async def run(arguments: argparse.Namespace) -> int:
    transport = await connect(arguments)
    try:
        vocab_size = await id_bound(arguments, transport)
        measure = measure_online if arguments.workload in online.NAMES else measure_throughput
        workload, runs = await measure(arguments, transport, vocab_size)
    except RequestsFailedError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        await transport.close()
    if arguments.json is not None:
        save_json(arguments.json, workload, runs, transport.describe())
    return 0


Saved = tuple[dict[str, Any], list[dict[str, Any]]]


async def measure_throughput(arguments: argparse.Namespace, transport: Transport, vocab_size: int) -> Saved:
    """Prints the figures of each run and returns, to be saved, what was run and all figures and times."""
    workload = make_workload(arguments, vocab_size)
    saved: list[dict[str, Any]] = []
    reports: list[RunReport] = []
    for index in range(arguments.runs + arguments.warmup):
        settle()
        results = await run_workload(transport, workload, show_progress=sys.stderr.isatty())
        require_whole(results)
        if index >= arguments.warmup:
            reports.append(RunReport.of(workload, results))
            saved.append(reports[-1].saved(results))
            print(reports[-1].table() + "\n", flush=True)
    if reports[0].cached_tokens and not arguments.shared_prefix:
        print(
            "note: prompts were found in the engine's prefix cache, where an earlier run left them; start it with "
            "--no-enable-prefix-caching to measure prefill",
            file=sys.stderr,
        )
    if len(reports) > 1:
        rates = [report.output_rate for report in reports]
        print(
            f"{len(reports)} runs: output tok/s median {statistics.median(rates):,.0f}, "
            f"{min(rates):,.0f} to {max(rates):,.0f}; "
            f"duration median {statistics.median(report.duration_s for report in reports):.3f} s"
        )
    return workload.saved(), saved


async def measure_online(arguments: argparse.Namespace, transport: Transport, vocab_size: int) -> Saved:
    """The same for the workloads of a server in use."""
    plan = make_plan(arguments)
    workloads = online.OnlineWorkloads(
        transport, vocab_size, arguments.seed, arguments.warmup, show_progress=sys.stderr.isatty()
    )
    saved = []
    for _ in range(arguments.runs):
        settle()
        began, worked = time.perf_counter(), time.process_time()
        report = await _online_report(workloads, plan)
        # What tells whether the client was what was measured.
        busy = (time.process_time() - worked) / (time.perf_counter() - began)
        report.facts["CPU that the client used, of one core"] = f"{busy:.0%}"
        saved.append(report.saved())
        print(report.table() + "\n", flush=True)
    return {"name": arguments.workload, "seed": arguments.seed, **dataclasses.asdict(plan)}, saved


async def _online_report(workloads: online.OnlineWorkloads, plan: online.Plan) -> OnlineReport:
    if isinstance(plan, online.IdlePlan):
        return idle_report(await workloads.idle(plan))
    if isinstance(plan, online.ArrivalPlan):
        return arrival_report(plan.name, await workloads.arrivals(plan))
    return poisson_report(await workloads.poisson(plan))


def exit_code(measurement: Coroutine[Any, Any, int]) -> int:
    """Runs a measurement to its exit code: 2 and a line on stderr if there is no engine or a setting is wrong."""
    try:
        import uvloop
    except ImportError:
        runner = asyncio.run
    else:
        runner = uvloop.run
    try:
        return runner(measurement)
    except (EngineError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main() -> int:
    return exit_code(run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
