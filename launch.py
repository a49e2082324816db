"""Starts the engine and keeps it: `python launch.py` serves the bundled model, `--model` another one.

Starts the three processes, shows their progress, prints how to reach them, supervises them, and stops them in order:
frontend (running requests end), core, worker (the GPU is freed). Knows nothing of what they say to each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from tqdm import tqdm

from protocol.address import AddressLock, default_address, private_directory, socket_path
from protocol.config import API_KEY_VARIABLE, EngineConfig, EngineOptions, parse_arguments
from protocol.errors import ConfigError
from protocol.logs import configure_logging
from protocol.messages import Malformed, ProcessFailed, ProcessReady, Progress, ToLauncher
from protocol.process import LIFELINE_VARIABLE
from protocol.resolve import resolve
from protocol.transport import Channel, open_socket

PROCESSES = {"frontend": "frontend.server", "core": "core.engine", "worker": "worker.main"}
_POLL_MS = 100
# What a process may take to stop, beyond the time that running requests get.
_STOP_SECONDS = 10.0


logger = logging.getLogger("launch")


class Console:
    """What the launcher itself says: to people, with progress bars on a terminal, or to the log if that is JSON."""

    def __init__(self, options: EngineOptions) -> None:
        configure_logging("launcher", options.log_level, options.log_format)
        self._as_records = options.log_format == "json"
        self._bars: dict[str, tqdm] = {}

    def error(self, message: str) -> None:
        if self._as_records:
            logger.error("%s", message)
        else:
            print(f"error: {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        if self._as_records:
            logger.warning("%s", message)
        else:
            print(message, file=sys.stderr, flush=True)

    def announce(self, lines: Sequence[str], fields: dict[str, str | int | float]) -> None:
        """Says that the engine is ready, in lines or as fields."""
        if self._as_records:
            logger.info("ready", extra={"fields": fields})
        else:
            print("\n".join(lines), flush=True)

    def progress(self, progress: Progress) -> None:
        phase = progress.phase
        if self._as_records:
            if progress.done == progress.total:
                logger.info("loading %s: %d done", phase, progress.total)
            return
        if phase not in self._bars:
            self._bars[phase] = tqdm(
                total=progress.total, desc=f"loading {phase}", file=sys.stderr, disable=not sys.stderr.isatty()
            )
        bar = self._bars[phase]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            bar.close()
            if bar.disable:
                print(f"loading {phase}: {progress.total} done", file=sys.stderr, flush=True)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


class Launcher:
    """The three processes of one engine, from start to end."""

    def __init__(self, config: EngineConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._stop_requested = threading.Event()
        self._context = zmq.Context()
        self._reports = Channel(open_socket(self._context, zmq.PULL, bind=config.launcher_address), ToLauncher)
        self._processes: dict[str, subprocess.Popen] = {}
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._ready: dict[str, ProcessReady] = {}
        self._started = time.monotonic()

    def stop(self) -> None:
        """Asks `run` to stop the engine. Safe to call from a signal handler or another thread."""
        self._stop_requested.set()

    def run(self) -> int:
        """Starts the processes and waits: until asked to stop (returns 0) or until one of them is gone (returns 1)."""
        error = None
        try:
            self._start()
            error = self._supervise()
        finally:
            self._console.close()
            # Without a core or a worker no request can finish: with the core gone first, the frontend says so at once.
            self._stop_all(("frontend", "core", "worker") if error is None else ("core", "frontend", "worker"))
            self._reports.close()
            self._context.term()
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)
        if error is not None:
            self._console.error(error)
        return 0 if error is None else 1

    def _start(self) -> None:
        config_file = Path(self._config.run_directory) / "config.json"
        self._config.save(config_file)
        # OpenMP threads that wait for the next operation spin for a fraction of a millisecond, then sleep. Sleeping at
        # once costs a third of the worker's speed on a CPU; spinning for longer, nearly all of it when something else
        # needs the CPUs too.
        environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
        # The frontend has the keys from the configuration, the others have no use for them.
        for name in (LIFELINE_VARIABLE, API_KEY_VARIABLE):
            environment.pop(name, None)
        root = str(Path(__file__).resolve().parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # The worker has the most to import and to load.
        for name in reversed(PROCESSES):
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", PROCESSES[name], str(config_file)],
                stdin=self._lifeline_read,
                env=environment,
                # In a session of its own, so that Ctrl-C reaches the launcher alone, which stops the rest in order.
                start_new_session=True,
            )

    def _supervise(self) -> str | None:
        """Handles reports until the engine is to stop; returns the reason if that is an error."""
        while not self._stop_requested.is_set():
            received = self._reports.receive(_POLL_MS)
            if received is not None:
                error = self._handle(received[1])
                if error is not None:
                    return error
                continue
            for name, process in self._processes.items():
                if process.poll() is not None:
                    # Its last report may still be on its way.
                    received = self._reports.receive(_POLL_MS)
                    error = self._handle(received[1]) if received is not None else None
                    return error or f"the {name} process ended unexpectedly ({_describe_exit(process.returncode)})"
        return None

    def _handle(self, report: object) -> str | None:
        if isinstance(report, Progress):
            self._console.progress(report)
        elif isinstance(report, ProcessFailed):
            return report.message
        elif isinstance(report, ProcessReady):
            self._ready[report.process] = report
            if len(self._ready) == len(PROCESSES):
                self._announce()
        elif isinstance(report, Malformed):
            return f"a process sent a malformed report: {report.reason}"
        return None

    def _announce(self) -> None:
        frontend, worker = self._ready["frontend"].details, self._ready["worker"].details
        tokens = worker["kv_cache_tokens"]
        seconds = time.monotonic() - self._started
        lines = [
            f"{self._config.model_name} on {worker['device']} ({self._config.dtype}, "
            f"{self._config.attention_backend} attention, KV cache of {tokens:,} tokens), "
            f"ready in {seconds:.1f} s",
        ]
        if "http" in frontend:
            lines += [f"HTTP    {frontend['http']}/v1", f"IPC     {self._config.address}", "", "Try it:"]
            lines += _example_request(str(frontend["http"]), self._config)
        else:
            lines.append(f"IPC     {self._config.address}")
        fields = {
            "model": self._config.model_name,
            "device": worker["device"],
            "dtype": self._config.dtype,
            "attention_backend": self._config.attention_backend,
            "kv_cache_tokens": tokens,
            "seconds": round(seconds, 1),
            **frontend,
        }
        self._console.announce(lines, fields)

    def _stop_all(self, order: Sequence[str]) -> None:
        """Stops the processes in order, each by SIGTERM, and by SIGKILL if it does not heed that in time."""
        for name in order:
            process = self._processes.get(name)
            if process is None:
                continue
            # The core tells the worker to stop, so that the GPU is freed after the last step.
            if process.poll() is None and (name != "worker" or not self._core_said_goodbye()):
                process.send_signal(signal.SIGTERM)
            patience = _STOP_SECONDS + (self._config.options.shutdown_timeout if name == "frontend" else 0.0)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                self._console.warn(f"the {name} process does not stop; killing it")
                process.kill()
                process.wait()

    def _core_said_goodbye(self) -> bool:
        core = self._processes.get("core")
        return core is not None and core.returncode == 0 and "worker" in self._ready


def _example_request(url: str, config: EngineConfig) -> list[str]:
    """A command to paste, as lines of a shell."""
    path, body = "chat/completions", '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    if config.options.skip_tokenizer_init:
        path, body = "completions", '{"prompt": [1, 2, 3], "return_token_ids": true}'
    return [f"  curl {url}/v1/{path} -H 'Content-Type: application/json' \\", f"    -d '{body}'"]


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


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
        launcher = Launcher(resolve(options, run_directory), console)
        _on_stop_signals(launcher.stop)
        _watch_lifeline(launcher)
        return launcher.run()
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


def _watch_lifeline(launcher: Launcher) -> None:
    descriptor = os.environ.get(LIFELINE_VARIABLE)
    if descriptor is None:
        return

    def wait() -> None:
        while os.read(int(descriptor), 1):
            pass
        launcher.stop()

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
