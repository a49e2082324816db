"""The kernels that a step's time is made of, at the shapes of Qwen3-0.6B: what `benchmarks.kernels` times.

Tensors are made on torch's default device. What prepares and ends a step is in `kernel_step_cases.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from worker.attention import AttentionBackend, AttentionMetadata, QueryKeyTransform, create_backend
from worker.kernels import select

Calls = list[Callable[[], object]]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 16, 8, 128, 151936
BF16 = torch.bfloat16
MOST_INPUTS = 128

DECODE_SHAPES: dict[str, list[int]] = {
    "1 x 128": [128],
    "1 x 8192": [8192],
    "8 x 512": [512] * 8,
    "8 x 8000": [8000] * 8,
    "64 x 400": [400] * 64,
    "64 x 1000": [1000] * 64,
    "256 x 840": [840] * 256,
    "512 x 1000": [1000] * 512,
    "8000 and 63 x 100": [8000] + [100] * 63,
    "64 x 20..745": [20 + 725 * row // 63 for row in range(64)],
}
PREFILL_SHAPES: dict[str, tuple[int, int, int]] = {  # requests, query tokens, cached tokens before them
    "64 x 2048": (64, 2048, 0),
    "8 x 4096": (8, 4096, 0),
    "4 x 8192": (4, 8192, 0),
    "16 x 512": (16, 512, 0),
    "1 x 128": (1, 128, 0),
    "1 x 512": (1, 512, 0),
    "1 x 1024": (1, 1024, 0),
    "1 x 256 after 7000": (1, 256, 7000),
    "1 x 640 after 7000": (1, 640, 7000),
    "1 x 1024 after 7000": (1, 1024, 7000),
    "1 x 2048 after 6144": (1, 2048, 6144),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    bytes: float
    flops: float
    calls: Calls  # one for each set of inputs
    beside: Calls  # the same by flash-attn, or empty


def device() -> torch.device:
    """The device that tensors are made on, with its number, as workspaces are kept by device."""
    default = torch.get_default_device()
    return torch.device("cuda", torch.cuda.current_device()) if default.type == "cuda" else default


def count_inputs(size: float) -> int:
    """How many sets of inputs of `size` bytes are larger than the L2 together."""
    l2 = torch.cuda.get_device_properties(device()).L2_cache_size
    return min(MOST_INPUTS, max(2, int(2 * l2 / size) + 1))


def elementwise_cases() -> Iterator[Case]:
    ops = select(device())
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    norm_weight, head_weight = torch.ones(HIDDEN, dtype=BF16), torch.ones(HEAD_DIM, dtype=BF16)
    angles = torch.randn(40960, HEAD_DIM // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    caches = torch.zeros(2, 256, 16, KV_HEADS, HEAD_DIM, dtype=BF16)
    for tokens in (1, 8, 64, 256, 2048):
        shape = f"{tokens} tokens"
        size = 4.0 * tokens * HIDDEN
        inputs = torch.randn(count_inputs(size), tokens, HIDDEN, dtype=BF16)
        calls: Calls = [partial(ops.rms_norm, x, norm_weight, 1e-6) for x in inputs]
        yield Case("rms_norm", shape, size, 0, calls, [])

        size = 6.0 * tokens * INTERMEDIATE
        inputs = torch.randn(count_inputs(size), tokens, 2 * INTERMEDIATE, dtype=BF16)
        yield Case("silu_mul", shape, size, 0, [partial(ops.silu_mul, x) for x in inputs], [])

        size = 4.0 * tokens * width
        inputs = torch.randn(count_inputs(size), tokens, width, dtype=BF16)
        positions = torch.randint(0, 40960, (tokens,), dtype=torch.int32)
        slots = torch.randperm(256 * 16)[:tokens]
        rest = (head_weight, head_weight, 1e-6, cos_sin, positions, slots, caches[0], caches[1])
        calls = [partial(ops.qk_norm_rope_cache, x, *rest) for x in inputs]
        yield Case("qk_norm_rope_cache", shape, size, 0, calls, [])


def linear_cases() -> Iterator[Case]:
    """A decoder layer's products with what is fused to them, each on the weights of several layers in turn."""
    ops = select(device())
    norm_weight = torch.ones(HIDDEN, dtype=BF16)
    heads, both = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM
    products: dict[str, tuple[int, int]] = {
        "norm_linear (qkv)": (both, HIDDEN),
        "linear_add (o)": (HIDDEN, heads),
        "norm_linear_silu_mul": (2 * INTERMEDIATE, HIDDEN),
        "linear_add (down)": (HIDDEN, INTERMEDIATE),
        "norm_linear (head)": (VOCAB, HIDDEN),
    }
    for name, (outputs, inputs) in products.items():
        weights = torch.randn(count_inputs(2.0 * outputs * inputs), outputs, inputs, dtype=BF16)
        for tokens in (1, 2, 8, 16, 64, 256):
            x = torch.randn(tokens, inputs, dtype=BF16)
            residual = torch.randn(tokens, outputs, dtype=BF16)
            size, flops = 2.0 * (outputs * inputs + tokens * (inputs + outputs)), 2.0 * tokens * outputs * inputs
            if name.startswith("linear_add"):
                calls: Calls = [partial(ops.linear_add, x, weight, residual) for weight in weights]
            else:
                call = ops.norm_linear_silu_mul if name.endswith("silu_mul") else ops.norm_linear
                calls = [partial(call, x, norm_weight, 1e-6, weight) for weight in weights]
            yield Case(name, f"{tokens} tokens", size, flops, calls, [])


def layer_cases() -> Iterator[Case]:
    """The four products of a layer one after another, layer by layer, as far as attention leaves them neighbours."""
    ops = select(device())
    norm_weight = torch.ones(HIDDEN, dtype=BF16)
    shapes = [
        ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    ]  # fmt: skip
    num_weights = sum(outputs * inputs for outputs, inputs in shapes)
    layers = [[torch.randn(shape, dtype=BF16) / shape[1] ** 0.5 for shape in shapes] for _ in range(14)]
    for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 8192):
        residual, attended = torch.randn(tokens, HIDDEN, dtype=BF16), torch.randn(tokens, shapes[1][1], dtype=BF16)

        def layer(
            weights: list[torch.Tensor], residual: torch.Tensor = residual, attended: torch.Tensor = attended
        ) -> None:
            qkv, out, gate_up, down = weights
            ops.norm_linear(residual, norm_weight, 1e-6, qkv)
            ops.linear_add(attended, out, residual)
            ops.linear_add(ops.norm_linear_silu_mul(residual, norm_weight, 1e-6, gate_up), down, residual)

        calls: Calls = [partial(layer, weights) for weights in layers]
        yield Case("a layer's products", f"{tokens} tokens", 2.0 * num_weights, 2.0 * tokens * num_weights, calls, [])


def sample_cases() -> Iterator[Case]:
    ops = select(device())
    for rows in (1, 8, 64, 256):
        size = 2.0 * rows * VOCAB
        inputs = torch.randn(count_inputs(size), rows, VOCAB, dtype=BF16)
        slots, positions = torch.arange(rows, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
        temperature, seeds = torch.full((rows + 1,), 0.6), torch.arange(rows + 1)
        calls: Calls = [partial(ops.argmax_sample, x) for x in inputs]
        yield Case("argmax_sample", f"{rows} rows", size, 0, calls, [])
        calls = [partial(ops.sample, x, slots, temperature, seeds, positions) for x in inputs]
        yield Case("sample", f"{rows} rows", size, 0, calls, [])

        def filtered(x: torch.Tensor, top_k: torch.Tensor, rest: tuple[torch.Tensor, ...]) -> torch.Tensor:
            slots, positions, temperature, seeds, top_p, min_p = rest
            threshold = ops.filter_threshold(x, slots, temperature, top_k, top_p, min_p)
            return ops.sample(x, slots, temperature, seeds, positions, threshold)

        # Logits without a structure are the hardest: a top-p of 0.9 keeps a third of the vocabulary.
        rest = (slots, positions, temperature, seeds, torch.full_like(temperature, 0.9), torch.zeros_like(temperature))
        for name, top_k in (("k 50, p 0.9", 50), ("p 0.9", 0)):
            calls = [partial(filtered, x, torch.full((rows + 1,), top_k, dtype=torch.int32), rest) for x in inputs]
            yield Case("sample top-k top-p", f"{rows} rows, {name}", size, 0, calls, [])


def attention_step(
    counts: list[int], kv_lens: list[int], decode: int, block_size: int, inputs: int
) -> tuple[list[AttentionMetadata], torch.Tensor]:
    """Metadata of `inputs` equal steps on disjoint blocks in random order; and the cache [2, blocks, ...]."""
    rows, width = len(kv_lens), -(-max(kv_lens) // block_size)
    order = torch.randperm(inputs * rows * width, dtype=torch.int32).view(inputs, rows, width) + 1
    cache = torch.empty(2, inputs * rows * width + 1, block_size, KV_HEADS, HEAD_DIM, dtype=BF16).normal_()
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    steps = [
        AttentionMetadata(
            num_decode_rows=decode,
            decode_rows=torch.tensor([decode], dtype=torch.int32),
            row_slots=torch.arange(rows, dtype=torch.int32),
            query_start=starts,
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
            positions=torch.zeros(sum(counts), dtype=torch.int32),
            cache_slots=torch.zeros(sum(counts), dtype=torch.int64),
            block_table=torch.cat((table, torch.zeros(1, width, dtype=torch.int32))),
            max_query_len=max(counts[decode:], default=0),
            max_kv_len=max(kv_lens),
        )
        for table in order
    ]
    return steps, cache


def attention_calls(
    name: str, counts: list[int], kv_lens: list[int], decode: int, inputs: int, from_product: bool = False
) -> Calls:
    """Calls of one layer's attention, `from_product` with what makes queries, keys and values of the qkv product.

    `prepare`, once a step for all layers, is left out.
    """
    block_size = 256 if name == "flash_attn" else 16
    steps, cache = attention_step(counts, kv_lens, decode, block_size, inputs)
    qkv = torch.randn(sum(counts), (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=BF16)
    query = qkv[:, : HEADS * HEAD_DIM].view(-1, HEADS, HEAD_DIM)

    def backend_for(step: AttentionMetadata) -> AttentionBackend:
        backend = create_backend(
            name, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=block_size,
            max_rows=len(kv_lens), max_tokens=sum(counts), max_blocks_per_row=step.block_table.shape[1],
            device=device(), dtype=BF16,
        )  # fmt: skip
        backend.prepare(step)
        return backend

    # flash-attn's backend holds the step's block table; ours holds a schedule, equal for all of them.
    backends = [backend_for(step) for step in (steps if name == "flash_attn" else steps[:1])]
    if from_product:
        gain, angles = torch.ones(HEAD_DIM, dtype=BF16), torch.randn(max(kv_lens), HEAD_DIM // 2)
        transform = QueryKeyTransform(gain, gain, 1e-6, torch.cat((angles.cos(), angles.sin()), dim=-1))
        return [partial(backends[0].attend, qkv, transform, cache[0], cache[1], step) for step in steps]
    return [
        partial(backends[i % len(backends)].forward, query, cache[0], cache[1], step) for i, step in enumerate(steps)
    ]


def decode_cases() -> Iterator[Case]:
    for shape, kv_lens in DECODE_SHAPES.items():
        rows = len(kv_lens)
        size = 2.0 * 2 * KV_HEADS * HEAD_DIM * sum(kv_lens) + 2.0 * 2 * HEADS * HEAD_DIM * rows
        flops = 4.0 * HEADS * HEAD_DIM * sum(kv_lens)
        counts, inputs = [1] * rows, count_inputs(size)
        yield attention_case("decode", shape, size, flops, counts, kv_lens, rows, inputs)


def prefill_cases() -> Iterator[Case]:
    for shape, (requests, tokens, before) in PREFILL_SHAPES.items():
        pairs = requests * (tokens * before + tokens * (tokens + 1) / 2)
        size = 2.0 * requests * HEAD_DIM * (2 * HEADS * tokens + 2 * KV_HEADS * (before + tokens))
        flops = 4.0 * HEADS * HEAD_DIM * pairs
        counts, kv_lens = [tokens] * requests, [before + tokens] * requests
        yield attention_case("prefill", shape, size, flops, counts, kv_lens, 0, min(4, count_inputs(size)))


def attention_case(
    kernel: str,
    shape: str,
    size: float,
    flops: float,
    counts: list[int],
    kv_lens: list[int],
    decode: int,
    inputs: int,
) -> Case:
    """Ours starts decodes from the product, as the engine does; flash-attn starts from queries, keys and values."""
    beside: Calls = []
    if importlib.util.find_spec("flash_attn"):
        beside = attention_calls("flash_attn", counts, kv_lens, decode, inputs)
    calls = attention_calls("triton", counts, kv_lens, decode, inputs, from_product=decode > 0)
    return Case(kernel, shape, size, flops, calls, beside)
