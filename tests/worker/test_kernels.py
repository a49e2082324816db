"""The plain-torch references say what they should, and the kernels agree with them in Triton's interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worker import kernels
from worker.kernels.argmax_sample import argmax_sample_reference
from worker.kernels.gumbel_sample import gumbel_noise, philox4x32, sample_reference
from worker.kernels.qk_norm_rope import qk_norm_rope_cache_reference
from worker.kernels.rms_norm import rms_norm_reference


def run_interpreted(file: str) -> tuple[int, str]:
    """Runs a test file in a process of its own: Triton reads TRITON_INTERPRET once, at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Where this process is ended, so is the other.
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / file)]
    run = subprocess.run(
        command, cwd=here.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run.returncode, run.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.background(run_interpreted, file, seconds=100))
        for file in ("test_kernels_interpreted.py", "test_attention_interpreted.py")
    ],
)
def test_in_triton_interpreter(file: str, of_background: tuple[int, str]) -> None:
    pytest.importorskip("triton")
    code, output = of_background
    assert code == 0, output[-7000:]


def test_a_cpu_uses_the_references() -> None:
    assert kernels.select("cpu").rms_norm is rms_norm_reference


def test_a_worker_without_triton_is_imported() -> None:
    """It is there on Linux alone, and a CPU needs none."""
    code = "import sys; sys.modules['triton'] = None; import worker.main; from worker.kernels import _triton; "
    subprocess.run([sys.executable, "-c", code + "assert _triton.tl is None"], check=True, timeout=60)


def test_philox_gives_the_published_numbers() -> None:
    """The known-answer vectors of Random123 (philox 4x32, 10 rounds) with counter words 2 and 3 zero."""
    words = philox4x32(*torch.zeros(4, dtype=torch.int64))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_depends_on_seed_and_position_alone() -> None:
    seeds, positions = torch.tensor([5, -9, 5]), torch.tensor([3, 3, 4], dtype=torch.int32)
    start = torch.zeros(3, dtype=torch.int64)
    together = gumbel_noise(seeds, positions, start, 103, 0)
    for row in range(3):
        alone = gumbel_noise(seeds[row, None], positions[row, None], start[:1], 103, 0)
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[:, 20:50], gumbel_noise(seeds, positions, start + 20, 30, 0))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together, gumbel_noise(seeds, positions, start, 103, 1))
    assert together.isfinite().all()


def test_greedy_and_refused_rows() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, 5, 5, 0], [0, nan, 9, 0], [-inf] * 4, [-inf, -3, -inf, -inf], [inf, nan, 0, 0]])
    assert argmax_sample_reference(logits).tolist() == [1, -1, -1, 1, -1]
    slots = torch.arange(5, dtype=torch.int32)
    tokens = sample_reference(logits, slots, torch.tensor([0, 1, 1, 1, 1, 0.0]), torch.arange(6), slots)
    assert tokens.tolist() == [1, -1, -1, 1, -1]


def test_norm_in_bf16_is_near_the_exact_one() -> None:
    x = torch.randn(3, 64).to(torch.bfloat16)
    weight = torch.randn(64).to(torch.bfloat16)
    out = rms_norm_reference(x, weight, 1e-6)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.01)


def test_norms_and_rotary_embedding_agree_with_transformers() -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    head_dim, heads, kv_heads, tokens = 64, 4, 2, 9
    q_norm, k_norm = qwen3.Qwen3RMSNorm(head_dim, 1e-6), qwen3.Qwen3RMSNorm(head_dim, 1e-6)
    torch.nn.init.normal_(q_norm.weight)
    torch.nn.init.normal_(k_norm.weight)
    x = torch.randn(tokens, head_dim)
    torch.testing.assert_close(rms_norm_reference(x, q_norm.weight, 1e-6), q_norm(x), atol=1e-6, rtol=1e-6)

    inverse = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(100)[:, None] * inverse
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randperm(100)[:tokens].int()
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (angles[positions].repeat(1, 2).cos()[None], angles[positions].repeat(1, 2).sin()[None])
    expected_q, expected_k = qwen3.apply_rotary_pos_emb(
        q_norm(q).transpose(0, 1)[None], k_norm(k).transpose(0, 1)[None], cos, sin
    )
    expected_v = v.clone()
    key_cache, value_cache = torch.zeros(2, 2, 16, kv_heads, head_dim)
    slots = torch.randperm(32)[:tokens]
    with torch.no_grad():
        query = qk_norm_rope_cache_reference(
            qkv, q_norm.weight, k_norm.weight, 1e-6, cos_sin, positions, slots, key_cache, value_cache
        )
    torch.testing.assert_close(query, expected_q[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key_cache.flatten(0, 1)[slots], expected_k[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(value_cache.flatten(0, 1)[slots], expected_v)
