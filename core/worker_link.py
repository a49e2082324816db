"""The core's end of the connection to the worker: a socket for each epoch, and whether the worker keeps answering.

Knows nothing of what steps are about.
"""

from __future__ import annotations

import time

import zmq

from protocol.config import EngineConfig
from protocol.errors import EngineError
from protocol.messages import (
    PROTOCOL_VERSION,
    Malformed,
    Shutdown,
    Step,
    StepMasks,
    StepResult,
    WorkerReady,
    WorkerToCore,
)
from protocol.transport import UNLIMITED, Channel, open_socket


class WorkerLink:
    """Attributes:
    epoch: the worker that is there, or is to come, speaks of this one.
    is_ready: it is there, and takes steps.
    """

    def __init__(self, context: zmq.Context, config: EngineConfig, poller: zmq.Poller) -> None:
        self._context = context
        self._config = config
        self._poller = poller
        self._open(config.epoch)

    def _open(self, epoch: int) -> None:
        self.epoch = epoch
        self.is_ready = False
        self._num_unanswered = 0
        self._last_progress = 0.0
        self._found_stuck = False
        address = self._config.worker_address(epoch)
        self._channel = Channel(
            open_socket(self._context, zmq.PAIR, bind=address, max_message_bytes=UNLIMITED), WorkerToCore
        )
        self._poller.register(self._channel.socket, zmq.POLLIN)

    def reopen(self, epoch: int) -> None:
        """Forgets the worker and waits for another one, which will meet it at the new epoch's address."""
        self._close()
        self._open(epoch)

    def receive(self) -> StepResult | WorkerReady | None:
        """The next message of this epoch's worker that has arrived, or None.

        Raises:
            EngineError: it is no worker of this version.
        """
        while (received := self._channel.receive()) is not None:
            message = received[1]
            if isinstance(message, Malformed):
                raise EngineError(f"the worker sent a malformed message: {message.reason}")
            if message.epoch != self.epoch:
                continue
            if isinstance(message, WorkerReady):
                if message.protocol_version != PROTOCOL_VERSION:
                    raise EngineError(
                        f"worker speaks protocol version {message.protocol_version}, this core {PROTOCOL_VERSION}"
                    )
                self.is_ready = True
            else:
                self._num_unanswered -= 1
                self._last_progress = time.monotonic()
            return message
        return None

    def send(self, message: Step | StepMasks) -> None:
        """Sends to the worker. What cannot be sent is dropped: the worker is gone, and its loss is about to be told."""
        if isinstance(message, Step):
            if not self._num_unanswered:
                self._last_progress = time.monotonic()
            self._num_unanswered += 1
        if not self._channel.send(message):
            self.is_ready = False

    @property
    def patience_ms(self) -> int | None:
        """How long the worker may still take to answer; None while it owes nothing, or was given up."""
        if not self._num_unanswered or self._found_stuck:
            return None
        return max(0, int(1000 * (self._last_progress + self._config.step_timeout - time.monotonic())) + 1)

    def has_become_stuck(self) -> bool:
        """Whether the worker has just been found to owe an answer for longer than it may: true once an epoch."""
        overdue = self._num_unanswered and time.monotonic() - self._last_progress > self._config.step_timeout
        if not overdue or self._found_stuck:
            return False
        self._found_stuck = True
        return True

    def shut_down(self) -> None:
        """Tells the worker to end."""
        self._channel.send(Shutdown())
        self._close(linger=True)

    def _close(self, linger: bool = False) -> None:
        self._poller.unregister(self._channel.socket)
        if not linger:
            self._channel.socket.setsockopt(zmq.LINGER, 0)
        self._channel.close()
