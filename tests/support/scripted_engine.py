"""An engine's end of the IPC connection, without an engine: answers clients by a script, over a real socket."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

import zmq

from protocol.address import AddressLock
from protocol.messages import PROTOCOL_VERSION, ClientMessage, EngineInfo, Hello, Message, Welcome
from protocol.transport import Channel, open_socket


class ScriptedEngine(threading.Thread, ABC):
    """Holds the lock of its address, as a running engine does, and welcomes whoever says hello."""

    def __init__(self, address: str, vocab_size: int = 640) -> None:
        super().__init__(daemon=True)
        self.address = address
        self._info = EngineInfo("tiny", 512, vocab_size, 16, 64)
        self._stop_requested = threading.Event()
        self._lock = AddressLock(address)

    @abstractmethod
    def answers(self, message: Message) -> Iterable[Message]:
        """What to send back for a message."""

    def run(self) -> None:
        context = zmq.Context()
        channel = Channel(open_socket(context, zmq.ROUTER, bind=self.address), ClientMessage)
        while not self._stop_requested.is_set():
            received = channel.receive(timeout_ms=20)
            if received is None:
                continue
            peer, message = received
            if isinstance(message, Hello):
                channel.send(Welcome(PROTOCOL_VERSION, self._info), peer)
            else:
                for answer in self.answers(message):
                    channel.send(answer, peer)
        channel.close()
        context.term()
        self._lock.release()

    def stop(self) -> None:
        self._stop_requested.set()
        self.join()
