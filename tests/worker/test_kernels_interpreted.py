"""The fused Triton kernels agree with their references, in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process: test_kernels.py runs this file in one of
its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py in Triton's interpreter", allow_module_level=True)

from worker.kernels import ops
from worker.kernels.gumbel_sample import gumbel_noise

KERNELS, REFERENCES = ops.TRITON, ops.REFERENCE


def test_the_interpreter_selects_the_kernels() -> None:
    assert ops.select("cpu") is KERNELS


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (5, 100), (3, 1024), (0, 64)])
def test_rms_norm(tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, 2 * hidden)[:, :hidden]
    weight = torch.randn(hidden)
    torch.testing.assert_close(KERNELS.rms_norm(x, weight, 1e-6), REFERENCES.rms_norm(x, weight, 1e-6))
    residual = torch.randn(tokens, hidden)
    expected_residual = residual.clone()
    expected = REFERENCES.add_rms_norm(x, expected_residual, weight, 1e-6)
    torch.testing.assert_close(KERNELS.add_rms_norm(x, residual, weight, 1e-6), expected)
    torch.testing.assert_close(residual, expected_residual)


@pytest.mark.parametrize(("tokens", "intermediate"), [(1, 64), (3, 1500), (0, 64)])
def test_silu_mul(tokens: int, intermediate: int) -> None:
    gate_up = torch.randn(tokens, 2 * intermediate) * 3
    torch.testing.assert_close(KERNELS.silu_mul(gate_up), REFERENCES.silu_mul(gate_up))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 64), (4, 1, 128), (8, 1, 64), (5, 1, 128)]
)
def test_qk_norm_rope_cache(heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    tokens, block_size = 7, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 32)[:, :-32]
    q_weight, k_weight = (torch.randn(head_dim), torch.randn(head_dim)) if norm else (None, None)
    angles = torch.randn(50, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    cache_slots = torch.randperm(5 * block_size)[:tokens]
    results = []
    for implementation in (KERNELS, REFERENCES):
        own = qkv.clone()
        caches = torch.full((2, 5, block_size, kv_heads, head_dim), -7.0)
        query = implementation.qk_norm_rope_cache(
            own, q_weight, k_weight, 1e-6, cos_sin, positions, cache_slots, caches[0], caches[1]
        )
        assert query.data_ptr() == own.data_ptr()
        assert query.shape == (tokens, heads, head_dim)
        results.append((own, caches))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("query_lens", "padding", "null_rows"),
    [
        ([1], 0, []),
        ([1, 1, 1, 1], 3, [2, 3]),
        ([3, 0, 17, 1, 0], 200, [4]),
        ([5, 2], 0, [1]),
        ([130, 140], 1, []),
    ],
)
def test_step_metadata(query_lens: list[int], padding: int, null_rows: list[int]) -> None:
    rows, block_size = len(query_lens), 16
    row_slots = torch.randperm(rows + 2)[:rows].int()
    row_slots[null_rows] = rows + 2
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    seq_lens = torch.randint(0, 60, (rows + 3,), dtype=torch.int32)
    block_table = torch.randint(1, 99, (rows + 3, 20), dtype=torch.int32)
    tokens = sum(query_lens) + padding
    results = []
    for implementation in (KERNELS, REFERENCES):
        positions = torch.full((tokens,), -9, dtype=torch.int32)
        cache_slots = torch.full((tokens,), -9, dtype=torch.int64)
        kv_lens = torch.full((rows,), -9, dtype=torch.int32)
        implementation.step_metadata(
            row_slots, query_start, seq_lens, block_table, block_size, positions, cache_slots, kv_lens
        )
        results.append((positions, cache_slots, kv_lens))
    for row, count in enumerate(query_lens):  # what it should be, said without either implementation
        live = row not in null_rows and count > 0
        cached = int(seq_lens[row_slots[row]])
        assert results[0][2][row] == (cached + count if live else 0)
        for i in range(count):
            token = int(query_start[row]) + i
            assert results[0][0][token] == (cached + i if live else 0)
            block = int(block_table[row_slots[row], (cached + i) // block_size])
            slot = block * block_size + (cached + i) % block_size if live else token % block_size
            assert results[0][1][token] == slot
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [10, 512, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample(vocab: int, dtype: torch.dtype) -> None:
    rows = 8
    logits = (torch.randn(rows, vocab + 5) * 2).to(dtype)[:, :vocab]
    logits[1, vocab // 2] = float("nan")
    logits[2] = -float("inf")
    logits[3, 1:] = -float("inf")
    logits[4, [3, 7]] = 50.0  # a tie: the lowest index wins
    logits[5, 2] = float("inf")
    row_slots = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
    temperature = torch.tensor([1.0, 0.7, 0.9, 1.3, 0.0, 1.0, 0.6, 1.0, 0.0])
    seeds = torch.tensor([1, 2, 3, -4, 5, 6, 2**62 + 11, 2**33, 0])
    positions = torch.arange(100, 100 + rows, dtype=torch.int32)
    token = KERNELS.sample(logits, row_slots, temperature, seeds, positions)
    torch.testing.assert_close(token, REFERENCES.sample(logits, row_slots, temperature, seeds, positions))
    assert token.dtype == torch.int32
    assert token[1:6].tolist() == [-1, -1, 0, 3, -1]
    greedy = KERNELS.argmax_sample(logits)
    torch.testing.assert_close(greedy, REFERENCES.argmax_sample(logits))
    torch.testing.assert_close(greedy, KERNELS.sample(logits, row_slots, temperature * 0, seeds, positions))


def test_the_kernel_adds_the_noise_that_the_reference_states() -> None:
    """With equal logits the token is the arg-max of the noise alone, at every position."""
    rows, vocab = 64, 1000
    slots = torch.arange(rows, dtype=torch.int32)
    seeds = torch.arange(rows + 1) * 7_000_000_007
    positions = torch.arange(rows, dtype=torch.int32) * 31
    token = KERNELS.sample(torch.zeros(rows, vocab), slots, torch.ones(rows + 1), seeds, positions)
    assert torch.equal(token.long(), gumbel_noise(seeds[:-1], positions, vocab).argmax(-1))
