"""The pool of KV-cache blocks: who holds each block, and in which order free blocks are reused.

Knows ids and counts only. Block 0 is the null block, which padding writes to and nobody is ever given.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

NULL_BLOCK = 0


class BlockPool:
    """Blocks `1..num_blocks-1` with reference counts; every operation is O(1) a block.

    A free block keeps its content until it is reused, least recently freed first, so that the prefix cache can take it
    back with `share`. `on_reuse` is told of each block whose content is about to be overwritten.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        assert num_blocks >= 2, "a pool needs the null block and at least one other"
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks for writing. The caller has checked `num_free`."""
        assert count <= len(self._free), "allocation beyond the pool"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self._on_reuse(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks found by the prefix cache, free ones included. They must not be written."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a holder of a sequence's blocks.

        The last block of a sequence is reused first: a prefix serves more requests the shorter it is.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released twice"
            if self._references[block] == 0:
                self._free[block] = None
