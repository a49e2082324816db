"""Many streams at once over HTTP, and what a streamed token costs each process of the engine.

    python -m benchmarks.streams --streams 1000 --output-len 128 --http http://127.0.0.1:8000

The engine must be this machine's and this user's, and serve HTTP; --ipc names another than the default one. The table
gives processor time by process over the tokens delivered, and the memory that each holds at the end.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

from benchmarks.command import run_command
from benchmarks.http_transport import HttpTransport
from benchmarks.processes import EngineProcesses, ProcessUse, own_use
from benchmarks.runner import RequestsFailedError, require_whole, run_workload, settle
from benchmarks.workloads import LengthRange, Workload, random_requests
from frontend import AsyncClient, EngineError


def allow_files(count: int) -> None:
    """Raises this process's limit of open files, as far as it may.

    Raises:
        EngineError: that is not far enough.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < count:
        raise EngineError(f"{count} open files are needed, and {most} allowed: see `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))


def table(before: dict[str, ProcessUse], after: dict[str, ProcessUse], num_tokens: int) -> str:
    """Processor time a token and memory, by process."""
    lines = ["| process | µs a token | MiB |", "|---|---|---|"]
    for name, use in after.items():
        spent = use.cpu_seconds - (before[name].cpu_seconds if name in before else 0.0)
        lines.append(f"| {name} | {spent / num_tokens * 1e6:.1f} | {use.memory:.0f} |")
    return "\n".join(lines)


async def run(arguments: argparse.Namespace) -> int:
    allow_files(arguments.streams + 256)
    async with AsyncClient(arguments.ipc) as client:
        engine = client.engine
        processes = EngineProcesses(client.address)
    transport = HttpTransport(arguments.http)
    await transport.connect()
    lengths = (
        LengthRange(arguments.input_len, arguments.input_len),
        LengthRange(arguments.output_len, arguments.output_len),
    )
    requests = random_requests(arguments.streams, *lengths, engine.vocab_size)
    workload = Workload(f"{arguments.streams} streams", requests, temperature=1.0)
    # A short run first, so that connections and buffers are there.
    few = Workload("warm-up", requests[: arguments.streams // 10 + 1], temperature=1.0)
    await run_workload(transport, few, show_progress=False)
    settle()
    before, started = {"client": own_use(), **processes.look()}, time.perf_counter()
    results = await run_workload(transport, workload, show_progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    after = {"client": own_use(), **processes.look()}
    await transport.close()
    require_whole(results)
    tokens = sum(result.output_len for result in results)
    events = sum(len(set(result.token_times)) for result in results)
    print(f"{len(results):,} streams, {tokens:,} tokens in {events:,} events: {tokens / seconds:,.0f} tok/s\n")
    print(table(before, after, tokens))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--http", default="http://127.0.0.1:8000", help="the engine's HTTP address")
    parser.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    parser.add_argument("--streams", type=int, default=1000, help="streams at once")
    parser.add_argument("--input-len", type=int, default=8, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    return run_command(run(parser.parse_args()), RequestsFailedError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
