"""On a GPU, in bf16: every fused kernel agrees with its reference, and replays from a CUDA graph exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from tests.support.edit_tables import random_edits
from tests.support.sampling import assert_drawn_from, kept_by_definition
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
    x = torch.randn(tokens, hidden, dtype=BF16)
    weight = torch.randn(hidden, dtype=BF16)
    out = KERNELS.rms_norm(x, weight, 1e-6)
    assert_close(out, REFERENCES.rms_norm(x.double().float(), weight.float(), 1e-6))
    assert torch.equal(out, replay(lambda: KERNELS.rms_norm(x, weight, 1e-6)))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 33, 64, 65, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 1024), (1024, 2048), (3072, 1024), (1024, 3072), (50, 100)])
def test_fused_linears(outputs: int, inputs: int, rows: int) -> None:
    """No further from fp32 than plain torch in bf16 is, up to a tenth; the same from a graph."""
    x = torch.randn(rows, inputs, dtype=BF16) * 2
    norm_weight = torch.rand(inputs, dtype=BF16) + 0.5
    weight = torch.randn(outputs, inputs, dtype=BF16) / inputs**0.5
    gate_up = torch.randn(2 * outputs, inputs, dtype=BF16) / inputs**0.5
    residual = torch.randn(rows, outputs, dtype=BF16)

    def added(ops: object, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        residual = residual.clone()
        ops.linear_add(x, weight, residual)
        return residual

    def error(got: torch.Tensor, exact: torch.Tensor) -> float:
        return float((got.double() - exact).norm() / exact.norm())

    for call in (
        lambda ops, cast: ops.norm_linear(cast(x), cast(norm_weight), 1e-6, cast(weight)),
        lambda ops, cast: ops.norm_linear_silu_mul(cast(x), cast(norm_weight), 1e-6, cast(gate_up)),
        lambda ops, cast: added(ops, cast(x), cast(weight), cast(residual)),
    ):
        exact = call(REFERENCES, torch.Tensor.double)
        got = call(KERNELS, lambda tensor: tensor)
        assert error(got, exact) <= 1.1 * error(call(REFERENCES, lambda tensor: tensor), exact)
        assert torch.equal(got, replay(lambda call=call: call(KERNELS, lambda tensor: tensor)))


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
    last_token = torch.randint(0, 9999, (rows + 1,), dtype=torch.int32)
    decode_rows = torch.tensor([0], dtype=torch.int32)
    results = []
    for implementation in (KERNELS, REFERENCES):
        out = (
            torch.full((tokens,), -9, dtype=torch.int32),
            torch.full((tokens,), -9, dtype=torch.int32),
            torch.full((tokens,), -9, dtype=torch.int64),
            torch.full((rows,), -9, dtype=torch.int32),
        )
        implementation.step_metadata(slots, starts, decode_rows, seq_lens, last_token, table, block_size, *out)
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
    draws, vocab = 1_000_000, 64
    logits = torch.randn(vocab)
    slots = torch.zeros(draws, dtype=torch.int32)
    positions = torch.arange(draws, dtype=torch.int32)
    temperature, seeds = torch.tensor([0.7, 0]), torch.tensor([99, 0])
    token = torch.cat([
        KERNELS.sample(logits.expand(50_000, vocab), slots[:50_000], temperature, seeds, chunk)
        for chunk in positions.split(50_000)
    ])  # fmt: skip
    assert_drawn_from(token, (logits.double() / 0.7).softmax(-1))


FILTERS = [  # temperature, top_k, top_p, min_p
    (0.6, 20, 0.95, 0.0),
    (0.6, 0, 0.9, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.0, 1000, 0.9, 0.0),
    (0.8, 0, 1.0, 0.05),
    (1.2, 100, 0.8, 0.02),
    (0.0, 5, 0.5, 0.5),
    (1.0, 0, 1.0, 0.0),
]
VOCAB = 151936


def options_of(rows: int) -> tuple[torch.Tensor, ...]:
    """temperature, top_k, top_p and min_p of `rows` slots, which have the filters in turn, and of the null slot."""
    columns = [torch.tensor([FILTERS[row % len(FILTERS)][i] for row in range(rows)] + [0]) for i in range(4)]
    return columns[0].float(), columns[1].int(), columns[2].float(), columns[3].float()


def spread_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB) * 3


def peaked_logits(rows: int) -> torch.Tensor:
    """A few tokens stand out, as in a model's."""
    logits = torch.randn(rows, VOCAB) * 2 - 1
    return logits + (torch.rand(rows, VOCAB) < 3e-4) * torch.empty(rows, VOCAB).exponential_() * 6


def tied_logits(rows: int) -> torch.Tensor:
    return (torch.randn(rows, VOCAB) * 3).round()


def masked_logits(rows: int) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB) * 3
    return logits.masked_fill(torch.rand(rows, VOCAB) < 0.9999, -torch.inf)


def logits_around_zero(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB) * torch.exp2(-torch.randint(0, 100, (rows, VOCAB)).float())


@pytest.mark.parametrize(
    "make", [spread_logits, peaked_logits, tied_logits, masked_logits, logits_around_zero], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 8, 256])
def test_filter_threshold(rows: int, dtype: torch.dtype, make: Callable[[int], torch.Tensor]) -> None:
    """What is kept is right to within 2e-6 of the probability: sums are fp32. Replays agree to the last bit."""
    logits = make(rows).to(dtype)
    options = options_of(rows)
    slots = torch.arange(rows, dtype=torch.int32)
    threshold = KERNELS.filter_threshold(logits, slots, *options)
    for row in range(min(rows, 24)):
        temperature, top_k, top_p, min_p = FILTERS[row % len(FILTERS)]
        if temperature == 0 or (top_k == 0 and top_p == 1 and min_p == 0):
            assert threshold[row] == -torch.inf
            continue
        must, may = kept_by_definition(logits[row].float(), temperature, top_k, top_p, min_p, 2e-6)
        kept = (logits[row].float() >= threshold[row]) & (logits[row] > -torch.inf)
        assert not (must & ~kept).any(), FILTERS[row % len(FILTERS)]
        assert not (kept & ~may).any(), FILTERS[row % len(FILTERS)]
    assert torch.equal(threshold, replay(lambda: KERNELS.filter_threshold(logits, slots, *options)))


@pytest.mark.parametrize("make", [spread_logits, peaked_logits], ids=lambda f: f.__name__)
def test_what_a_row_keeps_and_draws_does_not_depend_on_the_batch(make: Callable[[int], torch.Tensor]) -> None:
    rows = 256
    logits = make(rows).to(BF16)
    options = options_of(rows)
    slots, seeds = torch.arange(rows, dtype=torch.int32), torch.arange(rows + 1) * 31
    positions = torch.randint(0, 8000, (rows,), dtype=torch.int32)

    def draw(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        threshold = KERNELS.filter_threshold(logits[part], slots[part], *options)
        token = KERNELS.sample(logits[part], slots[part], options[0], seeds, positions[part], threshold)
        return threshold, token

    together = draw(slice(None))
    for size in (1, 8, 60):
        for start in range(0, 120, size):
            part = slice(start, start + size)
            assert all(torch.equal(mine, all_rows[part]) for mine, all_rows in zip(draw(part), together))


@pytest.mark.parametrize("filters", FILTERS[:6], ids=str)
def test_filtered_draws_follow_the_distribution(filters: tuple[float, int, float, float]) -> None:
    """The probable tokens stand far apart in the vocabulary of 151,936, so that every stretch can be drawn."""
    temperature, top_k, top_p, min_p = filters
    draws, at_once, tokens = 100_000, 250, 60
    where = torch.randperm(VOCAB)[:tokens]
    logits = torch.full((VOCAB,), -torch.inf)
    # transformers, if loaded, replaces `linspace` by one that knows nothing of the default device.
    logits[where] = torch.linspace(-1.5, 1.5, tokens, device="cuda")
    logits = logits.to(BF16)
    options = (
        torch.tensor([temperature]), torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]),
        torch.tensor([min_p]),
    )  # fmt: skip
    slots = torch.zeros(at_once, dtype=torch.int32)
    rows = logits.expand(at_once, VOCAB)
    threshold = KERNELS.filter_threshold(rows, slots, *options)
    drawn = torch.cat([
        KERNELS.sample(rows, slots, options[0], torch.tensor([7]), positions, threshold)
        for positions in torch.arange(draws, dtype=torch.int32).split(at_once)
    ])  # fmt: skip
    must, _ = kept_by_definition(logits.float(), *filters)
    expected = (logits.double() / temperature).masked_fill(~must, -torch.inf).softmax(-1)
    place = torch.full((VOCAB,), tokens)
    place[where] = torch.arange(tokens)
    assert_drawn_from(place[drawn], torch.cat((expected[where], torch.zeros(1, dtype=torch.float64))))


def test_a_row_with_nan_is_reported_whatever_its_filters() -> None:
    logits = torch.randn(len(FILTERS), VOCAB, dtype=BF16)
    logits[:, 150_000] = float("nan")
    slots = torch.arange(len(FILTERS), dtype=torch.int32)
    options = options_of(len(FILTERS))
    threshold = KERNELS.filter_threshold(logits, slots, *options)
    token = KERNELS.sample(logits, slots, options[0], torch.arange(len(FILTERS) + 1), slots, threshold)
    assert token.tolist() == [-1] * len(FILTERS)


@pytest.mark.parametrize("vocab", [1000, 151936])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_edit_logits(rows: int, vocab: int) -> None:
    both = [random_edits(rows, vocab, "cuda", seed=rows) for _ in range(2)]
    slots, positions = torch.randperm(rows).int(), both[0][1]
    positions = positions[slots.long()]
    tables, reference_tables = both[0][0].tables, both[1][0].tables
    for _ in range(3):
        logits = (torch.randn(rows, vocab) * 4).to(BF16)
        edited = KERNELS.edit_logits(logits, slots, positions, tables)
        expected = REFERENCES.edit_logits(logits, slots, positions, reference_tables)
        torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-5)
        again = replay(lambda: KERNELS.edit_logits(logits, slots, positions, tables))  # noqa: B023
        assert torch.equal(edited, again)
        tokens = KERNELS.argmax_sample(expected)
        KERNELS.record_tokens(slots, positions, tokens, tables)
        REFERENCES.record_tokens(slots, positions, tokens, reference_tables)
        assert torch.equal(tables.counts, reference_tables.counts)
        assert torch.equal(tables.recent, reference_tables.recent)
        positions = positions + 1
