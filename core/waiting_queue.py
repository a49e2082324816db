"""Requests that are in no slot: in the one order of all, and how many of their tokens are still to be computed."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from core.request import Phase, Request


class WaitingQueue:
    """Ordered by (priority, arrival).

    Attributes:
        num_tokens: known tokens of all that wait, those included that are not ready to be queued yet.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        # May hold requests that have finished: they are dropped when they come to the head.
        self._heap: list[tuple[int, int, Request]] = []
        # While only some may be admitted, the others are kept apart.
        self._only: Collection[Request] | None = None
        self._kept_apart: list[Request] = []

    def hold(self, request: Request) -> None:
        """Counts a request that cannot be queued yet."""
        self.num_tokens += len(request.token_ids)

    def release(self, request: Request) -> None:
        """Queues a request that was held."""
        if self._only is None or request in self._only:
            heapq.heappush(self._heap, (*request.order, request))
        else:
            self._kept_apart.append(request)

    def restrict(self, only: Collection[Request] | None) -> None:
        """Lets no request come to the head but these, until told otherwise; None lets all."""
        queued = [request for *_, request in self._heap] + self._kept_apart
        self._only, self._heap, self._kept_apart = only, [], []
        for request in queued:
            if request.phase is Phase.WAITING:
                self.release(request)

    def push(self, request: Request) -> None:
        self.hold(request)
        self.release(request)

    @property
    def head(self) -> Request | None:
        """The first that waits, or None."""
        while self._heap and self._heap[0][2].phase is Phase.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        """Takes out the head."""
        request = heapq.heappop(self._heap)[2]
        self.num_tokens -= len(request.token_ids)
        return request

    def count_token(self) -> None:
        """A token came back for a request that waits, since it was on its way when the request lost its slot."""
        self.num_tokens += 1

    def forget(self, request: Request) -> None:
        """No longer counts a request that is about to finish while it waits."""
        self.num_tokens -= len(request.token_ids)
