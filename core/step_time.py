"""How long a step will take, learned from how long steps took, and how much prefill fits into a bounded time.

What a step costs depends on the device, so nothing here is in absolute units: the model's shape says how costs compare
(a pair of attention to a token of prefill, a cached token to the weights), and one rate for prefill and one for decode
are measured. It knows nothing of sockets, and it never reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from protocol.model_config import ModelConfig

# Tokens of prefill that a step may always hold: below it a device reads the weights for too few tokens, and a measured
# time says too little about longer chunks. So a rate that is wrong shrinks chunks no further, and is measured again.
MIN_CHUNK = 256
# Tokens beside decodes before any prefill was measured: a few milliseconds on most GPUs, and then the rate is known.
UNMEASURED_CHUNK = 1024
# Kernels compute a step in tiles of this many tokens, and one that is not full takes as long. So in a step of several
# tiles, a chunk that time cuts short ends with a tile.
TILE_TOKENS = 128
_SEVERAL_TILES = 4
# What a flop of attention takes, in flops of products: chunks beside decodes add to products that have to be anyway.
ATTENTION_FLOP = 1.5
# Prefill may always take this many times as long as the decodes beside it. Where decodes alone come near the bound a
# prompt would crawl, and each step reads the weights once more for little.
PREFILL_PER_DECODE = 2.0
# A queue is not made to take more than this many steps: what waits for its first token would wait for each of them, and
# each reads the weights once more. So a burst of long prompts is computed in large chunks, and one prompt that comes
# while others stream in bounded ones.
MOST_STEPS_OF_QUEUE = 6
# Steps of a queue are made equal, so that the last is no small one. What is over a whole number of them by less than
# this part of a step makes them longer rather than more.
_STEP_SLACK = 0.05
# The median of five: two that are far off change nothing, and three make a change known.
NUM_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class RelativeCosts:
    """How a model's costs compare, on any device.

    Attributes:
        pair: flops of one (query, key) pair of attention, over those of a token of prefill without attention, and as
            much more as attention's flops take longer than products' do.
        cached_token: time that one cached token adds to a decode step, over that of the step without any: bytes of its
            keys and values, over twice those of the weights, since small kernels wait as long as they read.
    """

    pair: float
    cached_token: float

    @staticmethod
    def of(model: ModelConfig) -> RelativeCosts:
        attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
        layers = model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
        head = model.vocab_size * model.hidden_size
        return RelativeCosts(
            # For each head dimension a pair costs a multiply-add for q·k and one for p·v; a weight costs one a token.
            pair=ATTENTION_FLOP * 2 * model.num_layers * model.num_heads * model.head_dim / layers,
            cached_token=model.kv_bytes_per_token(itemsize=1) / (2 * (layers + head)),
        )


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        context: tokens that decoding rows attend to, their own included; 0 if none decodes.
        tokens: tokens of prefill.
        pairs: (query, key) pairs of their attention.
    """

    context: int
    tokens: int = 0
    pairs: int = 0


def num_pairs(start: int, length: int) -> int:
    """(query, key) pairs of a causal chunk of `length` tokens after `start` earlier ones."""
    return length * start + length * (length + 1) // 2


class PrefillBudget:
    """What a step may still prefill, taken chunk by chunk: tokens, and, if its time is bounded, work.

    Work is counted in tokens without attention. Time bounds no chunk below `min_tokens`, in all of the step's chunks.
    """

    def __init__(
        self,
        tokens: int,
        block_size: int,
        work: float = math.inf,
        min_tokens: int = 0,
        pair_cost: float = 0.0,
        num_decodes: int = 0,
    ) -> None:
        """`num_decodes` are the step's tokens beside `tokens`."""
        self.num_tokens = 0
        self.num_pairs = 0
        self._tokens = tokens
        self._block_size = block_size
        self._work = work
        # A block at least, so that a chunk that ends with a block is never empty.
        self._min_tokens = max(min_tokens, block_size)
        self._pair_cost = pair_cost
        self._num_decodes = num_decodes

    @property
    def is_spent(self) -> bool:
        return self._tokens == 0

    def take(self, start: int, wanted: int) -> int:
        """Tokens of the next chunk, of a request with `wanted` tokens to compute after `start`; 0 if nothing is left.

        A chunk that time cuts short leaves nothing to those after it. It ends with a tile of the step, the nearest one,
        or, in a small step, with a block.
        """
        wanted = min(wanted, self._tokens)
        length = self._fit(start, wanted)
        self.num_tokens += length
        self.num_pairs += num_pairs(start, length)
        self._tokens = self._tokens - length if length == wanted else 0
        self._work -= self._cost(start, length)
        self._min_tokens -= length
        return length

    def _cost(self, start: int, length: int) -> float:
        return length + self._pair_cost * num_pairs(start, length)

    def _fit(self, start: int, wanted: int) -> int:
        if wanted <= self._min_tokens or self._cost(start, wanted) <= self._work:
            return wanted
        # The longest chunk whose cost is within the work left: a quadratic equation, solved without cancellation.
        work, linear = max(self._work, 0.0), 1 + self._pair_cost * (start + 0.5)
        longest = 2 * work / (linear + math.sqrt(linear * linear + 2 * self._pair_cost * work))
        length = max(int(longest), self._min_tokens)
        before = self._num_decodes + self.num_tokens
        if before + length >= _SEVERAL_TILES * TILE_TOKENS:
            length = round((before + length) / TILE_TOKENS) * TILE_TOKENS - before
        else:
            length = (start + length) // self._block_size * self._block_size - start
        return max(min(length, wanted), 0)


class _Rate:
    """A cost that is measured again and again: the (lower) median of its last samples, 0 before the first."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=NUM_SAMPLES)
        self.value = 0.0

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        self.value = sorted(self._samples)[(len(self._samples) - 1) // 2]


class StepTimeModel:
    """Bounds the prefill beside decodes by the time that the step is predicted to take.

    A step takes `decode rate * (1 + cached_token * context) + prefill rate * (tokens + pair * pairs)` seconds. The
    decode rate is learned from steps that do nothing else, the prefill rate from what prefill adds to the decodes
    beside it: what the first gets wrong the second makes up for, and the sum is right. Until decodes were seen alone
    (many prompts that come at once are prefilled first without decodes, then beside them) it is the other way round.
    """

    def __init__(self, max_seconds: float, costs: RelativeCosts, min_chunk: int = MIN_CHUNK) -> None:
        self.max_seconds = max_seconds
        self.min_chunk = min_chunk
        self._costs = costs
        self._decode = _Rate()
        self._prefill = _Rate()
        self._has_decoded_alone = False

    def decode_seconds(self, context: int) -> float:
        """Predicted time of decodes of this context; 0 if it is not known yet."""
        return self._decode.value * self._decode_units(context)

    def prefill_seconds(self, tokens: int, pairs: int) -> float:
        """Predicted time of prefill; 0 if it is not known yet."""
        return self._prefill.value * self._prefill_units(tokens, pairs)

    def prefill_budget(
        self, tokens: int, block_size: int, num_decodes: int, context: int, queue: StepWork
    ) -> PrefillBudget:
        """What may be prefilled beside so many decodes, of this context, in `tokens` at most. `queue` is all that is
        to be."""
        rate = self._prefill.value
        work = self._seconds_of_prefill(context, queue) / rate if rate else UNMEASURED_CHUNK
        return PrefillBudget(tokens, block_size, work, self.min_chunk, self._costs.pair, num_decodes)

    def _seconds_of_prefill(self, context: int, queue: StepWork) -> float:
        """How long the prefill of one step may take: as long as streams may wait, or less if the queue's steps can be
        made equal."""
        decode = self.decode_seconds(context)
        fastest = self.prefill_seconds(queue.tokens, 0) / MOST_STEPS_OF_QUEUE
        bound = max(self.max_seconds - decode, PREFILL_PER_DECODE * decode, fastest)
        if not 0 < bound < math.inf:
            return bound
        total = self.prefill_seconds(queue.tokens, queue.pairs)
        steps = math.ceil(total / bound - _STEP_SLACK)
        return total / steps if steps > 1 else max(bound, total)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from a step that took `seconds`. Short prefills say too little and are passed over."""
        if seconds <= 0 or 0 < work.tokens < self.min_chunk // 2:
            return
        decode, prefill = self.decode_seconds(work.context), self.prefill_seconds(work.tokens, work.pairs)
        if not work.tokens:
            self._has_decoded_alone = True
            self._decode.add(seconds / self._decode_units(work.context))
        elif work.context and not self._has_decoded_alone and 0 < prefill < seconds:
            self._decode.add((seconds - prefill) / self._decode_units(work.context))
        else:
            # If decodes were predicted to take nearly all of it, that was wrong: prefill certainly took some.
            self._prefill.add(max(seconds - decode, seconds / 4) / self._prefill_units(work.tokens, work.pairs))

    def _decode_units(self, context: int) -> float:
        return 1 + self._costs.cached_token * context if context else 0.0

    def _prefill_units(self, tokens: int, pairs: int) -> float:
        return tokens + self._costs.pair * pairs


class StepClock:
    """Turns the times at which steps are sent and answered, in order, into how long each took.

    A step begins when it is sent or when the one before it is done, whichever is later.
    """

    def __init__(self) -> None:
        self._sent: deque[float] = deque()
        self._last_answer = -math.inf

    def sent(self, now: float) -> None:
        self._sent.append(now)

    def answered(self, now: float) -> float:
        """Seconds that the oldest step sent took, if its answer comes now."""
        began = max(self._sent.popleft(), self._last_answer)
        self._last_answer = now
        return now - began
