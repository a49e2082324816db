"""The benchmark client: a process of its own that measures a running engine, over IPC or over HTTP.

    python -m benchmarks.client --workload nano
    python -m benchmarks.client --workload nano --http http://127.0.0.1:8000
    python -m benchmarks.client --num-requests 200 --input-len 64-512 --output-len 64-256 --request-rate 20

Prints a table, saves JSON on request, and exits with code 1 if a request did not return the tokens asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path

from benchmarks.http_transport import HttpTransport
from benchmarks.ipc_transport import IpcTransport
from benchmarks.report import RunReport, save_json
from benchmarks.runner import RequestResult, Transport, problems, run_workload
from benchmarks.workloads import MAX_TOKEN_ID, NAMES, LengthRange, Workload, named_workload, random_requests
from frontend import AsyncClient, EngineError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workload", choices=NAMES, help="a named workload; without one, the options below make one")
    target = parser.add_argument_group("what is measured")
    target.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    target.add_argument("--http", metavar="URL", help="measure an OpenAI-compatible server instead")
    target.add_argument("--model", help="model name for --http (default: the first that the server lists)")
    target.add_argument(
        "--vocab-size", type=int, help="bound of the random ids (default: the engine's, at most 10,000)"
    )
    custom = parser.add_argument_group("a workload of your own")
    custom.add_argument("--num-requests", type=int, default=100)
    custom.add_argument("--input-len", type=LengthRange.parse, default=LengthRange(128, 128), metavar="N or A-B")
    custom.add_argument("--output-len", type=LengthRange.parse, default=LengthRange(128, 128), metavar="N or A-B")
    custom.add_argument(
        "--shared-prefix", type=int, default=0, help="ids that begin every prompt, on top of its length"
    )
    custom.add_argument("--temperature", type=float, help="default: 0, or the named workload's")
    custom.add_argument("--seed", type=int, default=0)
    timing = parser.add_argument_group("how it is run")
    timing.add_argument("--request-rate", type=float, help="requests a second, Poisson (default: all at once)")
    timing.add_argument("--concurrency", type=int, help="most requests under way at once (default: no bound)")
    timing.add_argument(
        "--warmup", action=argparse.BooleanOptionalAction, default=True, help="one run that is not counted"
    )
    timing.add_argument("--runs", type=int, default=1)
    timing.add_argument("--json", type=Path, metavar="FILE", help="save every figure and time")
    parsed = parser.parse_args(arguments)
    for name in ("num_requests", "runs", "request_rate", "concurrency", "vocab_size"):
        value = getattr(parsed, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if parsed.shared_prefix < 0:
        parser.error(f"--shared-prefix must not be negative, got {parsed.shared_prefix}")
    return parsed


def make_workload(arguments: argparse.Namespace, vocab_size: int) -> Workload:
    if arguments.workload is not None:
        base = named_workload(arguments.workload, vocab_size)
    else:
        requests = random_requests(
            arguments.num_requests,
            arguments.input_len,
            arguments.output_len,
            vocab_size,
            arguments.shared_prefix,
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


async def connect(arguments: argparse.Namespace) -> Transport:
    if arguments.http is not None:
        transport = HttpTransport(arguments.http, arguments.model)
        await transport.connect()
        return transport
    client = AsyncClient(arguments.ipc)
    await client.connect()
    return IpcTransport(client)


async def run(arguments: argparse.Namespace) -> int:
    transport = await connect(arguments)
    try:
        vocab_size = arguments.vocab_size or await transport.vocab_size() or MAX_TOKEN_ID + 1
        workload = make_workload(arguments, vocab_size)
        runs: list[list[RequestResult]] = []
        reports: list[RunReport] = []
        for index in range(arguments.runs + arguments.warmup):
            results = await run_workload(transport, workload, show_progress=sys.stderr.isatty())
            wrong = problems(results)
            if wrong:
                print("\n".join(wrong[:10]), file=sys.stderr)
                print(f"error: {len(wrong)} of {len(results)} requests went wrong", file=sys.stderr)
                return 1
            if index >= arguments.warmup:
                runs.append(results)
                reports.append(RunReport.of(workload, results))
                print(reports[-1].table() + "\n", flush=True)
    finally:
        await transport.close()
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
    if arguments.json is not None:
        save_json(arguments.json, workload, reports, runs, transport.describe())
    return 0


def main() -> int:
    arguments = parse_arguments()
    try:
        import uvloop
    except ImportError:
        runner = asyncio.run
    else:
        runner = uvloop.run
    try:
        return runner(run(arguments))
    except (EngineError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
