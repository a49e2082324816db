"""How long a step will take, learned from how long steps took, and so how much prefill a bounded time has room for.

What a step costs depends on the device, so nothing here is in absolute units: the model's shape says how costs compare
(a pair of attention to a token of prefill, a cached token to the weights), and rates for decode, for prefill in chunks
and for prefill layer by layer are measured. It knows nothing of sockets, and it never reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from core.prefill_budget import PrefillBudget
from protocol.messages import LEAST_LAYERED_TOKENS
from protocol.model_config import ModelConfig

# Tokens of prefill that a step may always hold: below it a device reads the weights for too few tokens, and a measured
# time says too little about longer chunks. So a rate that is wrong shrinks chunks no further, and is measured again.
MIN_CHUNK = 256
# What a unit of prefill may be thought to cost where it is computed layer by layer, over what it costs otherwise. Else
# a rate that is wrong would see to it that nothing is computed so any more, and never be measured again.
_MOST_OF_LAYERED = 1.5
# Tokens beside decodes before any prefill was measured: a few milliseconds on most GPUs, and then the rate is known.
UNMEASURED_CHUNK = 1024
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
        num_layers: of the model, which cost the same.
    """

    pair: float
    cached_token: float
    num_layers: int = 1

    @staticmethod
    def of(model: ModelConfig) -> RelativeCosts:
        attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
        layers = model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
        head = model.vocab_size * model.hidden_size
        return RelativeCosts(
            # For each head dimension a pair costs a multiply-add for q·k and one for p·v; a weight costs one a token.
            pair=ATTENTION_FLOP * 2 * model.num_layers * model.num_heads * model.head_dim / layers,
            cached_token=model.kv_bytes_per_token(itemsize=1) / (2 * (layers + head)),
            num_layers=model.num_layers,
        )


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        context: tokens that decoding rows attend to, their own included; 0 if none decodes.
        tokens: tokens of prefill; of a chunk some of whose layers are computed, that part.
        pairs: (query, key) pairs of their attention, likewise.
        is_layered: the prefill is some layers of a chunk, beside the decodes instead of together with them.
    """

    context: int
    tokens: int = 0
    pairs: int = 0
    is_layered: bool = False


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
    Prefill that is computed layer by layer has a rate of its own.
    """

    def __init__(
        self,
        max_seconds: float,
        costs: RelativeCosts,
        min_chunk: int = MIN_CHUNK,
        least_layered: int = LEAST_LAYERED_TOKENS,
    ) -> None:
        self.max_seconds = max_seconds
        self.min_chunk = min_chunk
        self._least_layered = least_layered
        self.costs = costs
        self._decode = _Rate()
        self._prefill = _Rate()
        self._layered = _Rate()
        self._has_decoded_alone = False

    def decode_seconds(self, context: int) -> float:
        """Predicted time of decodes of this context; 0 if it is not known yet."""
        return self._decode.value * self._decode_units(context)

    def prefill_seconds(self, tokens: int, pairs: int, is_layered: bool = False) -> float:
        """Predicted time of prefill; 0 if it is not known yet."""
        return self._prefill_rate(is_layered) * self._prefill_units(tokens, pairs)

    def _prefill_rate(self, is_layered: bool) -> float:
        prefill, layered = self._prefill.value, self._layered.value
        if not is_layered or not layered:
            return prefill
        return min(layered, _MOST_OF_LAYERED * prefill) if prefill else layered

    def prefill_budget(
        self, tokens: int, block_size: int, num_decodes: int, context: int, queue: StepWork
    ) -> PrefillBudget:
        """What may be prefilled beside so many decodes, of this context, in `tokens` at most. `queue` is all that is
        to be."""
        bound = self._seconds_for_prefill(context, queue)
        rate, layered_rate = self._prefill_rate(False), self._prefill_rate(True)
        work = self._equal_steps(bound, queue) / rate if rate else UNMEASURED_CHUNK
        return PrefillBudget(
            tokens,
            block_size,
            work,
            self.min_chunk,
            self.costs.pair,
            num_decodes=num_decodes,
            num_layers=self.costs.num_layers,
            layered_work=bound / layered_rate if layered_rate else 0.0,
            least_layered=self._least_layered,
        )

    def _seconds_for_prefill(self, context: int, queue: StepWork) -> float:
        """How long the prefill of one step may take."""
        decode = self.decode_seconds(context)
        fastest = self.prefill_seconds(queue.tokens, 0) / MOST_STEPS_OF_QUEUE
        return max(self.max_seconds - decode, PREFILL_PER_DECODE * decode, fastest)

    def _equal_steps(self, bound: float, queue: StepWork) -> float:
        """How long it takes where the queue's steps are made equal: `bound` or less, or a little more if that saves
        one."""
        if not 0 < bound < math.inf:
            return bound
        total = self.prefill_seconds(queue.tokens, queue.pairs)
        steps = math.ceil(total / bound - _STEP_SLACK)
        return total / steps if steps > 1 else max(bound, total)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from a step that took `seconds`. Short prefills say too little and are passed over."""
        is_short = 0 < work.tokens < self.min_chunk // 2 and not work.is_layered
        if seconds <= 0 or is_short:
            return
        decode = self.decode_seconds(work.context)
        prefill = self.prefill_seconds(work.tokens, work.pairs, work.is_layered)
        if not work.tokens:
            self._has_decoded_alone = True
            self._decode.add(seconds / self._decode_units(work.context))
        elif work.context and not self._has_decoded_alone and 0 < prefill < seconds:
            self._decode.add((seconds - prefill) / self._decode_units(work.context))
        else:
            # If decodes were predicted to take nearly all of it, that was wrong: prefill certainly took some.
            rate = self._layered if work.is_layered else self._prefill
            rate.add(max(seconds - decode, seconds / 4) / self._prefill_units(work.tokens, work.pairs))

    def _decode_units(self, context: int) -> float:
        return 1 + self.costs.cached_token * context if context else 0.0

    def _prefill_units(self, tokens: int, pairs: int) -> float:
        return tokens + self.costs.pair * pairs


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
