"""ZeroMQ sockets and the codec that turns messages into frames and back.

Two kinds of receiver: `Channel` blocks (core, worker, synchronous client) and `AsyncChannel` calls back from an asyncio
loop (frontend, asynchronous client). Neither ever raises because of what a peer sent: bytes that are no message of the
expected kind come back as `Malformed`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.messages import Malformed

logger = logging.getLogger(__name__)

# Above the largest honest message (a prompt of a million tokens); a peer that sends more is cut off by ZeroMQ.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
UNLIMITED = -1
# Set, rather than left at ZeroMQ's default of 1000, so that a full queue is noticed (zmq.Again), never a silent drop.
HIGH_WATER_MARK = 100_000
LINGER_MS = 1000

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


class Decoder:
    """Decodes frames of one direction of one connection, given the union of the messages that may arrive on it."""

    def __init__(self, union: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(union).decode

    def __call__(self, frame: bytes) -> Any:
        """The message, or `Malformed` with the reason. Never raises."""
        try:
            return self._decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
            return Malformed(reason=str(error))


def open_socket(
    context: zmq.Context,
    kind: int,
    *,
    bind: str | None = None,
    connect: str | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_received: int = HIGH_WATER_MARK,
) -> zmq.Socket:
    """A socket with this project's limits, bound or connected to an address.

    `max_received` messages of each peer may wait here to be received; the peer keeps what is more.

    Between the engine's own processes `max_message_bytes` is `UNLIMITED`: a step that admits many long prompts whose
    beginnings are cached may be larger than anything that a client is allowed to send.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, max_received)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    if kind == zmq.ROUTER:
        # Sending to a peer that is gone raises instead of dropping the message.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        if bind is not None:
            _bind_for_this_user(socket, bind)
        if connect is not None:
            socket.connect(connect)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


def _bind_for_this_user(socket: zmq.Socket, address: str) -> None:
    """Binds so that other users are kept out by the file's mode, and, where they can get round that, by their id."""
    # What connects is asked for its user by the kernel, which a mode that somebody has changed does not.
    socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
    before = os.umask(0o177)
    try:
        socket.bind(address)
    finally:
        os.umask(before)


class Channel:
    """A blocking connection: sends messages, receives messages of one union.

    With a ROUTER socket every call carries the peer's identity; otherwise the identity is b"".

    Attributes:
        num_bytes_received: of all messages, as far as they have been taken.
    """

    def __init__(self, socket: zmq.Socket, receives: Any) -> None:
        self.socket = socket
        self._routed = socket.getsockopt(zmq.TYPE) == zmq.ROUTER
        self._decode = Decoder(receives)
        self.num_bytes_received = 0

    def send(self, message: msgspec.Struct, identity: bytes = b"") -> bool:
        """Queues a message. Returns False when the peer is gone or its queue is full: nothing is lost unseen."""
        return self.send_frame(encode(message), identity)

    def send_frame(self, frame: bytes, identity: bytes = b"") -> bool:
        """Queues a message that is encoded already, by one who had to know its size. Otherwise as `send`."""
        frames = [identity, frame] if self._routed else [frame]
        try:
            self.socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def receive(self, timeout_ms: int | None = 0) -> tuple[bytes, Any] | None:
        """The next (identity, message), or None if none came within the timeout (None waits for ever)."""
        if timeout_ms != 0 and not self.socket.poll(timeout_ms):
            return None
        try:
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return self._split(frames)

    def _split(self, frames: list[bytes]) -> tuple[bytes, Any]:
        expected = 2 if self._routed else 1
        identity = frames[0] if self._routed else b""
        if len(frames) != expected:
            return identity, Malformed(reason=f"a message of {len(frames)} frames, expected {expected}")
        self.num_bytes_received += len(frames[-1])
        return identity, self._decode(frames[-1])

    def close(self) -> None:
        self.socket.close()


class AsyncChannel(Channel):
    """The same connection for an asyncio loop: calls `on_message(identity, message)` for each that arrives.

    ZeroMQ's descriptor is edge-triggered and covers both directions, so it is drained after every send too.
    """

    # How long messages are handled before other callbacks of the loop get a turn. Where they come as fast as they are
    # handled, whatever else the loop does, such as reading a new request, takes several turns.
    TURN_S = 0.0005

    def __init__(
        self,
        socket: zmq.Socket,
        receives: Any,
        on_message: Callable[[bytes, Any], None],
        on_turn_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_turn_end` is called after messages that were handled in one turn. A turn takes as long as that last took,
        at least, so that where messages outpace it, more of them share it."""
        super().__init__(socket, receives)
        self._on_message = on_message
        self._on_turn_end = on_turn_end
        self._turn_s = self.TURN_S
        self._loop = asyncio.get_running_loop()
        self._drain_scheduled = False
        self._closed = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._on_readable)
        self._schedule_drain()

    def send_frame(self, frame: bytes, identity: bytes = b"") -> bool:
        sent = super().send_frame(frame, identity)
        self._schedule_drain()
        return sent

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled and not self._closed:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _on_readable(self) -> None:
        # One drain at a time: each that runs out of time asks for another.
        if not self._drain_scheduled:
            self._drain()

    def _drain(self) -> None:
        self._drain_scheduled = False
        if self._take_messages(self._turn_s):
            self._schedule_drain()

    def take_all(self) -> None:
        """Handles every message that has arrived, without leaving a turn to others."""
        self._take_messages(math.inf)

    def _take_messages(self, seconds: float) -> bool:
        """Handles messages that have arrived, at least one, for so long. Returns whether there may be more."""
        end = time.perf_counter() + seconds
        num_handled, is_over = 0, False
        try:
            while not (self._closed or is_over):
                received = self.receive()
                if received is None:
                    break
                num_handled += 1
                try:
                    self._on_message(*received)
                except Exception:
                    # A bug in a handler costs that message; it must not stop the receiver.
                    logger.exception("a message could not be handled")
                is_over = time.perf_counter() > end
        finally:
            if num_handled and self._on_turn_end is not None:
                self._end_turn(self._on_turn_end)
        return is_over

    def _end_turn(self, on_turn_end: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            on_turn_end()
        except Exception:
            logger.exception("what messages brought could not be passed on")
        self._turn_s = max(self.TURN_S, time.perf_counter() - began)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            super().close()


class DisconnectWatch:
    """Calls back, once, when the peer of a connecting socket goes away after having been there.

    Make it before `socket.connect`. What the peer sent just before it went is still on its way through the socket when
    the disconnection is noticed, so the call comes a moment later.
    """

    _GRACE_S = 0.05

    def __init__(self, socket: zmq.Socket, on_disconnect: Callable[[], None]) -> None:
        self._socket = socket
        self._on_disconnect = on_disconnect
        self._loop = asyncio.get_running_loop()
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._fd = int(self._monitor.getsockopt(zmq.FD))
        self._closed = False
        self._loop.add_reader(self._fd, self._look)
        # ZeroMQ signals on the descriptor only after a look at the socket has found nothing.
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        disconnected = False
        while not self._closed and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            disconnected = True
        if disconnected:
            self._loop.call_later(self._GRACE_S, self._report)

    def _report(self) -> None:
        if not self._closed:
            self.close()
            self._on_disconnect()

    def close(self) -> None:
        """Stops watching. Call before the socket is closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
