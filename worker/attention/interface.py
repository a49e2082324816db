"""What an attention backend is given and what it must do.

A backend reads queries from the running step and keys and values from the paged cache. It knows nothing of
requests, sampling or scheduling: a step reaches it as rows of slots, laid out below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from worker.kernels import select
from worker.kernels.qk_norm_rope import QueryKeyTransform


@dataclass(slots=True)
class AttentionMetadata:
    """The rows and tokens of one step, on the device.

    A row is one sequence's share of the step. Rows `0..num_decode_rows-1` have exactly one query token each and
    come first, so token `t` of row `t` is its query; the other rows are prefill chunks. Padding rows point at the
    null slot; padding tokens write to the null block (block 0), which nothing reads.

    The keys and values of the step's own tokens are in the cache before attention runs, so a row attends to cache
    positions `0..kv_lens[row]-1`, causally: its query `i` of `n` sits at position `kv_lens[row] - n + i`.
    """

    num_decode_rows: int | None  # None in a captured step, which serves any number: then only `decode_rows` knows
    decode_rows: torch.Tensor  # [1] int32, the same on the device
    row_slots: torch.Tensor  # [rows] int32, the slot of each row
    query_start: torch.Tensor  # [rows + 1] int32, first token of each row; the last entry is the token count
    kv_lens: torch.Tensor  # [rows] int32, cached length of each row after this step (0 for padding rows)
    positions: torch.Tensor  # [tokens] int32, position of each token in its sequence
    cache_slots: torch.Tensor  # [tokens] int64, block * block_size + offset that the token's k and v are written to
    block_table: torch.Tensor  # [slots + 1, max_blocks] int32, the block ids of every slot, by position
    max_query_len: int  # upper bound of the prefill rows' query counts, known to the host
    max_kv_len: int  # upper bound of kv_lens, known to the host


class AttentionBackend(Protocol):
    """Computes attention for a step. One instance serves every layer; it may own workspaces, never the cache."""

    name: str

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Does once what every layer of the step needs. Runs inside a captured graph: device work only."""

    def attend(
        self,
        qkv: torch.Tensor,
        transform: QueryKeyTransform,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """From a layer's qkv product to attended values: normalises and rotates queries and keys, writes keys and
        values to the cache, and calls `forward` or does the same in one kernel.

        Args:
            qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim]; may be overwritten.
            transform: the layer's.

        Returns:
            As `forward`.
        """

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attends every token of the step to its sequence's cache.

        Args:
            query: [tokens, num_heads, head_dim], after q-norm and RoPE; heads of one token are contiguous, tokens
                may be strided (the query part of a fused qkv product).
            key_cache, value_cache: one layer's [num_blocks, block_size, num_kv_heads, head_dim].
            metadata: the step's rows; `prepare` was called with it.

        Returns:
            [tokens, num_heads, head_dim], contiguous, in the query's dtype. Rows of padding tokens hold any finite
            value.
        """


def write_keys_and_values(
    qkv: torch.Tensor,
    transform: QueryKeyTransform,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """The first half of `attend`, in one kernel of its own. Returns the queries, [tokens, num_heads, head_dim]."""
    return select(qkv.device).qk_norm_rope_cache(
        qkv, transform.q_weight, transform.k_weight, transform.eps, transform.cos_sin,
        metadata.positions, metadata.cache_slots, key_cache, value_cache,
    )  # fmt: skip
