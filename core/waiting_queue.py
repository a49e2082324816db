"""Requests that are in no slot: in the one order of all, and how many of their tokens are still to be computed."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from core.prefill_budget import num_pairs
from core.request import Phase, Request

_Heap = list[tuple[int, int, Request]]


class WaitingQueue:
    """Ordered by (priority, arrival).

    Attributes:
        num_tokens: known tokens of all that wait, those included that are not ready to be queued yet.
        num_pairs: (query, key) pairs of attention that computing all of these would take.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_pairs = 0
        # May hold requests that have finished: they are dropped when they come to the head.
        self._heap: _Heap = []
        # By client, requests that were passed over at the head, so that they are not looked at again in each step.
        self._passed_over: dict[tuple[int, int], _Heap] = {}
        # While only some may be admitted, the others are kept apart.
        self._only: Collection[Request] | None = None
        self._kept_apart: list[Request] = []

    def hold(self, request: Request) -> None:
        """Counts a request that cannot be queued yet."""
        self._count(request, 1)

    def release(self, request: Request) -> None:
        """Queues a request that was held."""
        if self._only is None or request in self._only:
            heapq.heappush(self._heap, (*request.order, request))
        else:
            self._kept_apart.append(request)

    def restrict(self, only: Collection[Request] | None) -> None:
        """Lets no request come to the head but these, until told otherwise; None lets all."""
        heaps = [self._heap, *self._passed_over.values()]
        queued = [request for heap in heaps for *_, request in heap] + self._kept_apart
        self._only, self._heap, self._passed_over, self._kept_apart = only, [], {}, []
        for request in queued:
            if request.phase is Phase.WAITING:
                self.release(request)

    def push(self, request: Request) -> None:
        self.hold(request)
        self.release(request)

    def first(self, over: Collection[tuple[int, int]] = ()) -> Request | None:
        """The first that waits, or None: one whose client is not among those `over` their share, if there is any."""
        while over and (head := _head(self._heap)) is not None and head.client in over:
            heapq.heappush(self._passed_over.setdefault(head.client, []), heapq.heappop(self._heap))
        heap = self._first_heap(over)
        return heap[0][2] if heap else None

    def pop(self, over: Collection[tuple[int, int]] = ()) -> Request:
        """Takes out what `first` returns."""
        request = heapq.heappop(self._first_heap(over))[2]
        self._count(request, -1)
        return request

    def _first_heap(self, over: Collection[tuple[int, int]]) -> _Heap:
        """The heap whose head goes first; empty if nothing waits."""
        if not self._passed_over:
            _head(self._heap)
            return self._heap
        self._passed_over = {client: heap for client, heap in self._passed_over.items() if _head(heap) is not None}
        heaps = [self._heap] if _head(self._heap) is not None else []
        heaps += [heap for client, heap in self._passed_over.items() if client not in over]
        # Where nobody else waits, blocks that are free are no use to anybody else.
        return min(heaps or list(self._passed_over.values()) or [self._heap], key=lambda heap: heap[:1])

    def count_token(self, request: Request) -> None:
        """A token has come back for a request that waits, since it was on its way when the request lost its slot."""
        self.num_tokens += 1
        self.num_pairs += len(request.token_ids)

    def forget(self, request: Request) -> None:
        """No longer counts a request that is about to finish while it waits."""
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        self.num_tokens += sign * len(request.token_ids)
        self.num_pairs += sign * num_pairs(0, len(request.token_ids))


def _head(heap: _Heap) -> Request | None:
    while heap and heap[0][2].phase is Phase.FINISHED:
        heapq.heappop(heap)
    return heap[0][2] if heap else None
