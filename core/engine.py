"""The engine-core process: one loop between the frontends and the worker.

    python -m core.engine CONFIG_FILE

It keeps the worker supplied with up to two steps, so that the GPU has the next step before the last one's tokens are
back, and blocks when there is nothing to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from core.frontends import Frontends
from core.grammar import Grammars
from core.masks import MaskMaker
from core.scheduler import Scheduler, SchedulerConfig
from core.step_time import RelativeCosts, StepClock, StepTimeModel
from protocol.config import EngineConfig
from protocol.errors import EngineError
from protocol.messages import (
    PROTOCOL_VERSION,
    EngineInfo,
    Malformed,
    Shutdown,
    Step,
    StepMasks,
    StepResult,
    WorkerFailed,
    WorkerReady,
    WorkerToCore,
)
from protocol.process import ChildProcess, run_child
from protocol.transport import UNLIMITED, Channel, open_socket

logger = logging.getLogger(__name__)

# Steps sent and not yet answered. Two hide the host's work behind the GPU's; more would only delay new requests.
PIPELINE_DEPTH = 2


class EngineCore:
    """Owns the two sockets and drives the scheduler."""

    def __init__(self, child: ChildProcess) -> None:
        config = child.config
        self._stop_reader, stop_writer = os.pipe()
        signal.signal(signal.SIGTERM, lambda *_: os.write(stop_writer, b"x"))
        self._depth = PIPELINE_DEPTH if config.options.async_scheduling else 1
        worker = open_socket(child.context, zmq.PAIR, bind=config.worker_address, max_message_bytes=UNLIMITED)
        self._worker = Channel(worker, WorkerToCore)
        self._frontend_socket = open_socket(
            child.context, zmq.ROUTER, bind=config.core_address, max_message_bytes=UNLIMITED
        )
        self._grammar_reader, grammar_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._grammars = grammars_of(config, on_ready=lambda: wake(grammar_writer))
        self._masks = MaskMaker(config.model_config.vocab_size, config.model_config.eos_token_ids)
        self._poller = zmq.Poller()
        self._poller.register(self._stop_reader, zmq.POLLIN)
        self._poller.register(self._grammar_reader, zmq.POLLIN)
        self._poller.register(self._worker.socket, zmq.POLLIN)
        self._config = config
        self._clock = StepClock()

    def run(self, child: ChildProcess) -> None:
        """Waits for the worker, then serves until SIGTERM.

        Raises:
            EngineError: the worker could not start or cannot go on.
        """
        ready = self._wait_for_worker()
        if ready is not None:
            self._scheduler = Scheduler(
                scheduler_config(self._config, ready), ready.epoch, step_time_model(self._config)
            )
            self._frontends = Frontends(
                self._frontend_socket, self._scheduler, self._grammars, engine_info(self._config, ready)
            )
            self._poller.register(self._frontend_socket, zmq.POLLIN)
            child.ready(num_blocks=ready.num_blocks - 1, max_model_len=ready.max_model_len)
            while not self._stopping(events := self._poller.poll()):
                self._turn(any(source == self._grammar_reader for source, _ in events))
        self._grammars.close()
        self._worker.send(Shutdown())
        self._worker.close()
        self._frontend_socket.close()

    def _stopping(self, events: list) -> bool:
        return any(source == self._stop_reader for source, _ in events)

    def _wait_for_worker(self) -> WorkerReady | None:
        """The worker's first message, or None if the engine is stopped before it comes."""
        while not self._stopping(self._poller.poll()):
            received = self._worker.receive()
            if received is None:
                continue
            message = received[1]
            self._raise_if_failed(message)
            if isinstance(message, WorkerReady):
                if message.protocol_version != PROTOCOL_VERSION:
                    raise EngineError(
                        f"worker speaks protocol version {message.protocol_version}, this core {PROTOCOL_VERSION}"
                    )
                return message
        return None

    def _turn(self, grammars_are_ready: bool) -> None:
        """Takes what has arrived, then sends what can be sent: steps first, since the GPU waits for them."""
        self._frontends.receive_all()
        if grammars_are_ready:
            os.read(self._grammar_reader, 4096)
            self._frontends.start_grammars()
        effects = []
        while (received := self._worker.receive()) is not None:
            message = received[1]
            self._raise_if_failed(message)
            if isinstance(message, StepResult) and message.epoch == self._scheduler.epoch:
                effects.append(self._scheduler.apply(message, self._clock.answered(time.perf_counter())))
                self._send_steps()
        self._send_steps()
        for effect in effects:
            self._frontends.send_effects(effect)

    def _send_steps(self) -> None:
        # A step that waits for masks goes before the next one: the worker holds one at most.
        self._send_masks()
        while self._scheduler.num_in_flight < self._depth:
            step = self._scheduler.schedule(time.perf_counter())
            if step is None:
                return
            self._send(step)
            self._clock.sent(time.perf_counter())
            self._send_masks()

    def _send_masks(self) -> None:
        masked = self._scheduler.take_masked_rows()
        if masked is not None:
            self._send(self._masks.masks(*masked))

    def _send(self, message: Step | StepMasks) -> None:
        if not self._worker.send(message):
            raise EngineError("the worker no longer takes steps")

    def _raise_if_failed(self, message: object) -> None:
        if isinstance(message, WorkerFailed):
            raise EngineError(message.message)
        if isinstance(message, Malformed):
            raise EngineError(f"the worker sent a malformed message: {message.reason}")


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
    EngineCore(child).run(child)


if __name__ == "__main__":
    run_child("core", main)
