"""An engine's processes as the operating system sees them. Knows nothing of requests."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from frontend import EngineError
from protocol.address import engine_pid

try:
    import psutil
except ImportError:
    sys.exit("error: this looks at processes with psutil, which comes with `pip install -e '.[test]'`")

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """Resident memory in MiB, open file descriptors, threads; and processor time so far, in seconds."""

    memory: float
    files: int
    threads: int
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.memory:.1f}, {self.files}, {self.threads}"


class EngineProcesses:
    """The launcher of the engine at an ipc:// address, and the processes that it has started."""

    def __init__(self, address: str) -> None:
        """Raises EngineError if they cannot be found: the engine must be this machine's and this user's."""
        pid = engine_pid(address)
        if pid is None or not psutil.pid_exists(pid):
            raise EngineError(f"the processes of the engine at {address} cannot be seen from here")
        self._launcher = psutil.Process(pid)

    def look(self) -> dict[str, ProcessUse]:
        """By the module or file that a process runs, such as `frontend.server`."""
        uses = {}
        for process in [self._launcher, *self._launcher.children(recursive=True)]:
            # A child may end while it is being looked at.
            with contextlib.suppress(psutil.NoSuchProcess):
                uses[_name_of(process)] = _use_of(process)
        return uses

    def pid_of(self, module: str) -> int | None:
        """The process that runs the module, or a module of the package; None while there is none."""
        for process in self._launcher.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"{_name_of(process)}.".startswith(f"{module}."):
                    return process.pid
        return None


def own_use() -> ProcessUse:
    return _use_of(psutil.Process())


def _use_of(process: psutil.Process) -> ProcessUse:
    with process.oneshot():
        times = process.cpu_times()
        memory = process.memory_info().rss / _MIB
        return ProcessUse(memory, process.num_fds(), process.num_threads(), times.user + times.system)


def _name_of(process: psutil.Process) -> str:
    command = process.cmdline()
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    scripts = [Path(part).name for part in command if part.endswith(".py")]
    return scripts[0] if scripts else process.name()
