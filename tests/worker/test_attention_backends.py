"""The torch backend agrees with dense fp64 attention, and the backends are made by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from worker.attention import BACKENDS, create_backend
from worker.attention.testing import PagedBatch, dense_attention, random_batch

SHAPES = [(2, 2, 64), (4, 2, 64), (4, 1, 128), (8, 1, 64), (10, 2, 64)]  # heads, key/value heads, head_dim

# query lengths, cached lengths, decode rows, padding tokens
STEPS = {
    "one token": ([1], [1], 1, 0),
    "block boundaries": ([1, 1, 1, 1], [15, 16, 17, 32], 4, 0),
    "one long row among short ones": ([1] * 6, [500, 1, 9, 10, 11, 100], 6, 0),
    "padding rows": ([1, 1, 1], [20, 0, 0], 3, 0),
    "prompts": ([16, 1, 33], [16, 1, 33], 0, 0),
    "chunk after a cached prefix": ([5, 20], [21, 84], 0, 3),
    "decode and prefill": ([1, 1, 7, 1, 40], [64, 3, 7, 30, 57], 2, 6),
    "empty prefill rows": ([1, 8, 0, 3, 0], [9, 8, 0, 19, 0], 1, 4),
}


def backend_output(batch: PagedBatch, name: str = "torch") -> torch.Tensor:
    _, block_size, num_kv_heads, head_dim = batch.key_cache.shape
    backend = create_backend(
        name,
        num_heads=batch.query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        max_rows=len(batch.metadata.row_slots) + 3,
        max_tokens=batch.query.shape[0],
        max_blocks_per_row=batch.metadata.block_table.shape[1],
        device=batch.query.device,
        dtype=batch.query.dtype,
    )
    backend.prepare(batch.metadata)
    out = backend.forward(batch.query, batch.key_cache, batch.value_cache, batch.metadata)
    assert out.shape == batch.query.shape
    assert out.dtype == batch.query.dtype
    assert out.is_contiguous()
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_torch_backend_agrees_with_dense_attention(step: str, shape: tuple[int, int, int]) -> None:
    query_lens, kv_lens, decode, padding = STEPS[step]
    heads, kv_heads, head_dim = shape
    batch = random_batch(
        query_lens,
        kv_lens,
        num_decode_rows=decode,
        padding_tokens=padding,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )
    out = backend_output(batch)
    torch.testing.assert_close(out.double(), dense_attention(batch), atol=1e-5, rtol=0)


def test_torch_backend_groups_rows_of_any_length() -> None:
    kv_lens = [1 + (37 * row) % 700 for row in range(40)]
    batch = random_batch([1] * 40, kv_lens, num_decode_rows=40, block_size=256)
    torch.testing.assert_close(backend_output(batch).double(), dense_attention(batch), atol=1e-5, rtol=0)


def test_torch_backend_in_bf16_is_as_good_as_bf16() -> None:
    batch = random_batch([1, 1, 9], [300, 5, 40], num_decode_rows=2, dtype=torch.bfloat16)
    expected = dense_attention(batch)
    error = (backend_output(batch).double() - expected).norm() / expected.norm()
    assert error < 5e-3


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown.*torch, triton, flash_attn"):
        create_backend(
            "fast",
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            block_size=16,
            max_rows=1,
            max_tokens=1,
            max_blocks_per_row=1,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    assert BACKENDS == ("torch", "triton", "flash_attn")


def make_flash_attn(block_size: int) -> None:
    create_backend(
        "flash_attn",
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=block_size,
        max_rows=1,
        max_tokens=1,
        max_blocks_per_row=1,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


def test_flash_attn_refuses_a_block_size_it_cannot_page() -> None:
    with pytest.raises(ValueError, match=r"block_size=16.*multiple of 256"):
        make_flash_attn(16)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_missing_flash_attn_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="pip install flash-attn"):
        make_flash_attn(256)


def test_triton_refuses_a_block_size_that_is_no_power_of_two() -> None:
    with pytest.raises(ValueError, match="block_size=48"):
        create_backend(
            "triton",
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            block_size=48,
            max_rows=1,
            max_tokens=1,
            max_blocks_per_row=1,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
