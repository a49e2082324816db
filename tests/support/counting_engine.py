"""An engine's end of the IPC connection that answers at once, with as many tokens as are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from protocol.messages import Failed, Finished, Generate, Message, Outputs, pack_ints
from tests.support.scripted_engine import ScriptedEngine

VOCAB_SIZE = 50


class CountingEngine(ScriptedEngine):
    """Sends one token a message.

    Attributes:
        seen: every request.
        missing_tokens: how many tokens an answer lacks, after `num_whole` answers that lack none.
        failure: what every request is answered with, in place of tokens.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address, VOCAB_SIZE)
        self.seen: list[Generate] = []
        self.missing_tokens = 0
        self.num_whole = 0
        self.failure: str | None = None

    def answers(self, message: Message) -> Iterator[Message]:
        if isinstance(message, Generate):
            self.seen.append(message)
            yield from self._answers(message)

    def _answers(self, request: Generate) -> Iterator[Outputs | Failed]:
        request_id = request.request_id
        if self.failure is not None:
            yield Failed(request_id, "failed", self.failure)
            return
        assert request.params.max_tokens is not None
        missing = self.missing_tokens if len(self.seen) > self.num_whole else 0
        for _ in range(request.params.max_tokens - missing):
            yield Outputs(pack_ints([request_id], "<i8"), pack_ints([7]))
        yield Outputs(b"", b"", [], [Finished(request_id, "length", num_cached_tokens=2)])
