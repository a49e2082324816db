"""A worker that computes nothing: it keeps a step's rows as the real one would and answers with tokens of a rule.

It checks what the real worker relies on: that every position is computed once, in order, into a block that no other
sequence writes, that a chunk's layers come in order, and that what is sampled is what was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from protocol.logprobs import TokenLogprob, TokenLogprobs, pack_logprobs
from protocol.messages import Step, StepResult, pack_ints, unpack_ints

TokenRule = Callable[[int, int, int], int]


def measured(token: int) -> TokenLogprob:
    """What it says of a token, so that it is known again."""
    return TokenLogprob(-float(token), token, [], [])


@dataclass
class SlotView:
    tokens: list[int]
    num_computed: int
    blocks: list[int]
    seed: int
    num_prompt: int
    wants_logprobs: bool
    measures_prompt: bool


@dataclass
class NullWorker:
    """Executes steps in order; `answer` returns the oldest unanswered step's result.

    The token at position p of a request is `rule(seed, p, sum of its tokens)`, so that it depends on everything before
    it, as a language model's does.
    """

    block_size: int
    rule: TokenRule
    num_layers: int = 1
    slots: dict[int, SlotView] = field(default_factory=dict)
    pending: deque[StepResult] = field(default_factory=deque)
    num_computed_tokens: int = 0
    num_layered_steps: int = 0
    _decode: list[int] = field(default_factory=list)
    _layered: tuple[int, int, int] | None = None  # slot, length and next layer of a chunk
    _written_by: dict[int, tuple[int, int]] = field(default_factory=dict)

    def execute(self, step: Step) -> None:
        for slot in unpack_ints(step.released_slots).tolist():
            del self.slots[slot]
            if self._layered is not None and self._layered[0] == slot:
                self._layered = None
        for admitted in step.admitted:
            assert admitted.slot not in self.slots, "slot given away twice"
            self.slots[admitted.slot] = SlotView(
                unpack_ints(admitted.token_ids).tolist(),
                admitted.num_computed_tokens,
                unpack_ints(admitted.block_ids).tolist(),
                admitted.seed,
                admitted.num_prompt_tokens,
                admitted.num_logprobs is not None,
                admitted.num_prompt_logprobs is not None,
            )
        new_blocks = zip(
            unpack_ints(step.new_block_slots).tolist(),
            unpack_ints(step.new_block_positions).tolist(),
            unpack_ints(step.new_block_ids).tolist(),
            strict=True,
        )
        for slot, position, block in new_blocks:
            assert len(self.slots[slot].blocks) == position
            self.slots[slot].blocks.append(block)
        if step.decode_slots is not None:
            self._decode = unpack_ints(step.decode_slots).tolist()
        writers: dict[int, int] = {}
        tokens = [self._compute(slot, 1, writers) for slot in self._decode]
        sampling = list(self._decode)
        prompts: list[TokenLogprobs] = []
        for slot, length, samples in zip(
            unpack_ints(step.prefill_slots).tolist(),
            unpack_ints(step.prefill_lens).tolist(),
            step.prefill_samples,
            strict=True,
        ):
            view = self.slots[slot]
            if step.prefill_num_layers:
                assert not view.measures_prompt
                assert len(step.prefill_samples) == 1
                if self._compute_layers(slot, length, step.prefill_first_layer, step.prefill_num_layers, writers):
                    assert not samples
                    continue
            if view.measures_prompt:
                after = range(view.num_computed + 1, min(view.num_computed + length + 1, view.num_prompt))
                tables = pack_logprobs((position, measured(view.tokens[position])) for position in after)
                prompts += tables or [TokenLogprobs(b"", b"", b"", b"", b"")]
            token = self._compute(slot, length, writers, samples=bool(samples))
            if samples:
                tokens.append(token)
                sampling.append(slot)
        wanted = [(row, measured(tokens[row])) for row, slot in enumerate(sampling) if self.slots[slot].wants_logprobs]
        self.pending.append(StepResult(step.step_id, step.epoch, pack_ints(tokens), pack_logprobs(wanted), prompts))

    def _compute_layers(self, slot: int, length: int, first: int, count: int, writers: dict[int, int]) -> bool:
        """Whether there are layers left."""
        assert first == 0 or self._layered == (slot, length, first), "layers are left out"
        assert first + count <= self.num_layers
        self.num_layered_steps += 1
        self._check_blocks(slot, length, writers)
        self._layered = (slot, length, first + count) if first + count < self.num_layers else None
        return self._layered is not None

    def _check_blocks(self, slot: int, length: int, writers: dict[int, int]) -> None:
        view = self.slots[slot]
        start, end = view.num_computed, view.num_computed + length
        assert end <= len(view.tokens), "a token is computed before it exists"
        assert end <= len(view.blocks) * self.block_size, "a token has no block"
        for index in range(start // self.block_size, (end - 1) // self.block_size + 1):
            block = view.blocks[index]
            assert block != 0
            assert writers.setdefault(block, slot) == slot, "two sequences write one block in a step"

    def _compute(self, slot: int, length: int, writers: dict[int, int], samples: bool = True) -> int:
        self._check_blocks(slot, length, writers)
        view = self.slots[slot]
        end = view.num_computed + length
        assert samples == (end == len(view.tokens))
        view.num_computed = end
        self.num_computed_tokens += length
        if not samples:
            return -1
        token = self.rule(view.seed, end, int(np.sum(view.tokens)))
        view.tokens.append(token)
        return token

    def answer(self) -> StepResult:
        return self.pending.popleft()
