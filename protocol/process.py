"""What every child process of the launcher does the same way: report, stop when told, never outlive its parent.

The launcher passes the configuration file as the only argument and the read end of a pipe as standard input. That pipe
is the lifeline: it is never written, so reading it ends exactly when the launcher is gone, however it went. Reports go
to the launcher's socket; what it has to say comes on a socket of the process's own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import zmq

from protocol.config import EngineConfig
from protocol.errors import EngineError
from protocol.launcher_messages import (
    CrashSearchState,
    FromLauncher,
    Pong,
    ProcessFailed,
    ProcessReady,
    ProcessStuck,
    Progress,
)
from protocol.logs import configure_logging
from protocol.transport import Channel, open_socket

logger = logging.getLogger(__name__)

# For the launcher itself: a program that starts an engine of its own sets this to the read end of such a pipe.
LIFELINE_VARIABLE = "MINI_VLLM_LIFELINE_FD"


class ChildProcess:
    """The launcher's side of a child, as the child sees it: its configuration and the ways to report.

    Attributes:
        control: the socket on which the launcher speaks, for the child to receive from.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self.config = config
        self.context = zmq.Context()
        self._launcher = Channel(open_socket(self.context, zmq.PUSH, connect=config.launcher_address), None)
        self.control = Channel(open_socket(self.context, zmq.PULL, bind=config.control_address(name)), FromLauncher)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Reports start-up progress. Call from the main thread."""
        self._launcher.send(Progress(self.name, phase, done, total))

    def ready(self, **details: str | int | float) -> None:
        self._launcher.send(ProcessReady(self.name, self.config.epoch, details))

    def failed(self, message: str) -> None:
        self._launcher.send(ProcessFailed(self.name, self.config.epoch, message))

    def found_stuck(self, process: str, epoch: int, message: str) -> None:
        self._launcher.send(ProcessStuck(process, epoch, message))

    def searches_crash(self, is_running: bool, is_hopeless: bool = False) -> None:
        self._launcher.send(CrashSearchState(self.config.epoch, is_running, is_hopeless))

    def pong(self) -> None:
        self._launcher.send(Pong(self.name, self.config.epoch))

    def close(self) -> None:
        self.control.close()
        self._launcher.close()
        self.context.term()


def run_child(name: str, main: Callable[[ChildProcess], None]) -> None:
    """Runs a child process's main function, and ends the process with an exit code that the launcher understands.

    SIGTERM asks the child to stop; each `main` installs what that means for it. SIGINT is left to the launcher. An
    error is reported to the launcher in one line, and with its traceback on standard error if it is no user's error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = ChildProcess(name, EngineConfig.load(Path(sys.argv[1])))
    configure_logging(name, child.config.options.log_level, child.config.options.log_format)
    _watch_lifeline()
    code = 0
    try:
        main(child)
    except EngineError as error:
        child.failed(str(error))
        code = 1
    except Exception as error:
        logger.exception("the %s process ends with an error", name)
        # Of what CUDA says, the first line is the error, and the others advise.
        child.failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        code = 1
    child.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: libraries' threads and atexit handlers must not keep a finished process alive.
    os._exit(code)


def _watch_lifeline() -> None:
    def wait() -> None:
        while os.read(0, 1):
            pass
        # The launcher is gone without having stopped its children, and with it the lock of the address: what ended in
        # order from here on might remove the socket of the next engine.
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
