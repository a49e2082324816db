"""Log-probabilities of tokens as they travel: arrays for many tokens at once, and one token's when it is unpacked.

They are of the model's own distribution, before penalties, bias and temperature. Knows nothing of who wants them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from protocol.arrays import (
    Float32Array,
    Int32Array,
    pack_floats,
    pack_ints,
    require_same_count,
    require_whole,
    unpack_floats,
    unpack_ints,
)


class TokenLogprobs(Struct, array_like=True, frozen=True, gc=False):
    """For each of some tokens: its log-probability and rank, and the most likely tokens in its place, best first.

    `rows` says which tokens, as the message that holds this defines. The rank is the number of tokens that are at
    least as likely, itself included. `top_ids` and `top_logprobs` are `[rows, width]`, row by row.
    """

    rows: Int32Array
    logprobs: Float32Array
    ranks: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array

    def __post_init__(self) -> None:
        require_whole(self, ("rows", "logprobs", "ranks", "top_ids", "top_logprobs"), 4)
        require_same_count(self, ("rows", 4), ("logprobs", 4), ("ranks", 4))
        require_same_count(self, ("top_ids", 4), ("top_logprobs", 4))
        if len(self.top_ids) % len(self.rows) if self.rows else self.top_ids:
            raise ValueError("top_ids must hold equally many ids for each row")

    @property
    def num_rows(self) -> int:
        return len(self.rows) // 4

    @property
    def width(self) -> int:
        """Alternatives for each token."""
        return len(self.top_ids) // len(self.rows) if self.rows else 0

    def select(self, keep: np.ndarray, rows: np.ndarray) -> TokenLogprobs:
        """Those in the mask `keep`, called `rows`."""
        shape = (self.num_rows, self.width)
        return TokenLogprobs(
            pack_ints(rows),
            pack_floats(unpack_floats(self.logprobs)[keep]),
            pack_ints(unpack_ints(self.ranks)[keep]),
            pack_ints(unpack_ints(self.top_ids).reshape(shape)[keep]),
            pack_floats(unpack_floats(self.top_logprobs).reshape(shape)[keep]),
        )


class PromptLogprobs(Struct, array_like=True, frozen=True, gc=False):
    """Of a stretch of a request's prompt; the rows are positions in it. The first token has none."""

    request_id: int
    tokens: TokenLogprobs


class TokenLogprob(NamedTuple):
    """One token's log-probability and rank, and the most likely tokens in its place, best first."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    def narrowed(self, width: int) -> TokenLogprob:
        """With no more than `width` alternatives; -1 keeps all."""
        if width < 0 or len(self.top_ids) <= width:
            return self
        return self._replace(top_ids=self.top_ids[:width], top_logprobs=self.top_logprobs[:width])


def unpack_logprobs(table: TokenLogprobs) -> list[tuple[int, TokenLogprob]]:
    """(row, what is known of its token) for each row of a table."""
    shape = (table.num_rows, table.width)
    columns = (
        unpack_floats(table.logprobs).tolist(),
        unpack_ints(table.ranks).tolist(),
        unpack_ints(table.top_ids).reshape(shape).tolist(),
        unpack_floats(table.top_logprobs).reshape(shape).tolist(),
    )
    return list(zip(unpack_ints(table.rows).tolist(), map(TokenLogprob._make, zip(*columns)), strict=True))


def pack_logprobs(entries: Iterable[tuple[int, TokenLogprob]]) -> list[TokenLogprobs]:
    """The tables of (row, token): one for each number of alternatives."""
    by_width = sorted(entries, key=lambda entry: len(entry[1].top_ids))
    return [_table(list(group)) for _, group in groupby(by_width, key=lambda entry: len(entry[1].top_ids))]


def _table(entries: Sequence[tuple[int, TokenLogprob]]) -> TokenLogprobs:
    return TokenLogprobs(
        pack_ints([row for row, _ in entries]),
        pack_floats([token.logprob for _, token in entries]),
        pack_ints([token.rank for _, token in entries]),
        pack_ints(np.array([token.top_ids for _, token in entries])),
        pack_floats(np.array([token.top_logprobs for _, token in entries])),
    )
