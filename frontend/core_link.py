"""The connection to the engine core: handshake, sending, receiving, noticing that it is gone, and meeting the next one.

Tells its owner what arrives; keeps no request.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from protocol.errors import EngineError, EngineUnavailableError
from protocol.messages import (
    PROTOCOL_VERSION,
    CoreHello,
    CoreReady,
    CoreToFrontend,
    EngineInfo,
    Failed,
    FrontendToCore,
    GetStats,
    Refused,
    Stats,
    StepOutputs,
)
from protocol.transport import UNLIMITED, AsyncChannel, DisconnectWatch, open_socket

logger = logging.getLogger(__name__)

# The core binds its socket while this process already tries to connect.
_RECONNECT_MS = 10


class CoreListener(Protocol):
    """Whoever wants to know what the core says. None of these may raise."""

    def on_step(self, step: StepOutputs) -> None: ...

    def on_steps_taken(self) -> None:
        """Steps that had come have been told, one or several; others of the loop get their turn now."""
        ...

    def on_failed(self, failed: Failed) -> None: ...

    def on_core_lost(self) -> None: ...

    def on_core_ready(self, epoch: int, is_new: bool) -> None:
        """A core that was lost has a successor, which knows no requests, or there is a worker again."""
        ...


class CoreLink:
    """Attributes:
    ready: resolves to what the core says of the engine, or to the error that kept it from saying so.
    is_lost: the core was there and is gone, or another one has not said yet that it is ready.
    """

    def __init__(self, context: zmq.Context, address: str, listener: CoreListener) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._context = context
        self._listener = listener
        self._epoch = 0
        self._query_ids = itertools.count(1)
        self._queries: dict[int, Callable[[Stats | None], None]] = {}
        self.is_lost = False
        self._connect(address)

    def _connect(self, address: str) -> None:
        socket = open_socket(self._context, zmq.DEALER, max_message_bytes=UNLIMITED)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._watch = DisconnectWatch(socket, self._lose)
        self._channel = AsyncChannel(
            socket, CoreToFrontend, self._on_message, on_turn_end=self._listener.on_steps_taken
        )
        socket.connect(address)
        self._channel.send(CoreHello(PROTOCOL_VERSION))

    def reconnect(self, address: str) -> None:
        """Leaves the core, which is gone, for another one."""
        self._lose()
        self.close()
        self._connect(address)

    def send(self, message: FrontendToCore) -> bool:
        """Queues a message. Returns False if the core is gone or does not keep up."""
        return not self.is_lost and self._channel.send(message)

    def query_stats(self, on_stats: Callable[[Stats | None], None]) -> None:
        """Asks the core for its counters; calls back with None if it is gone."""
        query_id = next(self._query_ids)
        if self.send(GetStats(query_id)):
            self._queries[query_id] = on_stats
        else:
            on_stats(None)

    def _on_message(self, _: bytes, message: Any) -> None:
        if isinstance(message, StepOutputs):
            if message.epoch >= self._epoch:
                self._listener.on_step(message)
        elif isinstance(message, Failed):
            self._listener.on_failed(message)
        elif isinstance(message, Stats):
            on_stats = self._queries.pop(message.query_id, None)
            if on_stats is not None:
                on_stats(message)
        elif isinstance(message, CoreReady):
            self._on_ready(message)
        elif isinstance(message, Refused) and not self.ready.done():
            self.ready.set_exception(EngineError(f"the engine core refused the frontend: {message.reason}"))
        else:
            logger.error("dropped a message from the engine core: %s", message)

    def _on_ready(self, message: CoreReady) -> None:
        self._epoch = message.epoch
        if self.ready.done():
            is_new, self.is_lost = self.is_lost, False
            self._listener.on_core_ready(message.epoch, is_new)
            return
        if message.protocol_version != PROTOCOL_VERSION:
            reason = f"the engine core speaks protocol {message.protocol_version}, the frontend {PROTOCOL_VERSION}"
            self.ready.set_exception(EngineError(reason))
        else:
            self.ready.set_result(message.engine)

    def _lose(self) -> None:
        if self.is_lost or self._channel.socket.closed:
            return
        self.is_lost = True
        if not self.ready.done():
            self.ready.set_exception(EngineUnavailableError("the engine core went away while it was starting"))
        queries, self._queries = self._queries, {}
        for on_stats in queries.values():
            on_stats(None)
        self._listener.on_core_lost()

    def close(self) -> None:
        self._watch.close()
        if self.is_lost:
            # Nobody will fetch what is still queued.
            self._channel.socket.setsockopt(zmq.LINGER, 0)
        self._channel.close()
