"""Attention in plain torch: the CPU's path, and the reference that the kernels are compared with.

Correct on any device, eager only: it reads the step's lengths on the host once, in `prepare`, so it cannot be
captured in a CUDA graph. Decode rows are gathered in groups of similar length and attended as one batch each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.attention.interface import AttentionMetadata, write_keys_and_values
from worker.kernels.qk_norm_rope import QueryKeyTransform

# A group of decode rows ends where the next row is shorter than this share of the group's longest: a lower share
# makes fewer, larger products of more padding.
_GROUP_SHARE = 0.7
# Most cache slots gathered at once: what is gathered is read right after, so it should still be in the CPU's cache.
_GROUP_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows of similar length, gathered as one padded batch."""

    rows: torch.Tensor  # [group] int64
    tokens: torch.Tensor  # [group * longest] int64, cache slot of each position; padding repeats the first
    bias: torch.Tensor | None  # [group, 1, 1, longest], 0 or -inf, in the query's dtype; None without padding


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    """One row of several query tokens."""

    start: int
    end: int
    tokens: torch.Tensor  # [kv_len] int64, the cache slot of each position
    mask: torch.Tensor | None  # [queries, kv_len] bool; None where causality is the plain square one


class TorchAttention:
    """Attention by gathering keys and values and calling torch's scaled_dot_product_attention."""

    name = "torch"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.dtype = dtype
        self._decode: list[_DecodeGroup] = []
        self._prefill: list[_PrefillRow] = []
        self._covered = 0  # tokens that some group or row writes
        self._buffer: torch.Tensor | None = None  # gathered keys and values; kept, as fresh pages are slow

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Plans the step's groups and the cache slots that each reads; synchronises on a GPU."""
        kv_lens = metadata.kv_lens.tolist()
        starts = metadata.query_start.tolist()
        decode = metadata.num_decode_rows
        assert decode is not None, "this backend runs eagerly"
        live = [row for row in range(decode) if kv_lens[row] > 0]
        live.sort(key=kv_lens.__getitem__)
        self._decode = []
        while live:
            longest = kv_lens[live[-1]]
            first = next(i for i, row in enumerate(live) if kv_lens[row] >= _GROUP_SHARE * longest)
            first = max(first, len(live) - max(1, _GROUP_TOKENS // longest))
            self._decode.append(self._group(live[first:], [kv_lens[row] for row in live[first:]], metadata))
            del live[first:]
        self._prefill = [
            self._row(row, starts[row], starts[row + 1], kv_lens[row], metadata)
            for row in range(decode, len(kv_lens))
            if starts[row + 1] > starts[row] and kv_lens[row] > 0
        ]
        self._covered = sum(len(group.rows) for group in self._decode)
        self._covered += sum(row.end - row.start for row in self._prefill)

    def _cache_slots(self, slots: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        blocks = table[slots.long()[:, None], positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def _group(self, rows: list[int], lens: list[int], metadata: AttentionMetadata) -> _DecodeGroup:
        device = metadata.kv_lens.device
        row = torch.tensor(rows, device=device)
        kv_lens = torch.tensor(lens, device=device)[:, None]
        positions = torch.arange(max(lens), device=device)[None, :]
        padding = positions >= kv_lens
        # Padding reads the row's own first token: what lies past a row's end may be another request's NaN, and
        # 0 * NaN would reach the output.
        positions = positions.masked_fill(padding, 0)
        tokens = self._cache_slots(metadata.row_slots[row], positions, metadata.block_table)
        bias = None
        if min(lens) < max(lens):
            bias = torch.zeros(padding.shape, dtype=self.dtype, device=device)
            bias = bias.masked_fill_(padding, float("-inf"))[:, None, None, :]
        return _DecodeGroup(rows=row, tokens=tokens.flatten(), bias=bias)

    def _gather(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at cache slots `tokens`, each [tokens, num_kv_heads, head_dim]; valid until the next call."""
        width = self.num_kv_heads * self.head_dim
        if self._buffer is None or self._buffer.shape[1] < len(tokens):
            self._buffer = torch.empty((2, len(tokens), width), dtype=key_cache.dtype, device=key_cache.device)
        keys, values = self._buffer[0, : len(tokens)], self._buffer[1, : len(tokens)]
        torch.index_select(key_cache.view(-1, width), 0, tokens, out=keys)
        torch.index_select(value_cache.view(-1, width), 0, tokens, out=values)
        shape = (len(tokens), self.num_kv_heads, self.head_dim)
        return keys.view(shape), values.view(shape)

    def _row(self, row: int, start: int, end: int, kv_len: int, metadata: AttentionMetadata) -> _PrefillRow:
        positions = torch.arange(kv_len, device=metadata.kv_lens.device)
        tokens = self._cache_slots(metadata.row_slots[row : row + 1], positions[None, :], metadata.block_table)
        mask = None
        if end - start < kv_len:
            mask = positions[None, :] <= positions[kv_len - (end - start) :, None]
        return _PrefillRow(start=start, end=end, tokens=tokens.flatten(), mask=mask)

    def attend(
        self,
        qkv: torch.Tensor,
        transform: QueryKeyTransform,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        query = write_keys_and_values(qkv, transform, key_cache, value_cache, metadata)
        return self.forward(query, key_cache, value_cache, metadata)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._covered < query.shape[0]:
            out.zero_()
        scale = self.head_dim**-0.5
        for group in self._decode:
            rows = len(group.rows)
            # The heads that share a key/value head are the queries of one attention problem.
            q = query[group.rows].view(rows, self.num_kv_heads, -1, self.head_dim)
            k, v = self._gather(key_cache, value_cache, group.tokens)
            k = k.unflatten(0, (rows, -1)).transpose(1, 2)
            v = v.unflatten(0, (rows, -1)).transpose(1, 2)
            o = scaled_dot_product_attention(q, k, v, attn_mask=group.bias, scale=scale)
            out[group.rows] = o.reshape(rows, self.num_heads, self.head_dim)
        for row in self._prefill:
            q = query[row.start : row.end].transpose(0, 1)[None]
            k, v = self._gather(key_cache, value_cache, row.tokens)
            o = scaled_dot_product_attention(
                q,
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=row.mask,
                is_causal=row.mask is None,
                scale=scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
            out[row.start : row.end] = o[0].transpose(0, 1)
        return out
