"""One process of the engine, as the launcher sees it: started, spoken to, and seen to end. Knows nothing of policy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import zmq

from protocol.address import socket_path
from protocol.config import API_KEY_VARIABLE, EngineConfig
from protocol.launcher_messages import FromLauncher
from protocol.process import LIFELINE_VARIABLE
from protocol.transport import Channel, open_socket

MODULES = {"frontend": "frontend.server", "core": "core.engine", "worker": "worker.main"}
# Those by which somebody else ends or stops a process; the others are its own doing.
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Child:
    """A process that has been started, once.

    Attributes:
        name: which of the three it is.
        epoch: that of its configuration.
        exited: a descriptor that becomes readable when the process ends.
        is_ready: it has said so.
        failure: what it said went wrong, or why it had to be killed.
        last_heard: when it last answered a ping, or was started, of `time.monotonic()`.
        has_answered: it has answered a ping.
    """

    def __init__(self, name: str, config: EngineConfig, context: zmq.Context, lifeline: int) -> None:
        self.name = name
        self.epoch = config.epoch
        self.is_ready = False
        self.failure: str | None = None
        self.last_heard = time.monotonic()
        self.has_answered = False
        self._was_stopped = False
        self._config_file = Path(config.run_directory) / f"{name}-{config.epoch}.json"
        config.save(self._config_file)
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULES[name], str(self._config_file)],
            stdin=lifeline,
            env=_environment(),
            # In a session of its own, so that Ctrl-C reaches the launcher alone, which stops the rest in order.
            start_new_session=True,
        )
        self.exited = os.pidfd_open(self._process.pid)
        # It is this side that connects, so that what is sent before the process listens waits for it.
        address = config.control_address(name)
        self._control_socket = socket_path(address)
        self._control = Channel(open_socket(context, zmq.PUSH, connect=address), None)
        self._control.socket.setsockopt(zmq.LINGER, 0)

    def send(self, message: FromLauncher) -> None:
        self._control.send(message)

    @property
    def has_exited(self) -> bool:
        return self._process.poll() is not None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def ended_from_outside(self) -> bool:
        """Whether a signal that was not its own doing ended it, or stopped it until it had to be killed."""
        if self.failure is not None:
            return self._was_stopped
        return self._process.returncode in [-number for number in _SIGNALS_FROM_OUTSIDE]

    @property
    def reason(self) -> str:
        """Why it ended."""
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.failure or f"the {self.name} process ended unexpectedly ({how})"

    def terminate(self) -> None:
        if not self.has_exited:
            self._process.send_signal(signal.SIGTERM)

    def kill(self, why: str) -> None:
        """Ends a process that is of no more use."""
        if not self.has_exited:
            self.failure = self.failure or why
            self._was_stopped = _is_stopped(self._process.pid)
            self._process.kill()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended within the time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Forgets a process that has ended."""
        self._control.close()
        self._config_file.unlink(missing_ok=True)
        # One that was killed has left its socket.
        self._control_socket.unlink(missing_ok=True)
        os.close(self.exited)


def _environment() -> dict[str, str]:
    # OpenMP threads that wait for the next operation spin for a fraction of a millisecond, then sleep. Sleeping at once
    # costs a third of the worker's speed on a CPU; spinning for longer, nearly all of it when something else needs the
    # CPUs too.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    # The frontend has the keys from the configuration, the others have no use for them.
    for name in (LIFELINE_VARIABLE, API_KEY_VARIABLE):
        environment.pop(name, None)
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return environment


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process, as SIGSTOP does."""
    # The name, in parentheses, may hold anything; the state follows it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
