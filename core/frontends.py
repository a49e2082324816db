"""The core's end of the connection to frontends: handshake, requests in, a step's outputs out."""

from __future__ import annotations

import logging
import time

import msgspec
import zmq

from core.grammar import Grammars
from core.request import Request
from core.results import StepEffects
from core.scheduler import Scheduler
from protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    CoreHello,
    CoreReady,
    EngineInfo,
    Failed,
    FrontendToCore,
    GetStats,
    Malformed,
    Refused,
    unpack_ints,
)
from protocol.transport import Channel

logger = logging.getLogger(__name__)


class Frontends:
    """Serves every frontend on one ROUTER socket. A frontend is numbered when it says hello.

    Attributes:
        has_worker: whether there is a worker; frontends that come while there is none hear of it when there is.
    """

    def __init__(self, socket: zmq.Socket, scheduler: Scheduler, grammars: Grammars, engine: EngineInfo) -> None:
        self._channel = Channel(socket, FrontendToCore)
        self._grammars = grammars
        self._scheduler = scheduler
        self._engine = engine
        self._index_of: dict[bytes, int] = {}
        self._identities: list[bytes] = []
        self.has_worker = False

    def receive_all(self) -> None:
        """Handles every message that has arrived."""
        while (received := self._channel.receive()) is not None:
            self._handle(*received)

    def _handle(self, identity: bytes, message: object) -> None:
        if isinstance(message, CoreHello):
            self._welcome(identity, message)
        elif isinstance(message, Malformed):
            logger.warning("malformed message from a frontend dropped: %s", message.reason)
            self._channel.send(Refused(f"malformed message: {message.reason}"), identity)
        elif identity not in self._index_of:
            self._channel.send(Refused("say CoreHello first"), identity)
        elif isinstance(message, AddRequest):
            self._add(identity, message)
        elif isinstance(message, AbortRequests):
            self._scheduler.abort(self._index_of[identity], unpack_ints(message.request_ids, "<i8").tolist())
        elif isinstance(message, GetStats):
            self._send(identity, self._scheduler.stats(message.query_id))

    def _welcome(self, identity: bytes, message: CoreHello) -> None:
        if message.protocol_version != PROTOCOL_VERSION:
            reason = f"protocol version {message.protocol_version} is not the engine core's {PROTOCOL_VERSION}"
            self._channel.send(Refused(reason), identity)
            return
        if identity not in self._index_of:
            self._index_of[identity] = len(self._identities)
            self._identities.append(identity)
        if self.has_worker:
            self._send(identity, CoreReady(PROTOCOL_VERSION, self._scheduler.epoch, self._engine))

    def announce_worker(self) -> None:
        """Tells all that there is a worker."""
        self.has_worker = True
        for identity in self._identities:
            self._send(identity, CoreReady(PROTOCOL_VERSION, self._scheduler.epoch, self._engine))

    def fail(self, request: Request, message: str) -> None:
        """Ends a request that cannot be computed."""
        self._send(self._identities[request.frontend_index], self._scheduler.fail(request, message))

    def _add(self, identity: bytes, message: AddRequest) -> None:
        index = self._index_of[identity]
        try:
            self._scheduler.add(index, message, time.perf_counter())
        except ValueError as error:
            self._send(identity, Failed(message.request_id, "invalid_request", str(error)))
            return
        if message.grammar is not None:
            self._grammars.compile((index, message.request_id), message.grammar)

    def start_grammars(self) -> None:
        """Lets requests go on whose grammars have been compiled, and answers those whose cannot be."""
        for key, grammar in self._grammars.take_ready():
            failed = self._scheduler.start_grammar(key, grammar)
            if failed is not None:
                self._send(self._identities[key[0]], failed)

    def send_effects(self, effects: StepEffects) -> None:
        for index, message in effects.messages(self._scheduler.epoch):
            self._send(self._identities[index], message)

    def _send(self, identity: bytes, message: msgspec.Struct) -> None:
        if not self._channel.send(message, identity):
            logger.warning("a frontend is gone: its requests are aborted")
            self._scheduler.abort_frontend(self._index_of[identity])
