"""On a GPU, in bf16: every fused kernel agrees with its reference, and replays from a CUDA graph exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from worker.kernels import ops

KERNELS, REFERENCES = ops.TRITON, ops.REFERENCE
BF16 = torch.bfloat16
TOKENS = [1, 3, 64, 512, 2048]


@pytest.fixture(autouse=True)
def _on_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def replay(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` returns when it is captured and replayed."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    return out


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two roundings to bf16."""
    torch.testing.assert_close(out.double(), expected.double(), atol=2e-2, rtol=1.6e-2)
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < 4e-3


@pytest.mark.parametrize("hidden", [1024, 2560, 5120])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rms_norm(tokens: int, hidden: int) -> None:
    x, residual = torch.randn(2, tokens, hidden, dtype=BF16)
    weight = torch.randn(hidden, dtype=BF16)
    out = KERNELS.rms_norm(x, weight, 1e-6)
    assert_close(out, REFERENCES.rms_norm(x.double().float(), weight.float(), 1e-6))
    assert torch.equal(out, replay(lambda: KERNELS.rms_norm(x, weight, 1e-6)))
    own, expected_residual = residual.clone(), residual.clone()
    out = KERNELS.add_rms_norm(x, own, weight, 1e-6)
    expected = REFERENCES.add_rms_norm(x, expected_residual, weight, 1e-6)
    assert torch.equal(own, expected_residual)
    assert_close(out, expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_silu_mul(tokens: int) -> None:
    gate_up = torch.randn(tokens, 2 * 3072, dtype=BF16)
    out = KERNELS.silu_mul(gate_up)
    assert_close(out, REFERENCES.silu_mul(gate_up.float()))
    assert torch.equal(out, replay(lambda: KERNELS.silu_mul(gate_up)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (4, 2, 64), (40, 8, 128)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_qk_norm_rope_cache(tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=BF16)
    q_weight, k_weight = torch.randn(2, head_dim, dtype=BF16) if norm else (None, None)
    angles = torch.randn(4096, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 4096, (tokens,), dtype=torch.int32)
    slots = torch.randperm(300 * 16)[:tokens]
    results = []
    for implementation, dtype in ((KERNELS, BF16), (REFERENCES, torch.float32)):
        own = qkv.to(dtype, copy=True)
        weights = [None if w is None else w.to(dtype) for w in (q_weight, k_weight)]
        caches = torch.zeros(2, 300, 16, kv_heads, head_dim, dtype=dtype)
        query = implementation.qk_norm_rope_cache(own, *weights, 1e-6, cos_sin, positions, slots, *caches)
        results.append((query, own, caches))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2])


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_step_metadata(rows: int, block_size: int) -> None:
    counts = torch.randint(0, 5, (rows,))
    counts[0] = 700
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
    slots = torch.randperm(rows).int()
    slots[rows // 2 + 1 :] = rows
    seq_lens = torch.randint(0, 3000, (rows + 1,), dtype=torch.int32)
    table = torch.randint(1, 5000, (rows + 1, 4096 // block_size), dtype=torch.int32)
    tokens = int(starts[-1]) + 77
    results = []
    for implementation in (KERNELS, REFERENCES):
        out = (
            torch.full((tokens,), -9, dtype=torch.int32),
            torch.full((tokens,), -9, dtype=torch.int64),
            torch.full((rows,), -9, dtype=torch.int32),
        )
        implementation.step_metadata(slots, starts, seq_lens, table, block_size, *out)
        results.append(out)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_sample(rows: int, dtype: torch.dtype) -> None:
    vocab = 151936
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    logits[rows // 2, 150_000] = float("nan")
    slots = torch.randperm(rows).int()
    temperature = torch.rand(rows + 1) + 0.2
    temperature[::5] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows + 1,))
    positions = torch.randint(0, 8000, (rows,), dtype=torch.int32)
    token = KERNELS.sample(logits, slots, temperature, seeds, positions)
    same = token == REFERENCES.sample(logits, slots, temperature, seeds, positions)
    assert same.float().mean() >= (1.0 if rows == 1 else 0.98)  # two scores may be closer than the logarithm's error
    assert token[rows // 2] == -1
    assert torch.equal(token, replay(lambda: KERNELS.sample(logits, slots, temperature, seeds, positions)))
    assert torch.equal(KERNELS.argmax_sample(logits), REFERENCES.argmax_sample(logits))


def test_sampling_draws_the_softmax() -> None:
    """Chi-square over 1,000,000 draws, 63 degrees of freedom: 117 is p = 4e-5."""
    draws, vocab = 1_000_000, 64
    logits = torch.randn(vocab) * 2
    slots = torch.zeros(draws, dtype=torch.int32)
    positions = torch.arange(draws, dtype=torch.int32)
    temperature, seeds = torch.tensor([0.7, 0]), torch.tensor([99, 0])
    token = torch.cat([
        KERNELS.sample(logits.expand(50_000, vocab), slots[:50_000], temperature, seeds, chunk)
        for chunk in positions.split(50_000)
    ])  # fmt: skip
    counts = torch.bincount(token, minlength=vocab).double()
    expected = (logits.double() / 0.7).softmax(-1) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 117
