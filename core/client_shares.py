"""The cap on what one client may hold when blocks are short: who is passed over, and who is preempted before others.

Knows requests, the clients that they come from and the blocks that they hold; nothing of slots or steps. Where one
client alone has requests, and where blocks are plenty, nothing here is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from core.request import Phase, Request


class ClientShares:
    """Which clients hold more than their share of the blocks.

    A block that several requests of a client share counts for each of them: to know better would mean looking at every
    block in every step.
    """

    def __init__(self, max_share: float, num_blocks: int) -> None:
        """`max_share` is a fraction of the `num_blocks`; 1 is no cap."""
        self._most_blocks = max_share * num_blocks
        self._is_off = max_share >= 1
        self._num_requests: Counter[tuple[int, int]] = Counter()

    def add(self, request: Request) -> None:
        self._num_requests[request.client] += 1

    def remove(self, request: Request) -> None:
        self._num_requests[request.client] -= 1
        if not self._num_requests[request.client]:
            del self._num_requests[request.client]

    @property
    def are_contended(self) -> bool:
        """Whether several clients have requests."""
        return len(self._num_requests) > 1 and not self._is_off

    def clients_over(self, running: Sequence[Request]) -> set[tuple[int, int]]:
        """The clients whose running requests hold more than a share."""
        if not self.are_contended:
            return set()
        held: Counter[tuple[int, int]] = Counter()
        for request in running:
            held[request.client] += len(request.block_ids)
        return {client for client, num_blocks in held.items() if num_blocks > self._most_blocks}

    def victim(self, running: Sequence[Request]) -> Request:
        """The request to preempt: the last in order of a client that holds too much, or else the last of all.

        The first of each client is spared by the cap, however much it holds: preempted whenever others need a block, a
        request that is larger than a share would never end.
        """
        # A draining request computes nothing more: taking its blocks would only repeat what it has done.
        candidates = [request for request in reversed(running) if request.phase is not Phase.DRAINING]
        over = self.clients_over(running)
        if over:
            firsts = {request.client: request for request in reversed(running)}
            for request in candidates:
                if request.client in over and firsts[request.client] is not request:
                    return request
        return candidates[0]
