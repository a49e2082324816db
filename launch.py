"""Starts the engine and keeps it: `python launch.py` serves the bundled model, `--model` another one.

Takes the address, makes the configuration, and hands both to the supervisor, which runs the three processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.console import Console
from launcher.supervisor import Supervisor
from protocol.address import AddressLock, default_address, private_directory, require_short, socket_path
from protocol.config import EngineOptions, parse_arguments
from protocol.errors import ConfigError
from protocol.process import LIFELINE_VARIABLE
from protocol.resolve import resolve


def launch(options: EngineOptions, console: Console) -> int:
    """Runs an engine until it is told to stop. Returns the exit code: 0 if it was told to, 1 if it failed.

    Raises:
        ConfigError: the options do not make an engine that can start here.
    """
    address = options.ipc or default_address()
    directory = socket_path(address).parent
    # Until there is a launcher, which a download may take a while to come to, a signal ends the program in order.
    _on_stop_signals(lambda: sys.exit(128 + signal.SIGTERM))
    is_new = not directory.exists()
    private_directory(directory)
    lock = AddressLock(address)
    run_directory = Path(tempfile.mkdtemp(prefix="run-", dir=directory))
    try:
        require_short(run_directory)
        supervisor = Supervisor(resolve(options, run_directory), console)
        _on_stop_signals(supervisor.stop)
        _watch_lifeline(supervisor)
        return supervisor.run()
    finally:
        shutil.rmtree(run_directory, ignore_errors=True)
        socket_path(address).unlink(missing_ok=True)
        lock.release()
        if is_new:
            # Unless another engine has made itself at home meanwhile.
            with contextlib.suppress(OSError):
                directory.rmdir()


def _on_stop_signals(action: Callable[[], object]) -> None:
    """Sets what the signals that end a program do; one that is ignored from the start, as by nohup, stays so."""
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signal_number) is not signal.SIG_IGN:
            signal.signal(signal_number, lambda *_: action())


def _watch_lifeline(supervisor: Supervisor) -> None:
    descriptor = os.environ.get(LIFELINE_VARIABLE)
    if descriptor is None:
        return

    def wait() -> None:
        while os.read(int(descriptor), 1):
            pass
        supervisor.stop()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse_arguments(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(options)
    try:
        return launch(options, console)
    except ConfigError as error:
        console.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
