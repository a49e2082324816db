"""Between the running requests and the prefix cache: tells it which blocks are full, and finds those to share."""

from __future__ import annotations

import numpy as np

from core.prefix_cache import PrefixCache, digests_of
from core.request import Request
from core.slots import SlotTable


class BlockSharing:
    """What of the slots' tokens the prefix cache knows. Where prefix caching is off it knows nothing, and this does
    nothing."""

    def __init__(self, table: SlotTable, cache: PrefixCache, block_size: int, is_enabled: bool) -> None:
        self._table = table
        self._cache = cache
        self._block_size = block_size
        self._is_enabled = is_enabled
        self._prefilled: list[int] = []  # slots whose prefilled blocks the cache is yet to be told of

    def find(self, request: Request) -> list[int]:
        """Blocks that hold the beginning of a waiting request's tokens; never the last token, whose logits are needed.

        A prompt that is to be measured needs the logits of every token.
        """
        if not self._is_enabled or not request.prompt_is_measured:
            return []
        self.register_prefilled()
        most = (len(request.token_ids) - 1) // self._block_size
        return self._cache.find(digests_of(request.digests, request.root, request.token_ids, self._block_size, most))

    def count(self, request: Request) -> None:
        """Counts a request that is admitted for the first time, with what it found."""
        if self._is_enabled and request.prompt_is_measured:
            self._cache.num_queries += request.num_prompt_tokens
            self._cache.num_hits += request.num_cached_tokens

    def note_prefilled(self, slot: int) -> None:
        """A step that is being made prefills some of the slot's tokens."""
        if self._is_enabled:
            self._prefilled.append(slot)

    def register_prefilled(self) -> None:
        """Tells the cache of what was prefilled: when a step has been sent and nothing waits, or as soon as somebody
        looks for it. A long prompt's blocks take longer to register than the GPU should wait for its step."""
        for slot in self._prefilled:
            self._register(slot)
        self._prefilled.clear()

    def register_full(self, slots: np.ndarray) -> None:
        """Tells the cache of blocks that the slots' newest tokens have filled."""
        if not self._is_enabled:
            return
        table = self._table
        full = np.minimum(table.num_known[slots], table.num_computed[slots]) // self._block_size
        for slot in slots[full > table.num_registered[slots]].tolist():
            self._register(slot)

    def distrust(self, request: Request) -> None:
        """Nobody is to find blocks of a request that could not be computed."""
        for digest in request.digests:
            self._cache.forget_digest(digest)

    def _register(self, slot: int) -> None:
        """Makes the slot's blocks findable that are full of known tokens and computed by steps already sent.

        The step being made counts as sent: a request later in the same step may share the blocks, since a step writes
        all its keys and values, layer by layer, before it attends to them, and decodes before layers of a prompt.
        """
        table = self._table
        request = table.requests[slot]
        assert request is not None
        full = int(min(table.num_known[slot], table.num_computed[slot])) // self._block_size
        known, first = table.token_ids[slot], int(table.num_registered[slot])
        digests = digests_of(request.digests, request.root, known, self._block_size, full, first)
        for block, digest in zip(request.block_ids[first:full], digests, strict=True):
            self._cache.register(digest, block)
        table.num_registered[slot] = full
