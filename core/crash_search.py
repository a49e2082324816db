"""Finds the request that crashes the worker, by halves (group testing: Dorfman 1943, here with adaptive halving).

After a crash that no signal from outside has caused, every request that was being computed is a suspect. They are
recomputed in groups, one at a time and nobody else beside it. A group in which the worker crashes again is halved; one
whose requests have all gone past the point of the crash is cleared. A request is at fault only if it has crashed the
worker alone. Knows nothing of processes and sockets.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.request import Phase, Request
from core.scheduler import Scheduler

# Tokens that a suspect must have beyond those known at the crash: as many as may have been on their way, and one more.
_TOKENS_PAST_CRASH = 3
# So many requests at fault, one after the other and none cleared between them, say that it is not the requests.
_MOST_AT_FAULT_IN_A_ROW = 8


class CrashSearch:
    """Decides which requests may be admitted while it runs, and which one is at fault.

    Attributes:
        is_running: from a crash until nobody is suspected and all may be admitted again.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.is_running = False
        self._scheduler = scheduler
        self._groups: list[list[Request]] = []  # still to be tested, the last one first
        self._tested: list[Request] | None = None
        self._goal: dict[Request, int] = {}  # known tokens at which a suspect is cleared
        self._num_at_fault_in_a_row = 0

    @property
    def is_hopeless(self) -> bool:
        """The worker crashes whatever it computes."""
        return self._num_at_fault_in_a_row >= _MOST_AT_FAULT_IN_A_ROW

    def crashed(self, computed: Sequence[Request]) -> Request | None:
        """The worker crashed of itself while it computed these requests. Returns the one at fault, if it is known.

        Call it when the scheduler has restarted.
        """
        tested, self._tested = self._tested, None
        self._suspect([request for request in tested or () if request not in computed])
        for request in computed:
            self._goal[request] = len(request.token_ids) + _TOKENS_PAST_CRASH
        suspects = [request for request in computed if request.phase is not Phase.FINISHED]
        self.is_running = True
        self._scheduler.admit_only(())
        # Alone is who was tested alone: beside one that is left of a crash, others may have run that have ended since.
        if tested is not None and len(tested) == 1 and suspects == tested:
            self._num_at_fault_in_a_row += 1
            return suspects[0]
        half = (len(suspects) + 1) // 2
        self._suspect(suspects[half:])
        self._suspect(suspects[:half])
        return None

    def _suspect(self, requests: list[Request]) -> None:
        if requests:
            self._groups.append(requests)

    def interrupted(self) -> None:
        """The worker was ended from outside: the group that was being tested is tested again."""
        if self._tested is not None:
            self._groups.append(self._tested)
            self._tested = None
            self._scheduler.admit_only(())

    def advance(self) -> None:
        """Goes on to the next group once this one is cleared, and ends the search after the last one."""
        while self.is_running:
            if self._tested is not None:
                if not all(map(self._is_cleared, self._tested)):
                    return
                if any(request.phase is not Phase.FINISHED for request in self._tested):
                    self._num_at_fault_in_a_row = 0
                self._tested = None
                # What follows is tested alone, so steps that are on their way come back first.
                self._scheduler.admit_only(())
            if self._scheduler.num_in_flight:
                return
            if self._groups:
                self._tested = self._groups.pop()
                self._scheduler.admit_only(self._tested)
            else:
                self._goal.clear()
                self._scheduler.admit_only(None)
                self.is_running = False

    def _is_cleared(self, request: Request) -> bool:
        return request.phase is Phase.FINISHED or self._scheduler.num_known(request) >= self._goal[request]
