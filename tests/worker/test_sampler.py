"""The filters keep what their definitions say, and what is drawn has the right distribution."""

import pytest
import torch

from tests.support.sampling import assert_drawn_from, kept_by_definition
from worker.batch_state import BatchState
from worker.kernels import gumbel_sample, select
from worker.kernels.filter_threshold import filter_threshold_reference
from worker.sampler import SamplingVariant, sample_tokens


def kept(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[bool]:
    """What one row keeps, by the reference."""
    threshold = filter_threshold_reference(
        logits[None], torch.tensor([0]), torch.tensor([temperature]), torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p]), torch.tensor([min_p]),
    )  # fmt: skip
    return (logits >= threshold).tolist()


@pytest.mark.parametrize("vocab", [7, 1000, 20_000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 0.9, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 50, 0.8, 0.0),
        (1.0, 0, 1.0, 0.0),
        (1.0, 1, 0.5, 0.0),
        (0.3, 3, 0.01, 0.0),
        (2.0, 4, 0.99, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.5, 20, 0.95, 0.05),
        (0.8, 0, 0.6, 0.2),
    ],
)
def test_the_filters_keep_what_their_definitions_say(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    expected, _ = kept_by_definition(logits, temperature, top_k, top_p, min_p)
    assert kept(logits, temperature, top_k, top_p, min_p) == expected.tolist()


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    expected = [False, True, True, True, False]
    assert kept(logits, top_k=2) == kept(logits, top_p=0.4) == kept(logits, min_p=1.0) == expected


def test_each_filter_works_on_what_the_one_before_has_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(logits, top_p=0.75) == [True, True, True, False]
    assert kept(logits, top_k=2, top_p=0.75) == [True, True, False, False]
    assert kept(logits, top_k=2, top_p=0.55) == [True, False, False, False]
    assert kept(logits, min_p=0.7, top_p=0.55) == [True, False, False, False]


def test_greedy_rows_of_a_mixed_batch_are_left_alone() -> None:
    assert all(kept(torch.randn(50), temperature=0.0, top_k=3, top_p=0.1, min_p=0.5))


def test_a_top_p_that_float32_cannot_hold_keeps_the_most_likely_token() -> None:
    assert kept(torch.tensor([1.0, 4.0, 2.0]), top_p=1e-46) == [False, True, False]


def test_nan_is_reported_whatever_the_filters() -> None:
    logits = torch.randn(2, 50)
    logits[0, 7] = torch.nan
    state = make_state(2, top_k=5, top_p=0.5, min_p=0.1)
    tokens = sample_tokens(
        logits, torch.arange(2), torch.zeros(2, dtype=torch.int32), state, SamplingVariant.FULL, select("cpu")
    )
    assert tokens[0] == -1
    assert tokens[1] >= 0


def make_state(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> BatchState:
    state = BatchState(rows, 64, 16, torch.device("cpu"), select("cpu"))
    state.temperature[:rows] = temperature
    state.top_k[:rows] = top_k
    state.top_p[:rows] = top_p
    state.min_p[:rows] = min_p
    state.seed[:rows] = torch.arange(rows) * 7919
    return state


@pytest.mark.parametrize("stretches", [1, 3])
@pytest.mark.parametrize(
    ("variant", "temperature", "top_k", "top_p", "min_p"),
    [
        (SamplingVariant.PLAIN, 1.0, 0, 1.0, 0.0),
        (SamplingVariant.PLAIN, 0.5, 0, 1.0, 0.0),
        (SamplingVariant.FULL, 1.0, 0, 1.0, 0.0),
        (SamplingVariant.FULL, 1.0, 9, 1.0, 0.0),
        (SamplingVariant.FULL, 1.0, 0, 0.7, 0.0),
        (SamplingVariant.FULL, 1.2, 0, 1.0, 0.1),
        (SamplingVariant.FULL, 1.5, 12, 0.8, 0.0),
        (SamplingVariant.FULL, 0.7, 9, 1.0, 0.02),
        (SamplingVariant.FULL, 1.0, 0, 0.9, 0.04),
        (SamplingVariant.FULL, 1.5, 14, 0.9, 0.05),
    ],
)
def test_draws_follow_the_distribution(
    variant: SamplingVariant, temperature: float, top_k: int, top_p: float, min_p: float, stretches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the vocabulary in one stretch, and cut into three."""
    draws, vocab = 20_000, 40
    if stretches == 3:
        monkeypatch.setattr(gumbel_sample, "STRETCH", 16)
    logits = torch.linspace(-1.5, 1.5, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(1))]
    state = make_state(draws, temperature, top_k, top_p, min_p)
    must, _ = kept_by_definition(logits, temperature, top_k, top_p, min_p)
    expected = (logits.double() / temperature).masked_fill(~must, -torch.inf).softmax(-1)
    slots = torch.arange(draws, dtype=torch.int32)
    for position in (5 + 0 * slots, slots):  # by seed, and by position with one seed
        tokens = sample_tokens(logits.expand(draws, vocab), slots, position, state, variant, select("cpu"))
        assert_drawn_from(tokens, expected)
        state.seed[:] = 11


def test_a_stretch_and_its_tokens_have_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equals each is drawn as often; were noise shared, the first stretch would be drawn for its first token's."""
    monkeypatch.setattr(gumbel_sample, "STRETCH", 16)
    draws, vocab = 20_000, 64
    tokens = sample_tokens(
        torch.zeros(1, vocab).expand(draws, vocab), torch.zeros(draws, dtype=torch.int32),
        torch.arange(draws, dtype=torch.int32), make_state(1), SamplingVariant.PLAIN, select("cpu"),
    )  # fmt: skip
    assert_drawn_from(tokens, torch.full((vocab,), 1 / vocab))


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 200).expand(6, 200)
    state = make_state(6)
    state.seed[:6] = torch.tensor([1, 1, 1, 2, 1, 1])
    positions = torch.tensor([4, 4, 5, 4, 6, 4], dtype=torch.int32)
    tokens = sample_tokens(logits, torch.arange(6), positions, state, SamplingVariant.PLAIN, select("cpu")).tolist()
    assert tokens[0] == tokens[1] == tokens[5]
    assert len(set(tokens)) > 1
