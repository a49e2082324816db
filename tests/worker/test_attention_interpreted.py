"""The Triton attention kernels agree with dense fp64 attention and their references, in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process: test_kernels.py runs this file in one of
its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py in Triton's interpreter", allow_module_level=True)

from worker.attention import QueryKeyTransform, create_backend
from worker.attention.testing import PagedBatch, dense_attention, random_batch
from worker.kernels import decode_schedule, prefill_schedule
from worker.kernels._triton import cdiv
from worker.kernels.attention_decode import paged_decode_attention, paged_decode_attention_reference
from worker.kernels.attention_prefill import paged_prefill_attention, paged_prefill_attention_reference
from worker.kernels.decode_schedule import DecodeWorkspace, schedule_decode
from worker.kernels.prefill_schedule import PrefillWorkspace, schedule_prefill

SHAPES = [  # heads, key/value heads, head_dim, block_size
    (2, 2, 64, 16),
    (4, 2, 64, 64),
    (4, 1, 128, 32),
    (8, 1, 128, 256),
    (5, 1, 64, 16),
]

DECODE = {
    "one token": [1],
    "block and tile boundaries": [15, 16, 17, 63, 64, 65, 128, 129],
    "one long row among short ones": [900, 1, 9, 10, 11, 100],
    "padding rows": [20, 0, 33, 0],
    "only padding": [0, 0],
    "one long row": [1300],
}

PREFILL = {  # query lengths, cached lengths, decode rows before them, padding tokens
    "one token": ([1], [1], 0, 0),
    "prompts": ([16, 1, 33, 65], [16, 1, 33, 65], 0, 0),
    "chunk after a cached prefix": ([5, 70], [21, 199], 0, 3),
    "decode rows first": ([1, 1, 7, 1, 40], [64, 3, 7, 30, 57], 2, 0),
    "padding rows and tokens": ([8, 0, 3, 0], [8, 0, 19, 0], 0, 90),
    "null rows with tokens": ([8, 2, 40], [8, 0, 0], 0, 0),
}


def assert_agrees(out: torch.Tensor, batch: PagedBatch, first: int = 0) -> None:
    torch.testing.assert_close(out[first:].double(), dense_attention(batch)[first:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lens", DECODE)
def test_decode_kernel_and_reference_agree_with_dense_attention(lens: str, shape: tuple[int, int, int, int]) -> None:
    kv_lens = DECODE[lens]
    rows = len(kv_lens)
    heads, kv_heads, head_dim, block_size = shape
    batch = random_batch(
        [1] * rows,
        kv_lens,
        num_decode_rows=rows,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )
    metadata = batch.metadata
    workspace = DecodeWorkspace.create(
        max_rows=rows + 5,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    schedule_decode(metadata.row_slots, metadata.kv_lens, metadata.decode_rows, rows, workspace)
    count = int(workspace.num_items)
    config, splits = workspace.plan(rows)
    assert rows <= count <= rows + splits
    items = workspace.items[:count]
    assert int((items[:, 2] - items[:, 1]).sum()) == sum(kv_lens)
    if max(kv_lens) > 2 * config.min_chunk:
        assert count > rows  # the long row is shared out
    for _ in range(2):  # the counters that the first launch leaves serve the second
        out = torch.full((rows, heads, head_dim), float("nan"))
        paged_decode_attention(
            batch.query,
            batch.key_cache,
            batch.value_cache,
            metadata.block_table,
            workspace,
            head_dim**-0.5,
            out,
        )
        assert_agrees(out, batch)
        assert not workspace.arrived.any()
    reference = torch.full_like(out, float("nan"))
    paged_decode_attention_reference(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        metadata.block_table,
        metadata.row_slots,
        metadata.kv_lens,
        head_dim**-0.5,
        reference,
    )
    assert_agrees(reference, batch)


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 200])
def test_items_for_the_kernel_of_hopper(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That kernel is tested on a GPU; how rows are cut for it is, here."""
    monkeypatch.setattr(decode_schedule, "capability_and_processors", lambda device: ((9, 0), 132))
    monkeypatch.setattr(decode_schedule, "HAS_GLUON", True)
    workspace = DecodeWorkspace.create(
        max_rows=256, num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert workspace.most_fused_rows == 256
    config, splits = workspace.plan(rows, fused=True)
    assert config.for_hopper
    assert not workspace.plan(rows)[0].for_hopper
    kv_lens = torch.tensor([(0, 1, config.whole_row, config.whole_row + 1, 5000)[row % 5] for row in range(rows)][::-1])
    slots = torch.arange(rows, dtype=torch.int32).flip(0)
    schedule_decode(slots, kv_lens.int(), torch.tensor([rows], dtype=torch.int32), rows, workspace, fused=True)
    count = int(workspace.num_items)
    assert rows <= count <= rows + splits
    items = workspace.items[:count].tolist()
    sizes = [end - start for _, start, end, *_ in items]
    # Longest first, as far as tiles tell.
    tiles = [-(-size // config.tile) for size in sizes]
    firsts = [tiles[item[4]] for item in items]
    assert firsts == sorted(firsts, reverse=True)
    for row in range(rows):
        mine = [(index, item) for index, item in enumerate(items) if item[3] == row]
        length = int(kv_lens[row])
        assert all(item[0] == int(slots[row]) and item[4:7] == [mine[0][0], len(mine), length] for _, item in mine)
        bounds = [bound for _, item in mine for bound in item[1:3]]
        assert bounds[0] == 0
        assert bounds[-1] == length
        assert bounds[1:-1:2] == bounds[2::2]
        assert all(start % config.tile == 0 for start in bounds[::2])
        if length <= config.whole_row:
            assert len(mine) == 1
        elif length == 5000:
            assert (len(mine) > 1) == (rows < 200)  # there are rows enough for all programs


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lens", DECODE)
def test_fused_decode_does_what_two_kernels_do(lens: str, shape: tuple[int, int, int, int], norm: bool) -> None:
    """From the raw product, in one kernel: the same attention, the same keys and values in the cache."""
    kv_lens = DECODE[lens]
    rows = len(kv_lens)
    heads, kv_heads, head_dim, block_size = shape
    batch = random_batch(
        [1] * rows, kv_lens, num_decode_rows=rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        block_size=block_size,
    )  # fmt: skip
    metadata = batch.metadata
    live = metadata.kv_lens > 0
    metadata.positions = (metadata.kv_lens - 1).clamp(min=0)
    blocks = metadata.block_table[metadata.row_slots.long(), metadata.positions.long() // block_size]
    offsets = torch.where(live, metadata.positions % block_size, torch.arange(rows) % block_size)
    metadata.cache_slots = torch.where(live, blocks.long(), 0) * block_size + offsets
    angles = torch.randn(2000, head_dim // 2) * 6
    weights = torch.randn(2, head_dim).unbind() if norm else (None, None)
    transform = QueryKeyTransform(*weights, 1e-6, torch.cat((angles.cos(), angles.sin()), dim=-1))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim)
    outs, caches = [], []
    for name in ("triton", "torch"):
        backend = create_backend(
            name, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, max_rows=rows,
            max_tokens=rows, max_blocks_per_row=metadata.block_table.shape[1], device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        cache = torch.stack([batch.key_cache, batch.value_cache])
        backend.prepare(metadata)
        outs.append(backend.attend(qkv.clone(), transform, cache[0], cache[1], metadata))
        caches.append(cache[:, 1:])  # block 0 is written by padding rows
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(caches[0], caches[1], atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("step", PREFILL)
def test_a_step_whose_mixture_only_the_device_knows(step: str) -> None:
    """As a captured mixed step: the host knows the sizes alone, rows and tokens are padded."""
    query_lens, kv_lens, decode, padding = PREFILL[step]
    batch = random_batch([*query_lens, 0, 0], [*kv_lens, 0, 0], num_decode_rows=decode, padding_tokens=padding + 7)
    batch.metadata.num_decode_rows = None
    backend = create_backend(
        "triton", num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, max_rows=len(query_lens) + 2,
        max_tokens=batch.query.shape[0], max_blocks_per_row=batch.metadata.block_table.shape[1],
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    backend.prepare(batch.metadata)
    assert_agrees(backend.forward(batch.query, batch.key_cache, batch.value_cache, batch.metadata), batch)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", PREFILL)
def test_prefill_kernel_and_reference_agree_with_dense_attention(step: str, shape: tuple[int, int, int, int]) -> None:
    query_lens, kv_lens, decode, padding = PREFILL[step]
    heads, kv_heads, head_dim, block_size = shape
    batch = random_batch(
        query_lens,
        kv_lens,
        num_decode_rows=decode,
        padding_tokens=padding,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )
    metadata = batch.metadata
    out = torch.full((batch.query.shape[0], heads, head_dim), float("nan"))
    paged_prefill_attention_reference(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        metadata.block_table,
        metadata.row_slots,
        metadata.query_start,
        metadata.kv_lens,
        metadata.decode_rows,
        head_dim**-0.5,
        out,
    )
    for result in (out, prefill_attention(batch, decode)[0]):
        assert result[:decode].isnan().all()  # the decode rows are not its to write
        assert_agrees(result, batch, decode)


def prefill_attention(batch: PagedBatch, decode: int = 0) -> tuple[torch.Tensor, PrefillWorkspace]:
    """The kernel's result, NaN where it writes nothing, and the workspace that it used."""
    tokens, heads, head_dim = batch.query.shape
    metadata = batch.metadata
    workspace = PrefillWorkspace.create(
        max_rows=len(metadata.row_slots),
        max_tokens=tokens,
        num_heads=heads,
        num_kv_heads=batch.key_cache.shape[2],
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    schedule_prefill(
        metadata.row_slots,
        metadata.query_start,
        metadata.kv_lens,
        metadata.decode_rows,
        tokens,
        decode,
        decode,
        workspace,
    )
    out = torch.full((tokens, heads, head_dim), float("nan"))
    caches = batch.key_cache, batch.value_cache
    paged_prefill_attention(batch.query, *caches, metadata.block_table, workspace, head_dim**-0.5, out, decode, decode)
    return out, workspace


@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [([8], [1500]), ([40, 8], [1000, 700]), ([70, 3, 20], [70, 900, 300])],
    ids=["one tile", "tiles and rows", "whole and shared tiles"],
)
def test_programs_share_prefill_equally(
    query_lens: list[int], kv_lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long cache is read by all programs, wherever their shares begin and end."""
    monkeypatch.setattr(prefill_schedule, "_SHARING_COST", 0)
    monkeypatch.setattr(prefill_schedule, "_PART_COST", 0)
    batch = random_batch(query_lens, kv_lens, num_heads=2, num_kv_heads=1)
    out, workspace = prefill_attention(batch)
    assert_agrees(out, batch)
    config, programs = workspace.launch(sum(query_lens), sum(query_lens))
    tokens = config.tokens(2)
    work = 0
    for length, kv_len in zip(query_lens, kv_lens, strict=True):
        for first in range(0, length, tokens):
            work += cdiv(min(kv_len, kv_len - length + first + tokens), config.tile) * config.tile
    shares = int(workspace.plan[1])
    begins, ends = workspace.shares[:shares, 1].tolist(), workspace.shares[:shares, 2].tolist()
    assert begins == [0, *ends[:-1]]
    assert ends[-1] == work
    sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
    assert max(sizes) <= max(256, 1.25 * work / programs)
    assert workspace.arrived.eq(0).all()
    assert workspace.plan[2:].eq(0).all()


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "decode", "padding"),
    [([8], [1500], 0, 0), ([1, 1, 70, 3, 20], [9, 400, 70, 900, 300], 2, 40), ([1], [5], 1, 0)],
    ids=["one tile", "mixed and padded", "nothing to attend"],
)
def test_tiles_of_a_kernel_that_cannot_combine_parts_are_never_shared(
    query_lens: list[int], kv_lens: list[int], decode: int, padding: int
) -> None:
    """What the kernel in Gluon is told, which the interpreter cannot run: every tile once, a row's last one first."""
    batch = random_batch(
        query_lens, kv_lens, num_decode_rows=decode, padding_tokens=padding, num_heads=2, num_kv_heads=1
    )
    metadata, num_tokens = batch.metadata, batch.query.shape[0]
    made = PrefillWorkspace.create(max_rows=8, max_tokens=num_tokens, num_heads=2, num_kv_heads=1, head_dim=64,
                                   dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
    whole = replace(made.large, whole_tiles=True)
    workspace = replace(made, small=whole, large=whole)
    schedule_prefill(
        metadata.row_slots,
        metadata.query_start,
        metadata.kv_lens,
        metadata.decode_rows,
        num_tokens,
        0,
        len(query_lens),
        workspace,
    )
    tokens = whole.tokens(2)
    expected = []
    stop = decode
    for slot, length, kv_len in zip(
        [*metadata.row_slots.tolist()[decode:], 0], [*query_lens[decode:], padding], [*kv_lens[decode:], 0], strict=True
    ):
        start, stop = stop, stop + length
        shift = kv_len - stop
        for first in reversed(range(start, stop, tokens)):
            expected.append([slot, first, stop, shift, max(min(first + tokens + shift, kv_len), 0)])
    assert workspace.plan[1:].tolist() == [len(expected), 0, 0]
    assert workspace.tiles[: len(expected), 2:].tolist() == expected


def test_prefill_of_many_tokens_uses_the_large_tile() -> None:
    batch = random_batch([200, 100], [200, 150], num_heads=8, num_kv_heads=4)
    out, workspace = prefill_attention(batch)
    assert workspace.launch(300, 300)[0] == workspace.large != workspace.small
    assert_agrees(out, batch)


@pytest.mark.parametrize("step", PREFILL)
def test_triton_backend_agrees_with_dense_attention(step: str) -> None:
    query_lens, kv_lens, decode, padding = PREFILL[step]
    batch = random_batch(query_lens, kv_lens, num_decode_rows=decode, padding_tokens=padding)
    backend = create_backend(
        "triton",
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        max_rows=16,
        max_tokens=256,
        max_blocks_per_row=99,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    backend.prepare(batch.metadata)
    assert_agrees(backend.forward(batch.query, batch.key_cache, batch.value_cache, batch.metadata), batch)
