"""The requests of one call that wants many answers: which are sent when, and what comes back, in order of ending.

Sends as many at once as the engine lets wait, and more as it shows that it takes them. A request that the engine
refuses because too much waits is sent again when another one of the call has ended. Knows no sockets.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable

from frontend.client_request import ClientRequest
from protocol.errors import EngineOverloadedError


class Batch:
    """Jobs `0..num_jobs-1`, of which each becomes a request, and the requests that are under way.

    Attributes:
        requests: of each job, the one sent last.
    """

    def __init__(self, num_jobs: int, max_waiting: int | None, send: Callable[[int], ClientRequest]) -> None:
        """`send` sends the request of a job. `max_waiting` is the engine's, None if it has no limit."""
        self.requests: list[ClientRequest | None] = [None] * num_jobs
        self._send = send
        self._jobs = list(range(num_jobs))  # a heap: those that are still to be sent
        self._job_of: dict[int, int] = {}  # by id of the requests under way
        self._window = max_waiting or num_jobs
        self._ended: deque[ClientRequest] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, request: ClientRequest) -> None:
        """Takes a request that has ended."""
        self._ended.append(request)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def running(self) -> list[int]:
        """Ids of the requests under way."""
        return list(self._job_of)

    def send_some(self) -> None:
        """Sends what there is to send and may be under way. Raises what `send` raises."""
        while self._jobs and len(self._job_of) < self._window:
            job = self._jobs[0]
            request = self.requests[job] = self._send(job)
            request.batch = self
            self._job_of[request.request_id] = job
            heapq.heappop(self._jobs)

    async def next_ended(self) -> ClientRequest:
        """The next request that has been answered, while others are sent.

        Raises:
            EngineError: a request failed; EngineOverloadedError only if no other of the call was under way, so that
                it is others whose requests wait.
        """
        while True:
            self.send_some()
            if not self._ended:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            request = self._ended.popleft()
            job = self._job_of.pop(request.request_id, None)
            if job is None:
                continue
            if isinstance(request.error, EngineOverloadedError) and self._job_of:
                heapq.heappush(self._jobs, job)
                self._window = len(self._job_of)
            elif request.error is not None:
                raise request.error
            else:
                self._window += 1
                return request
