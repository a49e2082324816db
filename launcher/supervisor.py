"""Keeps an engine's three processes running: starts them, replaces a worker or core that dies, stops them in order.

What a death means to the others they decide themselves: each is told of it (`ProcessLost`), with the number of the new
epoch, whose sockets the replacement uses. Knows nothing of what the processes say to each other.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from launcher.child import MODULES, Child
from launcher.console import Console
from protocol.config import EngineConfig
from protocol.launcher_messages import (
    CrashSearchState,
    EngineFailed,
    Ping,
    Pong,
    ProcessFailed,
    ProcessLost,
    ProcessReady,
    ProcessStuck,
    Progress,
    ToLauncher,
)
from protocol.messages import Malformed
from protocol.transport import Channel, open_socket

# How often the launcher looks whether it is to stop.
_POLL_MS = 100
# How long the last report of a process that has ended may be on its way.
_LAST_REPORT_MS = 20
# What a process may take to stop, beyond the time that running requests get.
_STOP_SECONDS = 10.0
# The core answers within a step's time, whatever the worker does.
_MOST_CORE_SILENCE_S = 60.0
# What a process may take to start again: as long as this, or as long as so many times the first start took.
_START_PATIENCE_S, _START_PATIENCE_TIMES = 20.0, 4


class Supervisor:
    """The three processes of one engine, from start to end."""

    def __init__(self, config: EngineConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._stop_requested = threading.Event()
        self._context = zmq.Context()
        self._reports = Channel(open_socket(self._context, zmq.PULL, bind=config.launcher_address), ToLauncher)
        self._poller = zmq.Poller()
        self._poller.register(self._reports.socket, zmq.POLLIN)
        self._children: dict[str, Child] = {}
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._details: dict[str, ProcessReady] = {}
        self._is_serving = False
        self._epoch = 0
        self._deaths: dict[str, deque[float]] = {name: deque() for name in MODULES}
        self._searches_crash = False
        self._lost_at: float | None = None
        # Core and worker have met in this epoch; since when both have been there without having met in the latest.
        self._met_epoch = 0
        self._apart_since = 0.0
        self._is_draining = False
        self._core_silence = min(config.step_timeout, _MOST_CORE_SILENCE_S)
        self._start_patience = _START_PATIENCE_S
        self._last_turn = self._last_ping = self._started = time.monotonic()

    def stop(self) -> None:
        """Asks `run` to stop the engine. Safe to call from a signal handler or another thread."""
        self._stop_requested.set()

    def run(self) -> int:
        """Starts the processes and waits: until asked to stop (returns 0) or until it gives up (returns 1)."""
        error = None
        try:
            # The worker has the most to import and to load.
            for name in reversed(MODULES):
                self._start(name)
            error = self._supervise(self._stop_requested.is_set)
            if error is None and self._is_serving:
                error = self._drain()
        finally:
            self._console.close()
            if error is not None and "frontend" in self._children:
                self._children["frontend"].send(EngineFailed(error))
            # Running requests end first, and the GPU is freed last.
            self._stop_all(("frontend", "core", "worker"))
            self._reports.close()
            self._context.term()
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)
        if error is not None:
            self._console.error(error)
        return 0 if error is None else 1

    def _start(self, name: str) -> None:
        config = msgspec.structs.replace(self._config, epoch=self._epoch)
        if name != "frontend":
            # The others have no use for the keys.
            config = msgspec.structs.replace(config, options=msgspec.structs.replace(config.options, api_key=()))
        child = Child(name, config, self._context, self._lifeline_read)
        self._poller.register(child.exited, zmq.POLLIN)
        self._children[name] = child
        # Waits for the process to listen, so that the answer says that it does.
        if name == "core":
            child.send(Ping())

    def _supervise(self, is_over: Callable[[], bool]) -> str | None:
        """Looks after the processes until it is over; returns the reason if the engine cannot go on."""
        while not is_over():
            self._poller.poll(_POLL_MS)
            error = self._take_reports()
            for child in list(self._children.values()):
                if self._is_draining and child.name == "frontend":
                    continue
                if error is None and child.has_exited:
                    error = self._take_reports(_LAST_REPORT_MS) or self._bury(child)
            if error is not None:
                return error
            self._look_for_stuck()
        return None

    def _drain(self) -> str | None:
        """Lets the frontend end what runs, as `--shutdown-timeout` allows, and keeps the others running for it."""
        frontend = self._children["frontend"]
        self._is_draining = True
        end = time.monotonic() + self._config.options.shutdown_timeout + _STOP_SECONDS
        frontend.terminate()
        return self._supervise(lambda: frontend.has_exited or time.monotonic() > end)

    # --- reports ----------------------------------------------------------------------------------------------------

    def _take_reports(self, timeout_ms: int = 0) -> str | None:
        """Handles the reports that have arrived; returns the reason if one of them ends the engine."""
        while (received := self._reports.receive(timeout_ms)) is not None:
            error = self._handle(received[1])
            if error is not None:
                return error
            timeout_ms = 0
        return None

    def _handle(self, report: object) -> str | None:
        if isinstance(report, Progress):
            if not self._is_serving:
                self._console.progress(report)
        elif isinstance(report, ProcessStuck):
            # It may have been replaced meanwhile.
            if report.epoch == self._epoch:
                self._children[report.process].kill(report.message)
        elif isinstance(report, Malformed):
            return f"a process sent a malformed report: {report.reason}"
        elif isinstance(report, CrashSearchState):
            if report.epoch == self._children["core"].epoch:
                self._searches_crash = report.is_running
                if report.is_hopeless:
                    return "the worker process crashes whatever request it computes"
        elif isinstance(report, ProcessReady | ProcessFailed | Pong):
            child = self._children[report.process]
            if report.epoch == child.epoch:
                return self._handle_own(child, report)
        return None

    def _handle_own(self, child: Child, report: ProcessReady | ProcessFailed | Pong) -> str | None:
        """What a process says of itself."""
        if isinstance(report, ProcessReady):
            self._on_ready(child, report)
        elif isinstance(report, Pong):
            child.last_heard = time.monotonic()
            child.has_answered = True
        elif self._is_serving:
            child.kill(report.message)
        else:
            return report.message
        return None

    def _on_ready(self, child: Child, report: ProcessReady) -> None:
        child.is_ready = True
        self._details[report.process] = report
        if report.process == "core":
            self._met_epoch = int(report.details["epoch"])
        if not self._is_serving and len(self._details) == len(MODULES):
            self._is_serving = True
            self._announce()
            # A worker that replaces this one is to have the same cache, without measuring what fits.
            num_blocks = int(self._details["core"].details["num_blocks"])
            options = msgspec.structs.replace(self._config.options, num_gpu_blocks_override=num_blocks)
            self._config = msgspec.structs.replace(self._config, options=options)
        elif self._met_epoch == self._epoch and self._lost_at is not None:
            seconds = time.monotonic() - self._lost_at
            self._lost_at = None
            self._console.warn(f"recovered after {seconds:.1f} s")

    def _announce(self) -> None:
        frontend, worker = self._details["frontend"].details, self._details["worker"].details
        tokens = worker["kv_cache_tokens"]
        seconds = time.monotonic() - self._started
        self._start_patience = max(_START_PATIENCE_S, _START_PATIENCE_TIMES * seconds)
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

    # --- deaths -----------------------------------------------------------------------------------------------------

    def _bury(self, child: Child) -> str | None:
        """Replaces a process that has ended; returns the reason if the engine cannot go on."""
        self._poller.unregister(child.exited)
        # One that ends while the engine starts would only do it again; without the frontend nobody is there to serve.
        if child.name == "frontend" or not self._is_serving:
            return child.reason
        num_deaths = self._count_death(child)
        if num_deaths >= self._config.options.give_up_after:
            return (
                f"the {child.name} process has died {num_deaths} times within "
                f"{self._config.options.give_up_window:g} s, the last time because: {child.reason}"
            )
        self._console.warn(f"{child.reason}; starting it again, requests go on")
        self._epoch += 1
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        lost = ProcessLost(child.name, self._epoch, child.reason, child.ended_from_outside)
        child.close()
        if child.name == "core":
            self._searches_crash = False
            # The sockets that it served on; the new epoch's are others.
            for path in Path(self._config.run_directory).iterdir():
                if path.name.startswith(("core-", "worker-")) and path.is_socket():
                    path.unlink()
        self._start(child.name)
        for other in self._children.values():
            if other.name != child.name:
                other.send(lost)
        return None

    def _count_death(self, child: Child) -> int:
        """How often a process of its name has died lately. A crash that the core is looking for does not count."""
        deaths, now = self._deaths[child.name], time.monotonic()
        is_search = self._searches_crash and child.name == "worker" and child.is_ready
        if child.ended_from_outside or not is_search:
            deaths.append(now)
        while deaths and now - deaths[0] > self._config.options.give_up_window:
            deaths.popleft()
        return len(deaths)

    def _look_for_stuck(self) -> None:
        """Kills a core that has not answered for too long, what does not come up again, and a worker that does not
        meet the core.

        Once they have met, what the worker owes is for the core to notice.
        """
        now, interval = time.monotonic(), self._core_silence / 4
        if not self._is_serving or now - self._last_turn > interval:
            # If this process itself was stopped for a while, the others may have been too.
            for child in self._children.values():
                child.last_heard = now
            self._apart_since = now
        self._last_turn = now
        core, worker = self._children["core"], self._children["worker"]
        if now - self._last_ping > interval:
            self._last_ping = now
            core.send(Ping())
        if core.has_answered and now - core.last_heard > self._core_silence:
            core.kill(f"the core process has not answered for {self._core_silence:g} s")
        for child, is_up in ((core, core.has_answered), (worker, worker.is_ready)):
            if not is_up and now - child.last_heard > self._start_patience:
                child.kill(f"the {child.name} process has not started within {self._start_patience:.0f} s")
        if self._met_epoch == self._epoch or not (core.has_answered and worker.is_ready):
            self._apart_since = now
        elif now - self._apart_since > self._config.step_timeout:
            worker.kill(f"the worker process has not met the core within {self._config.step_timeout:g} s")

    # --- the end ----------------------------------------------------------------------------------------------------

    def _stop_all(self, order: Sequence[str]) -> None:
        """Stops the processes in order, each by SIGTERM, and by SIGKILL if it does not heed that in time."""
        for name in order:
            child = self._children.get(name)
            if child is None:
                continue
            # The core tells the worker to stop, so that the GPU is freed after the last step.
            if name != "worker" or not self._core_said_goodbye():
                child.terminate()
            if not child.wait(_STOP_SECONDS):
                self._console.warn(f"the {name} process does not stop; killing it")
                child.kill("it does not stop")
                child.wait()
            child.close()

    def _core_said_goodbye(self) -> bool:
        core = self._children.get("core")
        # One that was being replaced may not have met the worker yet.
        return core is not None and core.is_ready and core.exit_code == 0 and self._children["worker"].is_ready


def _example_request(url: str, config: EngineConfig) -> list[str]:
    """A command to paste, as lines of a shell."""
    path, body = "chat/completions", '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    if config.options.skip_tokenizer_init:
        path, body = "completions", '{"prompt": [1, 2, 3], "return_token_ids": true}'
    return [f"  curl {url}/v1/{path} -H 'Content-Type: application/json' \\", f"    -d '{body}'"]
