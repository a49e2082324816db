"""Positions, cache slots and lengths of a step, computed on the device from its rows.

The batch's state (block tables, cached lengths) lives on the device by slot; this turns the rows of one step into
what its kernels need, without the host. Each program handles a stretch of tokens and the rows of equal index.
"""

from __future__ import annotations

import torch

from worker.kernels._triton import cdiv, tl, triton

_BLOCK = 128


@triton.jit(
    do_not_specialize=["rows", "tokens", "null_slot", "search_steps"],
    do_not_specialize_on_alignment=[
        "row_slots_ptr",
        "query_start_ptr",
        "decode_rows_ptr",
        "seq_lens_ptr",
        "token_ids_ptr",
    ],
)
def _step_metadata_kernel(
    row_slots_ptr,
    query_start_ptr,
    decode_rows_ptr,
    seq_lens_ptr,
    last_token_ptr,
    block_table_ptr,
    token_ids_ptr,
    positions_ptr,
    cache_slots_ptr,
    kv_lens_ptr,
    rows,
    tokens,
    null_slot,
    search_steps,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    in_rows = index < rows
    slot = tl.load(row_slots_ptr + index, mask=in_rows, other=0)
    begin = tl.load(query_start_ptr + index, mask=in_rows, other=0)
    end = tl.load(query_start_ptr + index + 1, mask=in_rows, other=0)
    cached = tl.load(seq_lens_ptr + slot, mask=in_rows, other=0)
    live = (end > begin) & (slot != null_slot)
    tl.store(kv_lens_ptr + index, tl.where(live, cached + end - begin, 0), mask=in_rows)
    decodes = index < tl.load(decode_rows_ptr)
    tl.store(token_ids_ptr + index, tl.load(last_token_ptr + slot, mask=decodes, other=0), mask=decodes)

    # The row of a token is the last one that starts at or before it; empty rows before it start there as well.
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = tl.zeros((BLOCK,), dtype=tl.int32) + rows
    in_tokens = index < tokens
    for _ in range(search_steps):
        middle = (low + high) // 2
        start = tl.load(query_start_ptr + middle, mask=in_tokens, other=0)
        low = tl.where(start <= index, middle, low)
        high = tl.where(start <= index, high, middle)
    token_count = tl.load(query_start_ptr + rows)
    padding = index >= token_count
    row_start = tl.load(query_start_ptr + low, mask=in_tokens, other=0)
    slot = tl.load(row_slots_ptr + low, mask=in_tokens, other=0)
    padding = padding | (slot == null_slot)
    position = tl.load(seq_lens_ptr + slot, mask=in_tokens & (padding == 0), other=0) + index - row_start
    position = tl.where(padding, 0, position)
    block = tl.load(
        block_table_ptr + slot.to(tl.int64) * table_stride + position // BLOCK_SIZE,
        mask=in_tokens & (padding == 0),
        other=0,
    )
    offset = tl.where(padding, index % BLOCK_SIZE, position % BLOCK_SIZE)
    tl.store(positions_ptr + index, position, mask=in_tokens)
    tl.store(cache_slots_ptr + index, block.to(tl.int64) * BLOCK_SIZE + offset, mask=in_tokens)


def step_metadata(
    row_slots: torch.Tensor,
    query_start: torch.Tensor,
    decode_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    last_token: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    cache_slots: torch.Tensor,
    kv_lens: torch.Tensor,
) -> None:
    """Writes where each token of the step stands in its sequence and in the cache, and which tokens decode rows have.

    Token `t` of row `r` stands at position `seq_lens[row_slots[r]] + t - query_start[r]`. Padding tokens (past the
    last row, or in a row of the null slot, which is the last slot) get position 0 and a place in block 0, which
    nothing reads. Moves about 20 bytes a token and 16 a row, from the L2; latency decides.

    Args:
        row_slots: [rows] int32.
        query_start: [rows + 1] int32, ascending.
        decode_rows: [1] int32, how many rows, the first ones, compute their slot's last token.
        seq_lens: [slots + 1] int32, cached length of each slot before the step.
        last_token: [slots + 1] int32.
        block_table: [slots + 1, max_blocks] int32.
        block_size: tokens a block, a power of two.
        token_ids: [tokens] int32, written for the decode rows' tokens, which come first.
        positions: [tokens] int32, written.
        cache_slots: [tokens] int64, written.
        kv_lens: [rows] int32, written: cached length after the step, 0 for rows without tokens or of the null slot.
    """
    rows, tokens = row_slots.shape[0], positions.shape[0]
    _step_metadata_kernel[(cdiv(max(rows, tokens, 1), _BLOCK),)](
        row_slots,
        query_start,
        decode_rows,
        seq_lens,
        last_token,
        block_table,
        token_ids,
        positions,
        cache_slots,
        kv_lens,
        rows,
        tokens,
        seq_lens.shape[0] - 1,
        rows.bit_length(),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def step_metadata_reference(
    row_slots: torch.Tensor,
    query_start: torch.Tensor,
    decode_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    last_token: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    cache_slots: torch.Tensor,
    kv_lens: torch.Tensor,
) -> None:
    """`step_metadata` in plain torch, for any device."""
    null_slot = seq_lens.shape[0] - 1
    decode = int(decode_rows)
    token_ids[:decode] = last_token[row_slots[:decode]]
    counts = query_start[1:] - query_start[:-1]
    live = (counts > 0) & (row_slots != null_slot)
    kv_lens.copy_(torch.where(live, seq_lens[row_slots] + counts, 0))

    token = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    row = torch.searchsorted(query_start, token, right=True) - 1
    in_row = row < row_slots.shape[0]
    row = row.clamp(max=row_slots.shape[0] - 1)
    slot = row_slots[row]
    padding = ~in_row | (slot == null_slot)
    position = torch.where(padding, 0, seq_lens[slot] + token - query_start[row])
    positions.copy_(position)
    block = torch.where(padding, 0, block_table[slot, position // block_size])
    cache_slots.copy_(block.long() * block_size + torch.where(padding, token, position) % block_size)
