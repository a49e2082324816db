"""The kernels that prepare a step and end it, and those that edit logits for requests that ask for it.

The former are launched once a step and move a few bytes a row, of one set of inputs: their time is what a kernel takes
at least, and they are here to show that it is no more. Those that edit read all logits, and the rows' tables, of which
there is one set as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernel_cases import BF16, HEAD_DIM, HEADS, KV_HEADS, VOCAB, Calls, Case, count_inputs, device
from worker.kernels import select
from worker.kernels.apply_changes import FIELDS
from worker.kernels.decode_schedule import DecodeWorkspace, schedule_decode
from worker.kernels.edit_logits import HAS_ALLOWED, HAS_LISTS, HAS_PENALTIES, HEADER_SIZE, EditTables
from worker.kernels.prefill_schedule import PrefillWorkspace, schedule_prefill

_ROWS = (1, 64, 512)
_BLOCKS = 256  # of a row, of 16 tokens each
_NUM_BIASES, _NUM_WORDS = 8, 4  # of a row that is edited


def step_cases() -> Iterator[Case]:
    for rows in _ROWS:
        yield from planning_cases(rows)
        yield from ending_cases(rows)
    for rows in (1, 64):
        yield from editing_cases(rows, VOCAB)


def planning_cases(rows: int) -> Iterator[Case]:
    """What brings a step's changes to the slots, finds its rows' places and shares out attention's work."""
    ops, shape = select(device()), f"{rows} rows"
    row_slots, starts = _range(rows), _range(rows + 1)
    seq_lens = torch.randint(1, 16 * _BLOCKS, (rows + 1,), dtype=torch.int32)
    table = torch.randint(0, 9999, (rows + 1, _BLOCKS), dtype=torch.int32)
    positions, lens = torch.empty(2, rows, dtype=torch.int32)
    slots = torch.empty(rows, dtype=torch.int64)
    decode_rows, no_rows = torch.tensor([rows], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    last_token, token_ids = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    metadata = partial(
        ops.step_metadata, row_slots, starts, decode_rows, seq_lens, last_token, table, 16, token_ids, positions,
        slots, lens,
    )  # fmt: skip
    yield Case("step_metadata", shape, 36.0 * rows, 0, [metadata], [])
    # A new block for each row, as a step of decodes brings at most.
    changes = torch.cat([torch.tensor([0, rows], dtype=torch.int32), _range(rows) * _BLOCKS, _range(rows)])
    tables = [torch.zeros(rows + 1, dtype=torch.int32) for _ in range(2)]
    tables += [torch.zeros(rows + 1) for _ in range(3)]
    tables.append(torch.zeros(rows + 1, dtype=torch.int64))
    yield Case(
        "apply_changes", f"{rows} blocks", 12.0 * rows, 0, [partial(ops.apply_changes, changes, table, *tables)], []
    )
    # Requests with nothing cached and no block yet.
    fields = torch.zeros(rows, FIELDS, dtype=torch.int32)
    fields[:, 0] = row_slots
    changes = torch.cat([torch.tensor([rows, 0], dtype=torch.int32), fields.view(-1)])
    calls: Calls = [partial(ops.apply_changes, changes, table, *tables)]
    yield Case("apply_changes", f"{rows} requests", 60.0 * rows, 0, calls, [])

    decoding = DecodeWorkspace.create(
        max_rows=rows, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=BF16, device=device()
    )
    calls = [partial(schedule_decode, row_slots, seq_lens, decode_rows, rows, decoding)]
    yield Case("schedule_decode", shape, 40.0 * rows, 0, calls, [])
    tokens, lens = 16 * rows, seq_lens[:rows] + 16
    prefilling = PrefillWorkspace.create(
        max_rows=rows, max_tokens=tokens, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=BF16,
        device=device(),
    )  # fmt: skip
    calls = [partial(schedule_prefill, row_slots, starts * 16, lens, no_rows, tokens, 0, 0, prefilling)]
    yield Case("schedule_prefill", f"{rows} rows of 16", 40.0 * rows, 0, calls, [])


def ending_cases(rows: int) -> Iterator[Case]:
    """What keeps lengths and tokens for the next step."""
    ops, shape, row_slots = select(device()), f"{rows} rows", _range(rows)
    by_slot, by_row = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(2, rows, dtype=torch.int32)
    yield Case(
        "commit_lengths", shape, 12.0 * rows, 0, [partial(ops.commit_lengths, row_slots, by_row[0], by_slot)], []
    )
    calls: Calls = [partial(ops.commit_tokens, row_slots, by_row[0], by_slot, by_row[1])]
    yield Case("commit_tokens", shape, 16.0 * rows, 0, calls, [])


def editing_cases(rows: int, vocab: int) -> Iterator[Case]:
    """Logits of rows that all have penalties, allowed tokens, biases and bad words, and counting what was drawn."""
    ops, shape, row_slots = select(device()), f"{rows} rows", _range(rows)
    tables = EditTables.allocate(rows, vocab, _NUM_BIASES, _NUM_WORDS, device())
    applies = HAS_PENALTIES | HAS_ALLOWED | HAS_LISTS
    header = torch.zeros(HEADER_SIZE, dtype=torch.int32)
    header[:6] = torch.tensor([applies, 1, 0, 0, _NUM_BIASES, _NUM_WORDS])
    tables.headers[:rows] = header
    tables.penalties[:rows] = torch.tensor([1.1, 0.1, 0.1, 0.0])
    tables.bias_ids[:rows] = torch.randperm(vocab)[:_NUM_BIASES].int()
    tables.biases[:rows] = 1.0
    tables.bad_words.fill_(-1)[..., -1] = 1
    tables.allowed.fill_(-1)
    tables.counts[:rows] = torch.randint(0, 2, (rows, vocab)).to(torch.int16)
    # Logits are read in bf16 and written in fp32; a count has 2 bytes, and whether a token is allowed is a bit.
    size = rows * vocab * (2 + 4 + 2 + 1 / 8)
    inputs = torch.randn(count_inputs(size), rows, vocab, dtype=BF16)
    positions = torch.full((rows,), 100, dtype=torch.int32)
    yield Case(
        "edit_logits", shape, size, 0, [partial(ops.edit_logits, x, row_slots, positions, tables) for x in inputs], []
    )
    record = partial(ops.record_tokens, row_slots, positions, torch.zeros(rows, dtype=torch.int32), tables)
    yield Case("record_tokens", shape, 20.0 * rows, 0, [record], [])


def _range(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)
