"""Random paged batches, and attention computed densely in fp64, for tests and benchmarks of the backends.

The dense computation shares no code with any backend: it is what they are all compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.attention.interface import AttentionMetadata


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's attention problem."""

    query: torch.Tensor  # [tokens, num_heads, head_dim], part of a wider row, as in a fused qkv product
    key_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: torch.Tensor
    metadata: AttentionMetadata


def random_batch(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    num_decode_rows: int = 0,
    padding_tokens: int = 0,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PagedBatch:
    """A batch of rows with the given counts of query and cached tokens, whose blocks are scattered over the cache.

    Rows of kv_len 0 are padding and point at the null slot. Cache positions that no row covers, the null block
    among them, hold NaN, which must not reach any output.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(kv_lens)
    blocks = [-(-kv_len // block_size) for kv_len in kv_lens]
    num_blocks = sum(blocks) + 1
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).int()
    slots = torch.randperm(rows, generator=generator).int()
    table = torch.zeros((rows + 1, max(blocks) + 1), dtype=torch.int32)
    used = torch.zeros((num_blocks, block_size), dtype=torch.bool)
    taken = 0
    for row, count in enumerate(blocks):
        ids = order[taken : taken + count]
        table[slots[row], :count] = ids
        used[ids] = True
        if kv_lens[row] % block_size:
            used[ids[-1], kv_lens[row] % block_size :] = False
        taken += count
    slots[torch.tensor(kv_lens) == 0] = rows

    device_generator = torch.Generator(device).manual_seed(seed)
    shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
    cache = torch.randn(shape, generator=device_generator, device=device, dtype=dtype)
    cache.masked_fill_(~used.to(device)[None, :, :, None, None], float("nan"))
    tokens = sum(query_lens) + padding_tokens
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn((tokens, width), generator=device_generator, device=device, dtype=dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    metadata = AttentionMetadata(
        num_decode_rows=num_decode_rows,
        decode_rows=torch.tensor([num_decode_rows], dtype=torch.int32, device=device),
        row_slots=slots.to(device),
        query_start=starts.to(device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        positions=torch.zeros(tokens, dtype=torch.int32, device=device),
        cache_slots=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_table=table.to(device),
        max_query_len=max(query_lens[num_decode_rows:], default=0),
        max_kv_len=max(kv_lens),
    )
    query = qkv[:, : num_heads * head_dim].view(tokens, num_heads, head_dim)
    return PagedBatch(query, cache[0], cache[1], metadata)


def dense_attention(batch: PagedBatch) -> torch.Tensor:
    """Attention of the batch in fp64, row by row, zero for padding. Returns [tokens, heads, head_dim]."""
    metadata = batch.metadata
    block_size, num_kv_heads, head_dim = batch.key_cache.shape[1:]
    group = batch.query.shape[1] // num_kv_heads
    out = torch.zeros(batch.query.shape, dtype=torch.float64, device=batch.query.device)
    starts, kv_lens = metadata.query_start.tolist(), metadata.kv_lens.tolist()
    for row, kv_len in enumerate(kv_lens):
        start, stop = starts[row], starts[row + 1]
        if kv_len == 0 or start == stop:
            continue
        position = torch.arange(kv_len, device=out.device)
        block = metadata.block_table[int(metadata.row_slots[row])][position // block_size].long()
        key = batch.key_cache[block, position % block_size].double().repeat_interleave(group, dim=1)
        value = batch.value_cache[block, position % block_size].double().repeat_interleave(group, dim=1)
        score = torch.einsum("qhd,khd->hqk", batch.query[start:stop].double(), key) / head_dim**0.5
        future = position[None, :] > position[kv_len - (stop - start) :, None]
        weight = score.masked_fill(future, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weight, value)
    return out
