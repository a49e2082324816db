"""The responses that can be read again or continued, for as long as there is room, in this process's memory.

Knows what they are made of only as far as their size goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct

from frontend.http_errors import ResponseNotFoundError
from frontend.responses_input import Message
from frontend.responses_types import ResponseBody

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024


class StoredResponse(Struct, frozen=True):
    """A response that has ended.

    Attributes:
        body: as it was answered, encoded.
        messages: the conversation up to its end, without instructions.
        num_bytes: about what both take. Messages are shared with the responses before, and count in each.
    """

    body: bytes
    messages: list[Message]
    num_bytes: int


class RunningResponse(Struct, frozen=True):
    """A response that is being made, and how to end it where it is."""

    body: ResponseBody
    cancel: Callable[[], None]


class ResponseStore:
    """Responses by id. The least recently used make room for new ones."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0
        self._running: dict[str, RunningResponse] = {}

    def begin(self, response_id: str, running: RunningResponse) -> None:
        self._running[response_id] = running

    def end(self, response_id: str, response: StoredResponse | None) -> None:
        """The response is not being made any more; without a result it is forgotten."""
        self._running.pop(response_id, None)
        if response is None:
            return
        self._stored[response_id] = response
        self._num_bytes += response.num_bytes
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def running(self, response_id: str) -> RunningResponse | None:
        return self._running.get(response_id)

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Raises ResponseNotFoundError, which is about the field `param`, if it is not there (any more)."""
        response = self._stored.get(response_id)
        if response is None:
            raise ResponseNotFoundError(f"the response {response_id!r} is not stored here (any more)", param)
        self._stored.move_to_end(response_id)
        return response

    def delete(self, response_id: str) -> None:
        """Raises ResponseNotFoundError if it is not there (any more)."""
        self._num_bytes -= self.get(response_id).num_bytes
        del self._stored[response_id]
