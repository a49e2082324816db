"""The engine-core process: one loop between the frontends and the worker.

    python -m core.engine CONFIG_FILE

It keeps the worker supplied with up to two steps, so that the GPU has the next step before the last one's tokens are
back, and blocks when there is nothing to do. When the launcher says that the worker is gone, everything waits again
until the next one is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from core.crash_search import CrashSearch
from core.frontends import Frontends
from core.grammar import Grammars
from core.masks import MaskMaker
from core.scheduler import Scheduler, SchedulerConfig
from core.step_time import RelativeCosts, StepClock, StepTimeModel
from core.worker_link import WorkerLink
from protocol.config import EngineConfig
from protocol.errors import EngineError
from protocol.launcher_messages import Ping, ProcessLost
from protocol.messages import EngineInfo, StepResult, WorkerReady
from protocol.process import ChildProcess, run_child
from protocol.transport import UNLIMITED, open_socket

# Steps sent and not yet answered. Two hide the host's work behind the GPU's; more would only delay new requests.
PIPELINE_DEPTH = 2


class EngineCore:
    """Owns the sockets and drives the scheduler."""

    def __init__(self, child: ChildProcess) -> None:
        config = child.config
        self._child = child
        self._config = config
        # Written as the signal comes. A handler in Python runs when the main thread wakes up, which a signal that comes
        # just before it waits, or to another thread, does not make it do.
        self._stop_reader, stop_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(stop_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._depth = PIPELINE_DEPTH if config.options.async_scheduling else 1
        self._frontend_socket = open_socket(
            child.context, zmq.ROUTER, bind=config.core_address(config.epoch), max_message_bytes=UNLIMITED
        )
        self._grammar_reader, grammar_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._grammars = grammars_of(config, on_ready=lambda: wake(grammar_writer))
        self._masks = MaskMaker(config.model_config.vocab_size, config.model_config.eos_token_ids)
        self._poller = zmq.Poller()
        self._worker = WorkerLink(child.context, config, self._poller)
        for source in (self._stop_reader, self._grammar_reader, child.control.socket):
            self._poller.register(source, zmq.POLLIN)
        self._clock = StepClock()
        self._told_of_search = (False, False)

    def run(self) -> None:
        """Waits for the worker, then serves until SIGTERM.

        Raises:
            EngineError: the worker is none that this core can drive.
        """
        ready = self._wait_for_worker()
        if ready is not None:
            self._scheduler = Scheduler(
                scheduler_config(self._config, ready), ready.epoch, step_time_model(self._config)
            )
            self._search = CrashSearch(self._scheduler)
            engine = engine_info(self._config, ready)
            self._frontends = Frontends(self._frontend_socket, self._scheduler, self._grammars, engine)
            self._poller.register(self._frontend_socket, zmq.POLLIN)
            self._greet_worker(ready)
            while not self._stopping(events := self._poller.poll(self._worker.patience_ms)):
                self._turn({source for source, _ in events})
        self._grammars.close()
        self._worker.shut_down()
        self._frontend_socket.close()

    def _stopping(self, events: list) -> bool:
        return any(source == self._stop_reader for source, _ in events)

    def _wait_for_worker(self) -> WorkerReady | None:
        """The worker's first message, or None if the engine is stopped before it comes."""
        while not self._stopping(self._poller.poll()):
            while (lost := self._next_loss()) is not None:
                self._worker.reopen(lost.epoch)
            message = self._worker.receive()
            if isinstance(message, WorkerReady):
                return message
        return None

    def _turn(self, sources: set) -> None:
        """Takes what has arrived, then sends what can be sent: steps first, since the GPU waits for them."""
        if self._child.control.socket in sources:
            while (lost := self._next_loss()) is not None:
                self._lose_worker(lost)
        self._frontends.receive_all()
        if self._grammar_reader in sources:
            os.read(self._grammar_reader, 4096)
            self._frontends.start_grammars()
        effects = []
        while (message := self._worker.receive()) is not None:
            if isinstance(message, StepResult):
                effects.append(self._scheduler.apply(message, self._clock.answered(time.perf_counter())))
                self._send_steps()
            else:
                self._greet_worker(message)
        if self._search.is_running:
            self._search.advance()
            self._tell_of_search()
        self._send_steps()
        for effect in effects:
            self._frontends.send_effects(effect)
        self._scheduler.sharing.register_prefilled()
        if self._worker.has_become_stuck():
            self._child.found_stuck(
                "worker", self._worker.epoch, f"the worker has not answered for {self._config.step_timeout:g} s"
            )

    def _send_steps(self) -> None:
        if not self._worker.is_ready:
            return
        # A step that waits for masks goes before the next one: the worker holds one at most.
        self._send_masks()
        while self._worker.is_ready and self._scheduler.num_in_flight < self._depth:
            step = self._scheduler.schedule(time.perf_counter())
            if step is None:
                return
            self._worker.send(step)
            self._clock.sent(time.perf_counter())
            self._send_masks()

    def _send_masks(self) -> None:
        masked = self._scheduler.take_masked_rows()
        if masked is not None:
            self._worker.send(self._masks.masks(*masked))

    # --- when the worker is lost --------------------------------------------------------------------------------------

    def _next_loss(self) -> ProcessLost | None:
        """The next loss of a worker that the launcher tells of; answers pings meanwhile."""
        while (received := self._child.control.receive()) is not None:
            if isinstance(received[1], ProcessLost):
                return received[1]
            if isinstance(received[1], Ping):
                self._child.pong()
        return None

    def _lose_worker(self, lost: ProcessLost) -> None:
        """Puts what the worker had back into the queue, and waits for the next worker."""
        self._worker.reopen(lost.epoch)
        self._clock = StepClock()
        self._frontends.has_worker = False
        computed = self._scheduler.restart(lost.epoch)
        if lost.is_from_outside:
            self._search.interrupted()
            return
        # One that dies before it has computed anything fails to start, and no request is to blame.
        if computed or self._search.is_running:
            culprit = self._search.crashed(computed)
            if culprit is not None:
                self._frontends.fail(culprit, f"the worker crashed while it computed this request alone: {lost.reason}")
            self._search.advance()
            self._tell_of_search()

    def _greet_worker(self, ready: WorkerReady) -> None:
        """Goes on with a worker."""
        if ready.num_blocks != self._scheduler.config.num_blocks:
            raise EngineError(
                f"the new worker has {ready.num_blocks} blocks, the one before had {self._scheduler.config.num_blocks}"
            )
        self._frontends.announce_worker()
        self._child.ready(epoch=ready.epoch, num_blocks=ready.num_blocks - 1)

    def _tell_of_search(self) -> None:
        """Tells the launcher whether crashes are to be expected, if that has changed."""
        state = self._search.is_running, self._search.is_hopeless
        if state != self._told_of_search:
            self._told_of_search = state
            self._child.searches_crash(*state)


def scheduler_config(config: EngineConfig, ready: WorkerReady) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=config.options.max_num_seqs,
        max_num_batched_tokens=config.options.max_num_batched_tokens,
        max_model_len=ready.max_model_len,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks,
        enable_prefix_caching=config.options.enable_prefix_caching,
        eos_token_ids=config.model_config.eos_token_ids,
        max_client_share=config.options.max_client_share,
    )


def step_time_model(config: EngineConfig) -> StepTimeModel | None:
    """What bounds prefill while streams run, or None if nothing does."""
    if not config.options.max_step_ms:
        return None
    return StepTimeModel(config.options.max_step_ms / 1000, RelativeCosts.of(config.model_config))


def grammars_of(config: EngineConfig, on_ready: Callable[[], None]) -> Grammars:
    """Of the model's tokenizer, or of the one that the frontend makes where the model's has an older form."""
    folders = [] if config.options.skip_tokenizer_init else [config.model_path, config.run_directory]
    files = [Path(folder) / "tokenizer.json" for folder in folders]
    return Grammars(files, config.model_config.vocab_size, config.model_config.eos_token_ids, on_ready)


def wake(writer: int) -> None:
    """Writes to a non-blocking pipe, whose reader need not know how often."""
    with contextlib.suppress(BlockingIOError):
        os.write(writer, b"x")


def engine_info(config: EngineConfig, ready: WorkerReady) -> EngineInfo:
    return EngineInfo(
        model=config.model_name,
        max_model_len=ready.max_model_len,
        vocab_size=config.model_config.vocab_size,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks - 1,
        has_tokenizer=not config.options.skip_tokenizer_init,
    )


def main(child: ChildProcess) -> None:
    EngineCore(child).run()


if __name__ == "__main__":
    run_child("core", main)
