"""On a GPU, in bf16: the attention backends agree with dense fp64 attention, and replay from CUDA graphs exactly."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from worker.attention import AttentionBackend, QueryKeyTransform, create_backend
from worker.attention.interface import write_keys_and_values
from worker.attention.testing import PagedBatch, dense_attention, random_batch
from worker.kernels.decode_schedule import hopper_decode_config

BACKENDS = ["triton"] + ["flash_attn"] * (importlib.util.find_spec("flash_attn") is not None)
SHAPES = [(16, 8, 128), (4, 2, 64), (32, 4, 128), (40, 8, 128)]  # heads, key/value heads, head_dim

DECODE = {
    "1 x 1": [1],
    "1 x 8000": [8000],
    "boundaries": [15, 16, 17, 255, 256, 257, 4095, 4096, 4097],
    "64 x 400": [400] * 64,
    "one of 8000 and 63 of 100": [100] * 30 + [8000] + [100] * 33,
    "64 x 1..1021": [1 + (row * 389) % 1021 for row in range(64)],
    "512 x 1..1021": [1 + (row * 389) % 1021 for row in range(512)],
    "padding": [100, 2000, 0, 0, 0],
}
# query lengths, cached lengths, decode rows, padding tokens
PREFILL = {
    "prompts": ([100, 1, 16, 1024, 257], [100, 1, 16, 1024, 257], 0, 0),
    "chunks": ([100, 1, 700], [4000, 50, 1500], 0, 60),
    "mixed": ([1] * 40 + [300, 0, 65], [700] * 39 + [5, 300, 0, 129], 40, 5),
    "a long prompt": ([3000], [3000], 0, 0),
    "long prompts and chunks": ([2100, 1, 700, 1000], [2100, 900, 3001, 1000], 0, 0),
    "decodes and padding": ([1] * 40, [700] * 40, 40, 800),
    "a long mixed step": ([1] * 40 + [1500, 0, 2065], [700] * 39 + [5, 1500, 0, 4129], 40, 37),
    "a tile for many programs": ([16], [8000], 0, 0),
}


def make(name: str, batch: PagedBatch) -> AttentionBackend:
    _, block_size, num_kv_heads, head_dim = batch.key_cache.shape
    return create_backend(
        name,
        num_heads=batch.query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        max_rows=len(batch.metadata.row_slots),
        max_tokens=batch.query.shape[0],
        max_blocks_per_row=batch.metadata.block_table.shape[1],
        device=torch.device("cuda"),
        dtype=batch.query.dtype,
    )


def run(backend: AttentionBackend, batch: PagedBatch) -> torch.Tensor:
    backend.prepare(batch.metadata)
    return backend.forward(batch.query, batch.key_cache, batch.value_cache, batch.metadata)


def check(name: str, batch: PagedBatch) -> None:
    backend = make(name, batch)
    out = run(backend, batch)
    expected = dense_attention(batch)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 4e-3, f"relative error {error}"
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, batch)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, out)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lens", DECODE)
def test_decode(lens: str, shape: tuple[int, int, int], name: str) -> None:
    heads, kv_heads, head_dim = shape
    kv_lens = DECODE[lens]
    for block_size in (256,) if name == "flash_attn" else (16, 256):
        check(name, random_batch(
            [1] * len(kv_lens), kv_lens, num_decode_rows=len(kv_lens), num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16, device="cuda",
        ))  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", PREFILL)
def test_prefill(step: str, shape: tuple[int, int, int], name: str) -> None:
    heads, kv_heads, head_dim = shape
    query_lens, kv_lens, decode, padding = PREFILL[step]
    for block_size in (256,) if name == "flash_attn" else (16, 256):
        check(name, random_batch(
            query_lens, kv_lens, num_decode_rows=decode, padding_tokens=padding, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16, device="cuda",
        ))  # fmt: skip


@pytest.mark.parametrize("step", ["long prompts and chunks", "a long mixed step"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size", "dtype"),
    [
        (8, 8, 64, torch.bfloat16),
        (32, 8, 32, torch.bfloat16),
        (16, 1, 128, torch.bfloat16),
        (32, 4, 256, torch.float16),
    ],
    ids=str,
)
def test_prefill_of_whole_tiles(heads: int, kv_heads: int, block_size: int, dtype: torch.dtype, step: str) -> None:
    """Long steps, for which Hopper has a kernel of its own, in groups, blocks and a dtype that no other test has."""
    query_lens, kv_lens, decode, padding = PREFILL[step]
    check("triton", random_batch(
        query_lens, kv_lens, num_decode_rows=decode, padding_tokens=padding, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=128, block_size=block_size, dtype=dtype, device="cuda",
    ))  # fmt: skip


@pytest.mark.parametrize(
    "lens",
    [
        "1 x 1",
        "1 x 8000",
        "boundaries",
        "padding",
        "64 x 400",
        "one of 8000 and 63 of 100",
        "64 x 1..1021",
        "512 x 1..1021",
    ],
)
@pytest.mark.parametrize(
    ("shape", "block_size", "dtype"),
    [
        *((shape, 16, torch.bfloat16) for shape in [*SHAPES, (8, 8, 128)]),
        ((16, 8, 128), 256, torch.bfloat16),
        ((40, 8, 128), 512, torch.bfloat16),
        ((32, 4, 128), 64, torch.float16),
    ],
    ids=str,
)
def test_fused_decode_does_what_two_kernels_do(
    shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, lens: str
) -> None:
    """Hopper has a kernel of its own for this; the two kernels are those of all devices. In fp16 without norms."""
    heads, kv_heads, head_dim = shape
    kv_lens = DECODE[lens]
    rows = len(kv_lens)
    shape_on_device = torch.cuda.get_device_capability(), heads // kv_heads, head_dim, dtype.itemsize
    if rows > 64 and hopper_decode_config(*shape_on_device, rows) is None:
        pytest.skip("two kernels do it there, which would be compared with themselves")
    batch = random_batch([1] * rows, kv_lens, num_decode_rows=rows, num_heads=heads, num_kv_heads=kv_heads,
                         head_dim=head_dim, block_size=block_size, dtype=dtype, device="cuda")  # fmt: skip
    metadata = batch.metadata
    metadata.positions = (metadata.kv_lens - 1).clamp(min=0)
    blocks = metadata.block_table[metadata.row_slots.long(), metadata.positions.long() // block_size].long()
    offsets = torch.where(metadata.kv_lens > 0, metadata.positions, torch.arange(rows, device="cuda")) % block_size
    metadata.cache_slots = torch.where(metadata.kv_lens > 0, blocks, 0) * block_size + offsets
    angles = torch.randn(9000, head_dim // 2, device="cuda") * 6
    weights = torch.rand(2, head_dim, device="cuda", dtype=dtype) + 0.5
    gains = (weights[0], weights[1]) if dtype == torch.bfloat16 else (None, None)
    transform = QueryKeyTransform(*gains, 1e-6, torch.cat((angles.cos(), angles.sin()), dim=-1))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda", dtype=dtype)
    backend = make("triton", batch)
    backend.prepare(metadata)

    caches = [torch.stack([batch.key_cache, batch.value_cache]) for _ in range(3)]
    fused = backend.attend(qkv.clone(), transform, *caches[0], metadata)
    query = write_keys_and_values(qkv.clone(), transform, *caches[1], metadata)
    in_two = backend.forward(query, *caches[1], metadata)
    assert (fused.double() - in_two.double()).norm() <= 6e-3 * in_two.double().norm()
    torch.testing.assert_close(fused, in_two, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(caches[0][:, 1:], caches[1][:, 1:], atol=2e-2, rtol=2e-2, equal_nan=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.attend(qkv.clone(), transform, *caches[2], metadata)  # two kernels would change it
    for _ in range(5):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, fused)


@pytest.mark.parametrize("step", PREFILL)
def test_a_graph_serves_any_mixture(step: str) -> None:
    """A mixed step is captured with sizes alone: what it finds on the device decides which rows decode."""
    query_lens, kv_lens, decode, padding = PREFILL[step]
    batch = random_batch([*query_lens, 0, 0], [*kv_lens, 0, 0], num_decode_rows=decode, padding_tokens=padding + 9,
                         num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")  # fmt: skip
    batch.metadata.num_decode_rows = None
    backend = make("triton", batch)
    run(backend, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, batch)
    graph.replay()
    torch.testing.assert_close(captured.double(), dense_attention(batch), atol=2e-2, rtol=2e-2)


def test_a_graph_follows_the_lengths_it_finds() -> None:
    """The schedule is made on the device: a captured step serves other lengths and slots than it was captured with."""
    batch = random_batch([1] * 32, [3000] * 32, num_decode_rows=32, num_heads=16, num_kv_heads=8, head_dim=128,
                         dtype=torch.bfloat16, device="cuda")  # fmt: skip
    backend = make("triton", batch)
    run(backend, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, batch)
    for kv_lens in ([1] * 32, [3000] + [7] * 31, list(range(50, 82)), [0] * 31 + [2999]):
        batch.metadata.kv_lens.copy_(torch.tensor(kv_lens))
        graph.replay()
        expected = dense_attention(batch)
        torch.testing.assert_close(captured.double(), expected, atol=2e-2, rtol=2e-2)
