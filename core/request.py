"""A request as the core keeps it: tokens, options, and where it stands.

While a request runs, its tokens and counters live in the `SlotTable`; what is here is what must outlive the slot.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np

from core.grammar import GrammarState
from core.prefix_cache import root_digest
from protocol.messages import AddRequest, unpack_ints


class Phase(IntEnum):
    WAITING = 0  # not in a slot: new, or preempted
    PREFILLING = 1  # in a slot, known tokens still to be computed
    DECODING = 2  # in a slot, one token a step
    DRAINING = 3  # in a slot, every token it may have is in a step already sent
    FINISHED = 4


class Request:
    """One request, from arrival to its last token. Identified by the frontend that sent it and that one's id for it."""

    __slots__ = (
        "arrival",
        "awaits_grammar",
        "bad_words",
        "block_ids",
        "client",
        "digests",
        "frontend_index",
        "grammar",
        "is_measuring",
        "num_cached_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "params",
        "phase",
        "priority",
        "prompt_is_measured",
        "queued_at",
        "request_id",
        "root",
        "seed",
        "slot",
        "token_ids",
        "total_limit",
        "was_admitted",
    )

    def __init__(self, frontend_index: int, message: AddRequest, arrival: int, max_model_len: int) -> None:
        self.frontend_index = frontend_index
        self.request_id = message.request_id
        self.client = (frontend_index, message.client)
        self.params = message.params
        self.bad_words = message.bad_words
        self.priority = message.priority
        self.arrival = arrival
        self.root = root_digest(message.cache_salt)
        # Drawn here, not at sampling time, so that recomputation after a preemption draws the same tokens.
        self.seed = random.getrandbits(63) if message.params.seed is None else message.params.seed
        prompt, generated = unpack_ints(message.prompt_token_ids), unpack_ints(message.generated_token_ids)
        self.token_ids = np.concatenate([prompt, generated])  # known tokens, as of when it last left a slot
        self.num_prompt_tokens = len(prompt)
        room = max_model_len - self.num_prompt_tokens
        # Prompt and answer together; the last token is returned but never computed.
        self.total_limit = self.num_prompt_tokens + min(room, message.params.max_tokens or room)
        self.phase = Phase.WAITING
        self.slot = -1
        self.block_ids: list[int] = []
        self.digests: list[bytes] = []  # of the full blocks of known tokens, as far as they were needed
        self.num_in_flight = 0  # tokens of steps sent before a preemption that are not back yet
        self.num_cached_tokens = 0  # prompt tokens that its first admission found in the prefix cache
        self.was_admitted = False
        self.queued_at: float | None = None  # until it is admitted for the first time
        # Whether the log-probabilities of the prompt have come back, if they are wanted.
        self.prompt_is_measured = message.params.prompt_logprobs is None
        self.is_measuring = False  # whether the slot it is in was told to
        # Until its grammar is compiled it is not admitted.
        self.awaits_grammar = message.grammar is not None
        self.grammar: GrammarState | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.frontend_index, self.request_id

    @property
    def order(self) -> tuple[int, int]:
        """The one total order: who goes first, and, from the end, who is preempted."""
        return self.priority, self.arrival

    def append(self, token: int) -> None:
        """Adds a token that came back after the request lost its slot."""
        self.token_ids = np.append(self.token_ids, np.int32(token))
