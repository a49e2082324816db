"""Gathers what the requests behind one HTTP response produce, and wakes the coroutine that waits for it.

A stream can have its outputs passed on as steps bring them, without waking anybody. A response that cannot be
written as fast as tokens come finds several of them in one take.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from frontend.failures import error_of
from frontend.requests import RunningRequest
from protocol.messages import Failed, Finished

# What a token that waits takes in memory, about, and what each of its log-probabilities does.
_TOKEN_BYTES = 64
_LOGPROB_BYTES = 64


class Choice:
    """One request's part of the response: what is new since the last take, and how it ended if it did.

    `finished` is set by the take that has the last of it: a writer that pauses between a take and what it writes of it
    must not see an end whose text it does not have.
    """

    __slots__ = ("ending", "finished", "index", "is_new", "text_parts", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.text_parts: list[str] = []
        self.ending: Finished | None = None
        self.finished: Finished | None = None
        self.is_new = False


# A choice with its new text and token ids.
Output = tuple[Choice, str, list[int]]
# Takes a stream's outputs at once. False: it has them, but could not write them all.
PassOn = Callable[[list[Output]], bool]


class Collector:
    """The sink of one HTTP response, whose choice `i` is the request with tag `i`.

    What waits to be taken is counted in bytes, and `on_overflow` called once if it becomes too much while what was
    taken before cannot be sent. Much that comes at once is not the client's fault.

    Attributes:
        num_unfinished: choices that have not been taken with their end.
        client_left: nobody is there to answer any more.
    """

    def __init__(
        self,
        num_choices: int,
        max_bytes: int = sys.maxsize,
        on_overflow: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`max_bytes` bounds what waits of each choice that streams. `on_end` is called when there is no more to come,
        however much of it still waits."""
        self.choices = [Choice(index) for index in range(num_choices)]
        self.num_unfinished = num_choices
        self.client_left = False
        self._max_bytes = max_bytes * num_choices
        self._is_sending = False
        self._on_overflow = on_overflow
        self._on_end = on_end
        self._num_bytes = 0
        self._new: list[Choice] = []
        self._num_without_end = num_choices
        self._failed: Failed | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pass_on: PassOn | None = None
        self._error: Exception | None = None

    def add(self, request: RunningRequest, token_id: int, text: str) -> None:
        choice = self.choices[request.tag]
        choice.token_ids.append(token_id)
        if text:
            choice.text_parts.append(text)
        self._mark(choice)
        self._num_bytes += _TOKEN_BYTES + len(text)
        if request.logprobs:
            self._num_bytes += _LOGPROB_BYTES * len(request.logprobs[-1].top_ids)
        if self._num_bytes > self._max_bytes and self._is_sending and not self.client_left:
            self.client_left = True
            if self._on_overflow is not None:
                self._on_overflow()

    def finish(self, request: RunningRequest, text: str, finished: Finished) -> None:
        choice = self.choices[request.tag]
        if not request.stream:
            choice.token_ids = request.token_ids
        choice.text_parts.append(text)
        choice.ending = finished
        self._num_without_end -= 1
        self._mark(choice)
        if not self._num_without_end and self._on_end is not None:
            self._on_end()

    def fail(self, request: RunningRequest, failed: Failed) -> None:
        self._failed = failed
        if self._on_end is not None:
            self._on_end()

    def flush(self) -> None:
        if not (self._new or self._failed or self.client_left):
            return
        # The end of a response is its coroutine's to write, and so is an error.
        if self._pass_on is not None and self._new and self._num_without_end and self._failed is None:
            try:
                if self._pass_on(self._take_new()):
                    self._is_sending = False
                    return
            except Exception as error:
                self._error = error
        self._pass_on = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self) -> None:
        """The client has disconnected."""
        self.client_left = True
        self._pass_on = None
        self.flush()

    async def take(self, pass_on: PassOn | None = None) -> list[Output]:
        """Waits for something new and returns it.

        With `pass_on`, what steps bring while this waits goes there, until that has enough, or the end comes, or an
        error: what has come since then is returned. Empty if the client has left, or if nothing has come.

        Raises:
            EngineError: one of the requests failed.
        """
        self._is_sending = False
        while not (self._new or self._failed or self.client_left):
            self._waiter = asyncio.get_running_loop().create_future()
            self._pass_on = pass_on
            try:
                await self._waiter
            finally:
                self._pass_on = None
            if self._error is not None:
                raise self._error
            if pass_on is not None:
                break
        if self.client_left:
            return []
        if self._failed is not None and not self._new:
            raise error_of(self._failed)
        return self._take_new()

    def _take_new(self) -> list[Output]:
        taken = []
        for choice in self._new:
            taken.append((choice, "".join(choice.text_parts), choice.token_ids))
            choice.text_parts, choice.token_ids, choice.is_new = [], [], False
            if choice.ending is not None:
                choice.finished = choice.ending
                self.num_unfinished -= 1
        self._new = []
        self._num_bytes = 0
        self._is_sending = True
        return taken

    def _mark(self, choice: Choice) -> None:
        if not choice.is_new:
            choice.is_new = True
            self._new.append(choice)
