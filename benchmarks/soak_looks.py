"""What an engine holds when it is looked at, and what has grown between looks. Knows nothing of requests."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.processes import EngineProcesses, ProcessUse, own_use
from frontend import AsyncClient
from protocol.messages import Stats

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
    found = list(_came_or_went(before, after))
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
    return [*found, *_lost_blocks(after)]


def drift(before: Snapshot, after: Snapshot, percent: float) -> list[str]:
    """What is not as it was, between two looks at an idle engine, as sentences.

    Memory, that of the GPUs too, may have grown by so many percent; open files must be as many.
    """
    found = list(_came_or_went(before, after))
    for name in before.processes.keys() & after.processes.keys():
        then, now = before.processes[name], after.processes[name]
        if now.memory > then.memory * (1 + percent / 100):
            more = (now.memory / then.memory - 1) * 100
            found.append(f"{name} grew by {more:.1f} %, from {then.memory:.1f} to {now.memory:.1f} MiB")
        if now.files != then.files:
            found.append(f"{name} has {now.files} open files and had {then.files}")
        if now.threads - then.threads > _MORE_THREADS:
            found.append(f"{name} has {now.threads - then.threads} more threads")
    if before.gpu_memory and after.gpu_memory and after.gpu_memory > before.gpu_memory * (1 + percent / 100):
        found.append(f"GPU memory grew from {before.gpu_memory} to {after.gpu_memory} MiB")
    return [*found, *_lost_blocks(after)]


def _came_or_went(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name in sorted(before.processes.keys() ^ after.processes.keys()):
        yield f"{name} {'ended' if name in before.processes else 'is a new process'}"


def _lost_blocks(after: Snapshot) -> Iterator[str]:
    if after.num_free_blocks != after.num_blocks:
        yield f"only {after.num_free_blocks:,} of {after.num_blocks:,} blocks came back"


class WatchedEngine:
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
