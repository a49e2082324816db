"""Many requests, and what they leave behind in each process of the engine: memory, open files, threads, blocks.

    python -m benchmarks.soak --num-requests 20000
    python -m benchmarks.soak --seconds 1800 --concurrency 14 --http http://127.0.0.1:8000

Requests are of every kind: greedy and sampled, streamed and not, with and without text, some of them left in the
middle; with --http half of what is under way comes over HTTP, in as many kinds as that has. The engine must be this
machine's and this user's. After a warm-up it is looked at again and again.

With a number of requests, what is there at the end, when it is idle, is compared with the most that was seen in the
first half. With a time, it is looked at each minute, and the end is compared with the end of the warm-up, idle as well
and without HTTP connections: as many open files, and memory within some percent. Exits with code 1 if something grew by
more than is allowed, a block did not come back, or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import httpx
from tqdm import tqdm

from benchmarks.command import run_command
from benchmarks.soak_http import HttpRequests
from benchmarks.soak_ipc import IpcRequests
from benchmarks.soak_looks import Allowance, Snapshot, WatchedEngine, drift, growth
from frontend import AsyncClient, EngineError

_LOOK_EVERY_S = 60.0


class Requests(Protocol):
    async def one(self) -> str:
        """Sends one request and returns its kind. Raises EngineError or httpx.HTTPError if it ends as it must not."""
        ...


class Soak:
    """The requests of one soak, sent by as many tasks as may be under way at once, shared out among the sources."""

    def __init__(self, sources: Sequence[Requests]) -> None:
        self.num_done = 0
        self.by_kind: Counter[str] = Counter()
        self.failures: list[str] = []
        self._sources = sources

    async def send(self, goes_on: Callable[[], bool], concurrency: int) -> None:
        """Asks before each request whether there shall be another."""

        async def send_some(source: Requests) -> None:
            while goes_on():
                try:
                    self.by_kind[await source.one()] += 1
                except (EngineError, httpx.HTTPError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.num_done += 1

        await asyncio.gather(*(send_some(self._sources[index % len(self._sources)]) for index in range(concurrency)))


class Table:
    """A row for each look, in a form that can be pasted."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._started = time.monotonic()

    def print(self, look: Snapshot) -> None:
        if not self._names:
            self._names = list(look.processes)
            print("Memory in MiB, open files and threads of each process; free KV blocks; GPU memory in MiB.\n")
            print(f"| seconds | requests | running | free blocks | GPU | {' | '.join(self._names)} |")
            print(f"|{'---|' * (5 + len(self._names))}")
        gpu = "-" if look.gpu_memory is None else f"{look.gpu_memory:,}"
        uses = " | ".join(str(look.processes.get(name, "gone")) for name in self._names)
        blocks = f"{look.num_free_blocks:,} of {look.num_blocks:,}"
        seconds = f"{time.monotonic() - self._started:,.0f}"
        tqdm.write(f"| {seconds} | {look.num_requests:,} | {look.num_running} | {blocks} | {gpu} | {uses} |")
        sys.stdout.flush()


async def _soak_for_number(arguments: argparse.Namespace, soak: Soak, engine: WatchedEngine) -> list[str]:
    """Sends so many requests; returns what is wrong then."""
    total = arguments.warmup + arguments.num_requests
    with tqdm(total=total, unit="req", disable=not sys.stderr.isatty()) as bar:

        def first(count: int) -> Callable[[], bool]:
            left = iter(range(count))

            def goes_on() -> bool:
                bar.update(soak.num_done - bar.n)
                return next(left, None) is not None

            return goes_on

        table = Table()
        await soak.send(first(arguments.warmup), arguments.concurrency)
        looks = [await engine.look_when_idle(soak.num_done)]
        table.print(looks[0])
        sending = asyncio.create_task(soak.send(first(arguments.num_requests), arguments.concurrency))
        for part in range(1, arguments.looks + 1):
            due = arguments.warmup + arguments.num_requests * part // (arguments.looks + 1)
            while soak.num_done < due and not sending.done():
                await asyncio.sleep(0.02)
            looks.append(await engine.look(soak.num_done))
            table.print(looks[-1])
        await sending
    looks.append(await engine.look_when_idle(soak.num_done))
    table.print(looks[-1])
    return growth(looks, Allowance(arguments.allow_mib, arguments.allow_gpu_mib))


async def _soak_for_time(
    arguments: argparse.Namespace, soak: Soak, engine: WatchedEngine, http: HttpRequests | None
) -> list[str]:
    """Sends for so many seconds, those of the warm-up included; returns what is wrong then."""

    async def look_when_idle() -> Snapshot:
        if http is not None:
            await http.close_connections()
        return await engine.look_when_idle(soak.num_done)

    table = Table()
    started = time.monotonic()
    warm, end = started + arguments.warmup_seconds, started + arguments.seconds
    await soak.send(lambda: time.monotonic() < warm, arguments.warmup_concurrency or arguments.concurrency)
    before = await look_when_idle()
    table.print(before)
    sending = asyncio.create_task(soak.send(lambda: time.monotonic() < end, arguments.concurrency))
    due = warm + _LOOK_EVERY_S
    while due < end:
        await asyncio.wait([sending], timeout=due - time.monotonic())
        table.print(await engine.look(soak.num_done))
        due += _LOOK_EVERY_S
    await sending
    after = await look_when_idle()
    table.print(after)
    # The heap of a process that uses httpx fragments as it goes on: what malloc has handed out stays the same, what it
    # has taken for that grows, a MiB in ten minutes.
    return drift(before, after, arguments.allow_percent)


async def run(arguments: argparse.Namespace) -> int:
    http = HttpRequests(arguments.http, arguments.seed) if arguments.http else None
    async with AsyncClient(arguments.ipc) as client:
        engine = WatchedEngine(client)
        ipc = IpcRequests(client, arguments.seed)
        soak = Soak([ipc, http] if http is not None else [ipc])
        if arguments.seconds is not None:
            wrong = await _soak_for_time(arguments, soak, engine, http)
        else:
            wrong = await _soak_for_number(arguments, soak, engine)
    if http is not None:
        await http.close_connections()
    print("\n| requests | kind |\n|---|---|")
    for kind, count in sorted(soak.by_kind.items()):
        print(f"| {count:,} | {kind} |")
    if soak.failures:
        wrong.append(f"{len(soak.failures)} requests failed, the first with: {soak.failures[0]}")
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    parser.add_argument("--http", metavar="URL", help="half of the requests go over HTTP, to the same engine")
    parser.add_argument("--concurrency", type=int, default=256, help="requests under way at once")
    parser.add_argument("--seed", type=int, default=0)
    number = parser.add_argument_group("a number of requests")
    number.add_argument("--num-requests", type=int, default=20_000)
    number.add_argument("--warmup", type=int, default=1000, help="requests before the first look that counts")
    number.add_argument("--looks", type=int, default=4, help="looks between the first and the last")
    number.add_argument("--allow-mib", type=float, default=8.0, help="resident memory that a process may grow by")
    number.add_argument("--allow-gpu-mib", type=float, default=64.0, help="GPU memory that may be used more")
    timed = parser.add_argument_group("or a time")
    timed.add_argument("--seconds", type=float, help="how long to send, instead of how many")
    timed.add_argument("--warmup-seconds", type=float, default=60.0, help="of it, before the look that counts")
    timed.add_argument("--warmup-concurrency", type=int, help="requests under way at once till then, if not as many")
    timed.add_argument("--allow-percent", type=float, default=5.0, help="resident memory that a process may grow by")
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
