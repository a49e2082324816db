"""Many short requests, and what they leave behind in each process of the engine: memory, open files, threads, blocks.

    python -m benchmarks.soak --num-requests 20000

Requests are of every kind: greedy and sampled, streamed and not, with and without text, some of them left in the
middle. The engine must be this machine's and this user's. After a warm-up it is looked at again and again, and what is
there at the end, when it is idle, is compared with the most that was seen in the first half. Exits with code 1 if
something grew by more than is allowed, a block did not come back, or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.processes import EngineProcesses, ProcessUse, own_use
from benchmarks.workloads import LengthRange, random_ids
from frontend import AsyncClient, EngineError, SamplingParams
from protocol.messages import Stats

_INPUT_LEN, _OUTPUT_LEN = LengthRange(4, 32), LengthRange(1, 16)
# What a client does with a request, and how often.
_KINDS = {"run": 5, "stream": 3, "leave": 1, "cancel": 1}
_IDLE_PATIENCE_S = 10.0
# A file or a thread more may be one that is in use at the moment of looking.
_MORE_FILES, _MORE_THREADS = 2, 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine holds. `gpu_memory` is that of all GPUs in MiB, or None without one."""

    num_requests: int
    processes: dict[str, ProcessUse]
    gpu_memory: int | None
    num_free_blocks: int
    num_blocks: int
    num_running: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many MiB a process, and the GPUs, may grow by."""

    memory: float
    gpu_memory: float


def growth(looks: list[Snapshot], allowed: Allowance) -> list[str]:
    """What grew in the second half or did not come back, as sentences.

    What a process holds is compared with the most that it held at a look of the first half. A worker's memory jumps by
    a dozen MiB as its allocator keeps buffers of one step or another, and stays there; a leak goes on growing.
    """
    before, after = looks[0], looks[-1]
    middle = (before.num_requests + after.num_requests) / 2
    first_half = [look for look in looks if look.num_requests <= middle]
    found = []
    for name in sorted(before.processes.keys() ^ after.processes.keys()):
        found.append(f"{name} {'ended' if name in before.processes else 'is a new process'}")
    for name in before.processes.keys() & after.processes.keys():
        now, then = after.processes[name], [look.processes[name] for look in first_half if name in look.processes]
        more = now.memory - max(use.memory for use in then)
        if more > allowed.memory:
            found.append(f"{name} grew by {more:.1f} MiB, of which {allowed.memory:g} are allowed")
        more = now.files - max(use.files for use in then)
        if more > _MORE_FILES:
            found.append(f"{name} has {more} more open files")
        more = now.threads - max(use.threads for use in then)
        if more > _MORE_THREADS:
            found.append(f"{name} has {more} more threads")
    on_gpu = [look.gpu_memory for look in first_half if look.gpu_memory is not None]
    if on_gpu and after.gpu_memory is not None and after.gpu_memory - max(on_gpu) > allowed.gpu_memory:
        more = after.gpu_memory - max(on_gpu)
        found.append(f"GPU memory grew by {more} MiB, of which {allowed.gpu_memory:g} are allowed")
    if after.num_free_blocks != after.num_blocks:
        found.append(f"only {after.num_free_blocks:,} of {after.num_blocks:,} blocks came back")
    return found


class Engine:
    """A running engine, and this client of it, as the operating system sees their processes."""

    def __init__(self, client: AsyncClient) -> None:
        """Raises EngineError if the engine's processes cannot be found."""
        self._client = client
        self._processes = EngineProcesses(client.address)

    async def look(self, num_requests: int) -> Snapshot:
        return self._snapshot(num_requests, await self._client.stats())

    async def look_when_idle(self, num_requests: int) -> Snapshot:
        """Waits until nothing runs, for a while: blocks that are missing then are lost."""
        deadline = time.monotonic() + _IDLE_PATIENCE_S
        while True:
            stats = await self._client.stats()
            is_idle = not stats.num_running and not stats.num_waiting and stats.num_free_blocks == stats.num_blocks
            if is_idle or time.monotonic() > deadline:
                return self._snapshot(num_requests, stats)
            await asyncio.sleep(0.05)

    def _snapshot(self, num_requests: int, stats: Stats) -> Snapshot:
        return Snapshot(
            num_requests=num_requests,
            processes={"client": own_use(), **self._processes.look()},
            gpu_memory=_gpu_memory(),
            num_free_blocks=stats.num_free_blocks,
            num_blocks=stats.num_blocks,
            num_running=stats.num_running,
        )


def _gpu_memory() -> int | None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return sum(int(line) for line in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Soak:
    """The requests of one soak, sent by as many tasks as may be under way at once."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self.num_done = 0
        self.failures: list[str] = []
        self._client = client
        self._chooser = random.Random(seed)

    async def send(self, count: int, concurrency: int, bar: tqdm) -> None:
        left = iter(range(count))

        async def send_some() -> None:
            for _ in left:
                try:
                    await self._one()
                except EngineError as error:
                    self.failures.append(str(error))
                self.num_done += 1
                bar.update()

        await asyncio.gather(*(send_some() for _ in range(min(concurrency, count))))

    async def _one(self) -> None:
        choose = self._chooser
        engine = self._client.engine
        (kind,) = choose.choices(list(_KINDS), weights=list(_KINDS.values()))
        prompt = random_ids(choose, _INPUT_LEN.draw(choose), engine.vocab_size)
        max_tokens = _OUTPUT_LEN.draw(choose)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=choose.choice((0.0, 0.7, 1.0)),
            top_p=choose.choice((1.0, 0.9)),
            top_k=choose.choice((-1, 20)),
            seed=choose.choice((None, choose.getrandbits(31))),
            ignore_eos=choose.random() < 0.5,
            detokenize=engine.has_tokenizer and choose.random() < 0.5,
        )
        if kind == "run":
            await self._client.run_request(prompt, params, stream=choose.random() < 0.5)
        elif kind == "cancel":
            request = asyncio.create_task(self._client.run_request(prompt, params))
            await asyncio.wait([request], timeout=choose.uniform(0, 0.05))
            request.cancel()
            await asyncio.wait([request])
            if not request.cancelled() and (error := request.exception()) is not None:
                raise error
        else:
            # One that is left is aborted, unless it ended first.
            leave_after = choose.randrange(max_tokens) if kind == "leave" else max_tokens
            received = 0
            stream = self._client.stream(prompt, params)
            async for chunk in stream:
                received += len(chunk.token_ids)
                if received > leave_after:
                    break
            await stream.aclose()  # type: ignore[attr-defined]


def _row(snapshot: Snapshot, names: list[str]) -> str:
    gpu = "-" if snapshot.gpu_memory is None else f"{snapshot.gpu_memory:,}"
    uses = [str(snapshot.processes.get(name, "gone")) for name in names]
    blocks = f"{snapshot.num_free_blocks:,} of {snapshot.num_blocks:,}"
    return f"| {snapshot.num_requests:,} | {snapshot.num_running} | {blocks} | {gpu} | {' | '.join(uses)} |"


async def run(arguments: argparse.Namespace) -> int:
    async with AsyncClient(arguments.ipc) as client:
        engine = Engine(client)
        soak = Soak(client, arguments.seed)
        with tqdm(total=arguments.warmup + arguments.num_requests, unit="req", disable=not sys.stderr.isatty()) as bar:
            await soak.send(arguments.warmup, arguments.concurrency, bar)
            looks = [await engine.look_when_idle(soak.num_done)]
            names = list(looks[0].processes)
            print("Memory in MiB, open files and threads of each process; free KV blocks; GPU memory in MiB.\n")
            print(f"| requests | running | free blocks | GPU | {' | '.join(names)} |")
            print(f"|{'---|' * (4 + len(names))}\n{_row(looks[0], names)}", flush=True)
            sending = asyncio.create_task(soak.send(arguments.num_requests, arguments.concurrency, bar))
            for part in range(1, arguments.looks + 1):
                due = arguments.warmup + arguments.num_requests * part // (arguments.looks + 1)
                while soak.num_done < due and not sending.done():
                    await asyncio.sleep(0.02)
                looks.append(await engine.look(soak.num_done))
                tqdm.write(_row(looks[-1], names))
            await sending
        looks.append(await engine.look_when_idle(soak.num_done))
        print(_row(looks[-1], names), flush=True)
    wrong = growth(looks, Allowance(arguments.allow_mib, arguments.allow_gpu_mib))
    if soak.failures:
        wrong.append(f"{len(soak.failures)} requests failed, the first with: {soak.failures[0]}")
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ipc", help="the engine's ipc:// address (default: this user's engine)")
    parser.add_argument("--num-requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=256, help="requests under way at once")
    parser.add_argument("--warmup", type=int, default=1000, help="requests before the first look that counts")
    parser.add_argument("--looks", type=int, default=4, help="looks between the first and the last")
    parser.add_argument("--allow-mib", type=float, default=8.0, help="resident memory that a process may grow by")
    parser.add_argument("--allow-gpu-mib", type=float, default=64.0, help="GPU memory that may be used more")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        return asyncio.run(run(arguments))
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
