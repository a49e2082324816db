"""Streams through an engine whose worker and core are killed and stopped at random, compared with what they should be.

    python launch.py --give-up-after 1000000 --step-timeout 2
    python -m benchmarks.chaos --seconds 60

The answers are first taken without faults. Then as many streams as `--streams` are kept running while the worker and
the core are ended by SIGKILL or stopped by SIGSTOP, some streams are left in the middle, and some clients go. On a CPU,
in float32, every other stream must bring exactly the tokens that it brought without faults. The engine must be this
machine's and this user's. Exits with code 1 if a token was lost, repeated or changed, a request failed, or a block did
not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from benchmarks.command import run_command
from benchmarks.processes import EngineProcesses
from benchmarks.workloads import random_ids
from frontend import AsyncClient, EngineError, SamplingParams

# How many different requests there are; each is sent again and again.
_NUM_REQUESTS = 64
_MODULES = {"worker": "worker.main", "core": "core.engine"}
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)
_CLIENTS = 4
# Of the streams: how many are left in the middle, and how many of the clients' lives end without a goodbye.
_LEAVE, _VANISH_S = 0.05, 10.0
_IDLE_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    prompt: list[int]
    params: SamplingParams


@dataclass
class Tally:
    completed: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    recovery_s: list[float] = field(default_factory=list)
    longest_pause_s: float = 0.0

    def check(self, tokens: list[int], expected: list[int], is_whole: bool) -> None:
        """Notes whether the tokens are the beginning, or all, of those expected."""
        self.num_tokens += len(tokens)
        if tokens != (expected if is_whole else expected[: len(tokens)]):
            first = next((i for i, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]), len(expected))
            self.wrong.append(f"{len(tokens)} tokens where {len(expected)} were expected, other ones from {first} on")


def make_cases(chooser: random.Random, vocab_size: int) -> list[Case]:
    """Greedy and seeded requests, which draw the same tokens whenever they are sent."""
    cases = []
    for index in range(_NUM_REQUESTS):
        params = SamplingParams(
            temperature=0.0 if index % 2 else 0.9,
            seed=index,
            max_tokens=chooser.randint(20, 200),
            ignore_eos=True,
            detokenize=index % 4 == 0,
        )
        cases.append(Case(random_ids(chooser, chooser.randint(4, 100), vocab_size), params))
    return cases


class Streams:
    """Keeps streams running, over a few clients."""

    def __init__(
        self, address: str | None, cases: list[Case], expected: list[list[int]], chooser: random.Random
    ) -> None:
        self.tally = Tally()
        self.is_over = False
        self._address = address
        self._cases = cases
        self._expected = expected
        self._chooser = chooser

    async def run(self, count: int) -> None:
        await asyncio.gather(*(self._use_clients(count // _CLIENTS) for _ in range(_CLIENTS)))

    async def _use_clients(self, count: int) -> None:
        """One client after the other, each with `count` streams at a time, until one of them vanishes."""
        while not self.is_over:
            client = AsyncClient(self._address)
            await client.connect()
            life = self._chooser.uniform(0.5, 2) * _VANISH_S
            streams = [asyncio.create_task(self._send_on(client)) for _ in range(count)]
            _, running = await asyncio.wait(streams, timeout=life)
            if running and not self.is_over:
                for stream in running:
                    stream.cancel()
                self.tally.left += len(running)
            await asyncio.gather(*streams, return_exceptions=not self.is_over)
            await client.close()

    async def _send_on(self, client: AsyncClient) -> None:
        while not self.is_over:
            index = self._chooser.randrange(len(self._cases))
            leave_after = self._chooser.randint(1, 20) if self._chooser.random() < _LEAVE else None
            case, expected, tokens = self._cases[index], self._expected[index], list[int]()
            last = time.monotonic()
            stream = client.stream(case.prompt, case.params)
            try:
                async for chunk in stream:
                    tokens += chunk.token_ids
                    now = time.monotonic()
                    self.tally.longest_pause_s = max(self.tally.longest_pause_s, now - last)
                    last = now
                    if leave_after is not None and len(tokens) >= leave_after:
                        break
            except EngineError as error:
                self.tally.wrong.append(f"failed after {len(tokens)} tokens: {error}")
            else:
                is_whole = leave_after is None
                self.tally.check(tokens, expected, is_whole)
                self.tally.completed += is_whole
                self.tally.left += not is_whole
            finally:
                with contextlib.suppress(EngineError):
                    await stream.aclose()  # type: ignore[attr-defined]


async def take_expected(address: str | None, cases: list[Case]) -> list[list[int]]:
    async with AsyncClient(address) as client:
        outputs = await asyncio.gather(*(client.run_request(case.prompt, case.params) for case in cases))
    return [list(output.outputs[0].token_ids) for output in outputs]


async def cause_trouble(processes: EngineProcesses, streams: Streams, seconds: float, chooser: random.Random) -> None:
    """Kills and stops the worker and the core, a few seconds apart."""
    tally, end = streams.tally, time.monotonic() + seconds
    with tqdm(total=round(seconds), unit="s", disable=not sys.stderr.isatty()) as bar:
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, chooser.uniform(1.0, 4.0)))
            bar.update(round(seconds - left) - bar.n)
            # One in five times both at once.
            for name in chooser.choice((["worker"], ["worker"], ["core"], ["core"], ["worker", "core"])):
                pid, number = processes.pid_of(_MODULES[name]), chooser.choice(_SIGNALS)
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                        fault = f"{name}, {number.name}"
                        tally.faults[fault] = tally.faults.get(fault, 0) + 1
            start, before = time.monotonic(), tally.num_tokens
            while tally.num_tokens == before and time.monotonic() - start < _IDLE_PATIENCE_S:
                await asyncio.sleep(0.02)
            tally.recovery_s.append(time.monotonic() - start)


async def lost_blocks(address: str | None) -> str | None:
    """What did not come back, once nothing runs."""
    deadline = time.monotonic() + _IDLE_PATIENCE_S
    async with AsyncClient(address) as client:
        while True:
            stats = await client.stats()
            if not stats.num_running and not stats.num_waiting and stats.num_free_blocks == stats.num_blocks:
                return None
            if time.monotonic() > deadline:
                return f"only {stats.num_free_blocks} of {stats.num_blocks} blocks came back"
            await asyncio.sleep(0.05)


async def run(arguments: argparse.Namespace) -> int:
    chooser = random.Random(arguments.seed)
    async with AsyncClient(arguments.ipc) as client:
        address, cases = client.address, make_cases(chooser, client.engine.vocab_size)
    expected = await take_expected(address, cases)
    streams = Streams(address, cases, expected, chooser)
    running = asyncio.create_task(streams.run(arguments.streams))
    await cause_trouble(EngineProcesses(address), streams, arguments.seconds, chooser)
    streams.is_over = True
    await running
    tally = streams.tally
    lost = await lost_blocks(address)
    print("| what | figure |\n|---|---|")
    print(f"| streams that ended | {tally.completed:,} |")
    print(f"| streams that were left or whose client vanished | {tally.left:,} |")
    print(f"| tokens compared | {tally.num_tokens:,} |")
    for fault, count in sorted(tally.faults.items()):
        print(f"| {fault} | {count} |")
    if tally.recovery_s:
        print(f"| until streams went on, s, median | {statistics.median(tally.recovery_s):.2f} |")
        print(f"| until streams went on, s, most | {max(tally.recovery_s):.2f} |")
    print(f"| longest pause of a stream, s | {tally.longest_pause_s:.2f} |")
    print(f"| streams with a token lost, repeated or changed, or that failed | {len(tally.wrong)} |")
    problems = [*tally.wrong[:3], *([lost] if lost else [])]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=200, help="streams under way at once")
    parser.add_argument("--seed", type=int, default=0)
    return run_command(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
