"""How much prefill a step may hold, handed out chunk by chunk. Knows costs in tokens, nothing of requests or time."""

from __future__ import annotations

import math

# Kernels compute a step in tiles of this many tokens, and one that is not full takes as long. So in a step of several
# tiles, a chunk that time cuts short ends with a tile.
TILE_TOKENS = 128
_SEVERAL_TILES = 4
# A part of a layer by which a step may be over what it should hold.
_LAYER_SLACK = 0.1


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
        *,
        num_decodes: int = 0,
        num_layers: int = 1,
        layered_work: float = math.inf,
        least_layered: float = math.inf,
    ) -> None:
        """`num_decodes` are the step's tokens beside `tokens`.

        A chunk that time would cut is computed layer by layer instead, of the model's `num_layers`, if it has at least
        `least_layered` tokens; `layered_work` is then what a step may hold of it.
        """
        self.num_tokens = 0
        self.num_pairs = 0
        self._tokens = tokens
        self._block_size = block_size
        self._work = work
        # A block at least, so that a chunk that ends with a block is never empty.
        self._min_tokens = max(min_tokens, block_size)
        self._pair_cost = pair_cost
        self._num_decodes = num_decodes
        self.num_layers = num_layers
        self._layered_work = layered_work
        self._least_layered = least_layered

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

    def layered_length(self, start: int, wanted: int) -> int:
        """Tokens of the next chunk, if it had better be computed layer by layer, at least one in a step; else 0.

        `take_layers` then says how many are computed now. Arguments as those of `take`.
        """
        is_cut = self._cost(start, wanted) > self._work
        if self.num_layers == 1 or self.num_tokens or wanted < self._least_layered or not is_cut:
            return 0
        # It is computed beside the decodes, so that their tokens do not count.
        most = min(wanted, self._num_decodes + self._tokens)
        length = min(most, int(self._longest(start, self._layered_work * self.num_layers)))
        return length if length >= self._least_layered else 0

    def take_layers(self, start: int, length: int, first: int, num_layers: int) -> int:
        """How many layers of such a chunk are computed now, of those from `first` on; nothing is left to others."""
        left = num_layers - first
        at_once = self._layered_work / (self._cost(start, length) / num_layers) + _LAYER_SLACK
        # As many steps as it must take, made equal.
        layers = math.ceil(left / math.ceil(left / max(int(min(at_once, left)), 1)))
        done = first + layers
        self.num_tokens += length * done // num_layers - length * first // num_layers
        pairs = num_pairs(start, length)
        self.num_pairs += pairs * done // num_layers - pairs * first // num_layers
        self._tokens = 0
        return layers

    def _cost(self, start: int, length: int) -> float:
        return length + self._pair_cost * num_pairs(start, length)

    def _fit(self, start: int, wanted: int) -> int:
        if wanted <= self._min_tokens or self._cost(start, wanted) <= self._work:
            return wanted
        length = max(int(self._longest(start, max(self._work, 0.0))), self._min_tokens)
        before = self._num_decodes + self.num_tokens
        if before + length >= _SEVERAL_TILES * TILE_TOKENS:
            length = round((before + length) / TILE_TOKENS) * TILE_TOKENS - before
        else:
            length = (start + length) // self._block_size * self._block_size - start
        return max(min(length, wanted), 0)

    def _longest(self, start: int, work: float) -> float:
        """The longest chunk that costs no more than this: a quadratic equation, solved without cancellation."""
        linear = 1 + self._pair_cost * (start + 0.5)
        return 2 * work / (linear + math.sqrt(linear * linear + 2 * self._pair_cost * work))
