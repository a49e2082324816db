"""The running requests' bookkeeping, as arrays indexed by slot.

With 512 requests running, a Python loop over them costs more than the GPU's step; NumPy on these arrays does not. The
table holds state and says nothing about policy: the scheduler is its one owner.
"""

from __future__ import annotations

import numpy as np

from core.request import Request


class SlotTable:
    """Per-slot arrays of `num_slots` entries.

    A slot's *generation* counts its releases: a row of a step in flight belongs to the slot's request only while the
    generation noted with the step is still the slot's.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_slots - 1, -1, -1))
        self.requests: list[Request | None] = [None] * num_slots
        self.generation = np.zeros(num_slots, np.int64)
        self.request_id = np.zeros(num_slots, np.int64)
        self.frontend = np.zeros(num_slots, np.int64)  # index of the frontend that its request came from
        self.token_ids = np.zeros((num_slots, max_model_len), np.int32)
        self.num_known = np.zeros(num_slots, np.int64)  # tokens whose ids the core has
        self.num_computed = np.zeros(num_slots, np.int64)  # tokens in the KV cache once all steps sent have run
        self.total_limit = np.zeros(num_slots, np.int64)  # most tokens it may reach, prompt included
        self.capacity = np.zeros(num_slots, np.int64)  # tokens that its blocks can hold
        self.num_registered = np.zeros(num_slots, np.int64)  # its blocks that the prefix cache was told of
        self.ends_at_eos = np.zeros(num_slots, np.bool_)
        self.has_stop_ids = np.zeros(num_slots, np.bool_)
        self.has_grammar = np.zeros(num_slots, np.bool_)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def assign(self, request: Request, num_computed: int, num_registered: int) -> int:
        """Gives a request a slot; its `block_ids` must be set."""
        slot = self._free.pop()
        request.slot = slot
        known = len(request.token_ids)
        self.requests[slot] = request
        self.request_id[slot] = request.request_id
        self.frontend[slot] = request.frontend_index
        self.token_ids[slot, :known] = request.token_ids
        self.num_known[slot] = known
        self.num_computed[slot] = num_computed
        self.total_limit[slot] = request.total_limit
        self.capacity[slot] = len(request.block_ids) * self._block_size
        self.num_registered[slot] = num_registered
        self.ends_at_eos[slot] = not request.params.ignore_eos
        self.has_stop_ids[slot] = bool(request.params.stop_token_ids)
        self.has_grammar[slot] = request.grammar is not None
        return slot

    def known_tokens(self, slot: int) -> np.ndarray:
        """View of the slot's known tokens; copy it to keep it."""
        return self.token_ids[slot, : self.num_known[slot]]

    def release(self, request: Request) -> None:
        slot = request.slot
        request.token_ids = self.known_tokens(slot).copy()
        request.slot = -1
        self.requests[slot] = None
        self.generation[slot] += 1
        self._free.append(slot)
