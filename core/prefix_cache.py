"""Finds blocks by the tokens whose keys and values they hold.

A full block is identified by SHA-256 over its parent's digest and its token ids, so equal digests mean equal prefixes
from the first token on; the chain starts at the request's optional salt, which keeps tenants apart. Knows nothing of
reference counts: the block pool says when a block's content is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np


def root_digest(cache_salt: str | None) -> bytes:
    """The start of a chain. No salt and the empty salt differ."""
    return sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode()).digest()


def digests_of(
    digests: list[bytes], root: bytes, token_ids: np.ndarray, block_size: int, num_blocks: int, first: int = 0
) -> Iterator[bytes]:
    """The digests of full blocks `first` to `num_blocks - 1` of `token_ids` (int32), one after another.

    Those in `digests` are known already; others are appended to it as they are asked for: a prompt whose beginning is
    not cached is not read to its end to find that out.
    """
    for index in range(first, num_blocks):
        while index >= len(digests):
            start = len(digests) * block_size
            tokens = token_ids[start : start + block_size].tobytes()
            digests.append(sha256((digests[-1] if digests else root) + tokens).digest())
        yield digests[index]


class PrefixCache:
    """Digest → block, and back. `num_queries` and `num_hits` count tokens looked up and found."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self.num_queries = 0
        self.num_hits = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a digest chain."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, digest: bytes, block: int) -> None:
        """Makes a full block findable. Of two blocks with the same content the first stays the one that is found."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def clear(self) -> None:
        """No block holds what it did."""
        self._block_of.clear()
        self._digest_of.clear()

    def forget_digest(self, digest: bytes) -> None:
        """The content that the digest stands for is not to be trusted."""
        block = self._block_of.get(digest)
        if block is not None:
            self.forget(block)
