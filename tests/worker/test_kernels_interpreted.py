"""The fused Triton kernels agree with their references, in Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process: test_kernels.py runs this file in one of
its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py in Triton's interpreter", allow_module_level=True)

from benchmarks import kernel_step_cases
from protocol.logit_edits import LogitEdits
from protocol.messages import AdmittedSlot
from tests.support.edit_tables import admitted, random_edits
from tests.support.sampling import assert_drawn_from, kept_by_definition
from worker.kernels import filter_groups, filter_guess, filter_threshold, gumbel_sample, ops
from worker.kernels.apply_changes import pack_request
from worker.kernels.gumbel_sample import gumbel_noise
from worker.slot_edits import SlotEdits

KERNELS, REFERENCES = ops.TRITON, ops.REFERENCE


def test_the_interpreter_selects_the_kernels() -> None:
    assert ops.select("cpu") is KERNELS


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (5, 100), (3, 1024), (0, 64)])
def test_rms_norm(tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, 2 * hidden)[:, :hidden]
    weight = torch.randn(hidden)
    torch.testing.assert_close(KERNELS.rms_norm(x, weight, 1e-6), REFERENCES.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize(("tokens", "intermediate"), [(1, 64), (3, 1500), (0, 64)])
def test_silu_mul(tokens: int, intermediate: int) -> None:
    gate_up = torch.randn(tokens, 2 * intermediate) * 3
    torch.testing.assert_close(KERNELS.silu_mul(gate_up), REFERENCES.silu_mul(gate_up))


@pytest.mark.parametrize("rest", [0, 600])
@pytest.mark.parametrize(("requests", "entries"), [(0, 0), (0, 1), (1, 0), (3, 40), (2, 700), (5, 3)])
def test_apply_changes(requests: int, entries: int, rest: int) -> None:
    rows, width = 9, 100
    slots, seeds = torch.randperm(rows)[:requests].tolist(), torch.randint(-(2**63), 2**63 - 1, (requests,))
    admitted = [
        AdmittedSlot(slot, b"", 0, 10 + slot, b"", 0.1 + slot, 20 + slot, 0.2 + slot, 0.3 + slot, int(seed))
        for slot, seed in zip(slots, seeds, strict=True)
    ]
    indices = torch.randperm(rows * width)[:entries].int()
    blocks = torch.randint(0, 10_000, (entries,), dtype=torch.int32)
    packed = np.frombuffer(b"".join(map(pack_request, admitted)), np.int32).copy()
    # What follows is no business of this step.
    unread = torch.randint(0, rows * width, (rest,), dtype=torch.int32)
    counts = torch.tensor([requests, entries], dtype=torch.int32)
    changes = torch.cat([counts, torch.from_numpy(packed), indices, blocks, unread])
    results = []
    for implementation in (KERNELS, REFERENCES):
        ints, floats = torch.ones(2, rows, dtype=torch.int32), torch.ones(3, rows)
        tables = [torch.ones(rows, width, dtype=torch.int32), *ints, *floats, torch.ones(rows, dtype=torch.int64)]
        implementation.apply_changes(changes, *tables)
        results.append(tables)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    table, seq_lens, top_k, temperature, top_p, min_p, seed = results[0]
    assert torch.equal(table.view(-1)[indices], blocks)
    assert (table != 1).sum() <= entries
    assert torch.equal(seed[slots], seeds)
    for slot in slots:
        assert (seq_lens[slot], top_k[slot]) == (10 + slot, 20 + slot)
        got = torch.stack([temperature[slot], top_p[slot], min_p[slot]])
        torch.testing.assert_close(got, torch.tensor([0.1, 0.2, 0.3]) + slot)


FEW_ROWS = [(rows, shape) for rows in (0, 1, 2, 3, 8, 16) for shape in ((48, 64), (50, 100), (130, 1030), (3, 2100))]
# From 17 rows on: tiles in one part and in several, and shapes that do not divide into tiles.
MORE_ROWS = [(17, (64, 256)), (33, (64, 2560)), (64, (2048, 128)), (17, (50, 100)), (65, (64, 256))]


@pytest.mark.parametrize(("rows", "shape"), FEW_ROWS + MORE_ROWS)
def test_fused_linears(rows: int, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    x = (torch.randn(rows, inputs + 32) * 2)[:, :-32]
    norm_weight = torch.randn(inputs)
    weight, gate_up = torch.randn(outputs, inputs) / 8, torch.randn(2 * outputs, inputs) / 8
    for name, *arguments in (("norm_linear", weight), ("norm_linear_silu_mul", gate_up)):
        got = getattr(KERNELS, name)(x, norm_weight, 1e-6, *arguments)
        torch.testing.assert_close(
            got, getattr(REFERENCES, name)(x, norm_weight, 1e-6, *arguments), atol=1e-4, rtol=1e-5
        )
    residual = torch.randn(rows, outputs)
    expected = residual + x @ weight.T
    KERNELS.linear_add(x, weight, residual)
    torch.testing.assert_close(residual, expected, atol=1e-4, rtol=1e-5)


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
    last_token = torch.randint(0, 99, (rows + 3,), dtype=torch.int32)
    decode = next((row for row, count in enumerate(query_lens) if count != 1), rows)
    tokens = sum(query_lens) + padding
    results = []
    for implementation in (KERNELS, REFERENCES):
        token_ids = torch.full((tokens,), -9, dtype=torch.int32)
        positions = torch.full((tokens,), -9, dtype=torch.int32)
        cache_slots = torch.full((tokens,), -9, dtype=torch.int64)
        kv_lens = torch.full((rows,), -9, dtype=torch.int32)
        implementation.step_metadata(
            row_slots, query_start, torch.tensor([decode], dtype=torch.int32), seq_lens, last_token, block_table,
            block_size, token_ids, positions, cache_slots, kv_lens,
        )  # fmt: skip
        results.append((positions, cache_slots, kv_lens, token_ids))
    assert torch.equal(results[0][3][:decode], last_token[row_slots[:decode]])
    assert (results[0][3][decode:] == -9).all()
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


def test_the_kernel_adds_the_noise_that_the_reference_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal logits the stretch is the arg-max of the noise alone, and so is the token in it, at every position."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 128)
    rows, vocab = 64, 1024
    slots = torch.arange(rows, dtype=torch.int32)
    seeds = torch.arange(rows + 1) * 7_000_000_007
    positions = torch.arange(rows, dtype=torch.int32) * 31
    token = KERNELS.sample(torch.zeros(rows, vocab), slots, torch.ones(rows + 1), seeds, positions)
    start = 128 * gumbel_noise(seeds[:-1], positions, 0 * seeds[:-1], vocab // 128, 1).argmax(-1)
    assert torch.equal(token.long(), start + gumbel_noise(seeds[:-1], positions, start, 128, 0).argmax(-1))


def test_the_kernel_draws_the_distribution() -> None:
    draws, vocab = 300, 8
    logits = torch.linspace(-1.2, 1.2, vocab)
    slots = torch.zeros(draws, dtype=torch.int32)
    positions = torch.arange(draws, dtype=torch.int32)
    threshold = torch.full((draws,), -0.7)
    tokens = KERNELS.sample(
        logits.expand(draws, vocab), slots, torch.tensor([0.8]), torch.tensor([5]), positions, threshold
    )
    assert_drawn_from(tokens, (logits / 0.8).masked_fill(logits < -0.7, -torch.inf).softmax(-1))


FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 0.9, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 50, 0.8, 0.0),
    (1.0, 1, 0.5, 0.0),
    (0.01, 0, 0.999, 0.0),
    (100.0, 299, 0.3, 0.0),
    (1.0, 300, 1.0, 0.0),
    (1.0, 2**31 - 1, 0.4, 0.0),
    (1.0, 0, 1e-46, 0.0),
    (1.0, 0, 0.5, 0.0),
    (2.0, 0, 0.99, 0.0),
    (1.0, 7, 1e-3, 0.0),
    (1.0, 2, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1.5, 20, 0.95, 0.05),
    (0.8, 0, 0.6, 1e-30),
    (1.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.5),
]


def spread(vocab: int) -> torch.Tensor:
    return torch.randn(vocab) * 3


def with_ties(vocab: int) -> torch.Tensor:
    return (torch.randn(vocab) * 3).round()


def all_equal(vocab: int) -> torch.Tensor:
    return torch.full((vocab,), -2.5)


def mostly_masked(vocab: int) -> torch.Tensor:
    logits = torch.full((vocab,), -torch.inf)
    logits[torch.randperm(vocab)[:6]] = torch.randn(6)
    return logits


def around_zero(vocab: int) -> torch.Tensor:
    """Both zeros, and values of every size next to them: most of them differ by less than the search's first steps."""
    logits = torch.randn(vocab) * torch.exp2(-torch.randint(0, 100, (vocab,)).float())
    logits[:9], logits[9:20] = 0.0, -0.0
    return logits


def zeros_of_both_signs(vocab: int) -> torch.Tensor:
    """The second highest is a zero, and as many as outweigh the highest are its equals, of the other sign."""
    logits = -1 - torch.rand(vocab) * 10
    logits[: vocab * 3 // 4] = -0.0
    logits[7], logits[1] = 5.0, 0.0
    return logits


def extreme(vocab: int) -> torch.Tensor:
    logits = torch.randn(vocab) * 1e30
    logits[:2] = torch.tensor([3e38, -3e38])
    return logits


@pytest.mark.parametrize(
    "make", [spread, with_ties, all_equal, mostly_masked, around_zero, zeros_of_both_signs, extreme]
)
@pytest.mark.parametrize(
    ("dtype", "vocab", "most_groups"),
    [(torch.bfloat16, 256, 1), (torch.bfloat16, 300, 16), (torch.float16, 300, 64), (torch.float32, 256, 16)],
)
def test_filter_threshold(
    make: Callable[[int], torch.Tensor],
    dtype: torch.dtype,
    vocab: int,
    most_groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels keep what a sort keeps, with the vocabulary cut into stretches of 64 and groups of 8, of which one
    program searches as few, some, or all; and guesses from a sample of half of it."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 64)
    monkeypatch.setattr(gumbel_sample, "GROUP", 8)
    monkeypatch.setattr(filter_groups, "MOST_GROUPS", most_groups)
    monkeypatch.setattr(filter_guess, "_LEAST_LOOKED_AT", 128)
    torch.manual_seed(5)
    rows = len(FILTERS)
    monkeypatch.setattr(filter_threshold, "_PROGRAMS", 2 * rows)
    logits = torch.stack([make(vocab) for _ in range(rows)]).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    logits = torch.where(logits.isfinite(), logits, -torch.inf).to(dtype)
    columns = [torch.tensor([*column, 0]) for column in zip(*FILTERS)]
    options = columns[0].float(), columns[1].int(), columns[2].float(), columns[3].float()
    slots = torch.randperm(rows, dtype=torch.int32)
    logits = logits[slots]
    for implementation in (KERNELS, REFERENCES):
        threshold = implementation.filter_threshold(logits, slots, *options)
        for row in range(rows):
            temperature, top_k, top_p, min_p = FILTERS[slots[row]]
            if temperature == 0 or (not 0 < top_k < vocab and top_p == 1 and min_p == 0):
                assert threshold[row] == -torch.inf
                continue
            must, may = kept_by_definition(logits[row].float(), temperature, top_k, top_p, min_p, 1e-6)
            kept = (logits[row].float() >= threshold[row]) & (logits[row] > -torch.inf)
            assert not (must & ~kept).any(), (implementation is KERNELS, FILTERS[slots[row]])
            assert not (kept & ~may).any(), (implementation is KERNELS, FILTERS[slots[row]])


@pytest.mark.parametrize("elsewhere", [-3.0, 0.0, 3.0])
def test_a_top_p_is_found_whatever_a_sample_says(elsewhere: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not in the sample are about as high, much lower or much higher than it tells."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 64)
    monkeypatch.setattr(filter_groups, "MOST_GROUPS", 1)
    monkeypatch.setattr(filter_guess, "_LEAST_LOOKED_AT", 256)
    sampled = torch.arange(1024) % 64 < 16
    logits = (1.2 + torch.rand(3, 1024) + torch.where(sampled, 0.0, elsewhere)).to(torch.bfloat16)
    slots, ones, shares = torch.arange(3, dtype=torch.int32), torch.ones(4), torch.tensor([0.3, 0.9, 0.999, 1.0])
    threshold = KERNELS.filter_threshold(logits, slots, ones, 0 * ones.int(), shares, 0 * ones)
    for row in range(3):
        must, may = kept_by_definition(logits[row].float(), 1.0, 0, float(shares[row]), 0.0, 1e-6)
        kept = logits[row].float() >= threshold[row]
        assert not (must & ~kept).any()
        assert not (kept & ~may).any()


def test_rows_without_a_usable_logit_end_the_search() -> None:
    logits = torch.randn(4, 50)
    logits[0, 3], logits[1, 3], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    slots, ones = torch.arange(4, dtype=torch.int32), torch.ones(5)
    threshold = KERNELS.filter_threshold(logits, slots, ones, ones.int() * 5, ones * 0.9, ones * 0.1)
    tokens = KERNELS.sample(logits, slots, ones, torch.arange(5), slots, threshold)
    assert tokens.tolist() == [-1] * 4


@pytest.mark.parametrize("most_groups", [1, 128])
def test_what_a_row_keeps_and_draws_does_not_depend_on_the_batch(
    most_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes, few rows are split over more programs than many; sums are the same to the last bit."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 64)
    monkeypatch.setattr(filter_groups, "MOST_GROUPS", most_groups)
    monkeypatch.setattr(filter_threshold, "_PROGRAMS", 8)
    logits = torch.randn(8, 500).to(torch.bfloat16)
    slots, ones = torch.arange(8, dtype=torch.int32), torch.ones(9)
    options = (ones, 0 * ones.int(), ones * 0.8, 0 * ones)
    together = KERNELS.filter_threshold(logits, slots, *options)
    tokens = KERNELS.sample(logits, slots, ones, torch.arange(9), slots, together)
    for row in range(8):
        mine = slice(row, row + 1)
        assert torch.equal(KERNELS.filter_threshold(logits[mine], slots[mine], *options), together[mine])
        alone = KERNELS.sample(logits[mine], slots[mine], ones, torch.arange(9), slots[mine], together[mine])
        assert torch.equal(alone, tokens[mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [70, 300])
def test_edit_logits(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the vocabulary cut into stretches of 64; tokens are drawn from what was edited, recorded, and edit again."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 64)
    slots, rounds = 12, 4
    both = [random_edits(slots, vocab, "cpu", seed=vocab) for _ in range(2)]
    rows = torch.cat([torch.randperm(slots), torch.tensor([slots, slots])]).int()  # padding rows: the null slot
    positions = torch.cat([both[0][1][rows[:-2]], torch.zeros(2, dtype=torch.int32)])
    for _ in range(rounds):
        logits = (torch.randn(slots + 2, vocab + 3) * 4).to(dtype)[:, :vocab]
        logits[2, 5], logits[3, 6] = torch.nan, torch.inf
        edited = [
            implementation.edit_logits(logits, rows, positions, edits.tables)
            for implementation, (edits, _) in zip((KERNELS, REFERENCES), both, strict=True)
        ]
        assert edited[0].dtype == torch.float32
        torch.testing.assert_close(*edited, equal_nan=True, atol=1e-5, rtol=1e-5)
        assert edited[0][2, 5].isnan(), "whatever may not be drawn"
        tokens = KERNELS.argmax_sample(edited[1])
        assert tokens[2] == tokens[3] == -1
        for implementation, (edits, _) in zip((KERNELS, REFERENCES), both, strict=True):
            implementation.record_tokens(rows, positions, tokens, edits.tables)
        (first, _), (second, _) = both
        assert torch.equal(first.tables.counts, second.tables.counts)
        assert torch.equal(first.tables.recent[:-1], second.tables.recent[:-1])
        positions = positions + 1
    assert not first.tables.headers[-1].any()


def test_counts_stop_at_the_most_that_they_hold() -> None:
    edits = SlotEdits(1, 8, 0, torch.device("cpu"))
    edits.admit(admitted(0, [3], 1, LogitEdits(presence_penalty=1.0)))
    row, most = torch.zeros(1, dtype=torch.int32), 2**15 - 1
    edits.tables.counts[0, 3:5] += most - 1
    for implementation in (KERNELS, REFERENCES):
        for token in (3, 4, 4, 5):
            implementation.record_tokens(row, row, torch.tensor([token], dtype=torch.int32), edits.tables)
    assert edits.tables.counts[0].tolist() == [0, 0, 0, -1, most, 2, 0, 0]


def test_the_benchmarks_cases_of_what_prepares_and_ends_a_step_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are launched once a step, and nothing else launches all of them in the shapes that are timed."""
    monkeypatch.setattr(kernel_step_cases, "count_inputs", lambda size: 2)
    cases = [
        *kernel_step_cases.planning_cases(3),
        *kernel_step_cases.ending_cases(3),
        *kernel_step_cases.editing_cases(3, 5000),
    ]
    assert len({case.kernel for case in cases}) == 8
    for case in cases:
        for call in case.calls:
            call()
    changes, table = cases[1].calls[0].args[:2]
    assert table.view(-1)[changes[2:5]].tolist() == changes[5:8].tolist() == [0, 1, 2]
    edit = cases[-2].calls[0]
    torch.testing.assert_close(edit(), REFERENCES.edit_logits(*edit.args))
