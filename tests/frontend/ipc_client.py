"""A Python client that speaks the protocol by hand, so that tests can say what no real client would."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from protocol.messages import (
    PROTOCOL_VERSION,
    Finished,
    FrontendMessage,
    Generate,
    Hello,
    Outputs,
    TextPrompt,
    Welcome,
    unpack_ints,
)
from protocol.sampling import SamplingParams
from protocol.transport import Channel, open_socket

ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)
WAIT_MS = 10_000


class Client:
    """What has arrived is kept: tokens, texts and ends by request, and everything else in `others`."""

    def __init__(self, address: str, hello: bool = True, heartbeat_s: float = 60.0) -> None:
        self._context = zmq.Context()
        self.channel = Channel(open_socket(self._context, zmq.DEALER, connect=address), FrontendMessage)
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.finished: dict[int, Finished] = {}
        self.others: list[Any] = []
        self.num_outputs = 0
        if hello:
            self.send(Hello(PROTOCOL_VERSION, heartbeat_s))
            self.welcome = self.receive(Welcome)

    def send(self, message: msgspec.Struct) -> None:
        assert self.channel.send(message)

    def receive(self, kind: type) -> Any:
        """The next message, which must be of this kind."""
        received = self.channel.receive(WAIT_MS)
        assert received is not None, "no answer"
        assert isinstance(received[1], kind), received[1]
        return received[1]

    def generate(self, request_id: int, text: str, params: SamplingParams = ENDLESS, **options: Any) -> None:
        self.send(Generate(request_id, TextPrompt(text), params, **options))

    def gather(self, *request_ids: int) -> None:
        """Receives until these requests have ended."""
        while not set(request_ids) <= set(self.finished):
            self.gather_one()

    def gather_one(self) -> None:
        received = self.channel.receive(WAIT_MS)
        assert received is not None, "no answer"
        message = received[1]
        if not isinstance(message, Outputs):
            self.others.append(message)
            return
        self.num_outputs += 1
        ids = unpack_ints(message.request_ids, "<i8").tolist()
        for request_id, token in zip(ids, unpack_ints(message.token_ids).tolist(), strict=True):
            self.tokens.setdefault(request_id, []).append(token)
        for request_id, text in message.texts:
            self.texts[request_id] = self.texts.get(request_id, "") + text
        for finished in message.finished:
            self.finished[finished.request_id] = finished

    def close(self) -> None:
        self.channel.socket.close(linger=0)
        self._context.term()
