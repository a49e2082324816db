"""Top-k and top-p keep the tokens that a sort would keep, and what is drawn has the right distribution."""

import pytest
import torch

from worker.batch_state import BatchState
from worker.kernels import select
from worker.sampler import SamplingVariant, mask_top_k_top_p, sample_tokens


def kept_by_sorting(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> set[int]:
    """The definition: sort, keep k, renormalise, keep the shortest prefix that reaches top_p."""
    probs, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    if top_k:
        probs, order = probs[:top_k], order[:top_k]
    cumulative = (probs / probs.sum()).cumsum(-1)
    length = int((cumulative < top_p).sum()) + 1 if top_p < 1 else len(probs)
    return set(order[:length].tolist())


@pytest.mark.parametrize("vocab", [7, 1000, 20_000])
def test_mask_keeps_what_a_sort_would_keep(vocab: int) -> None:
    torch.manual_seed(vocab)
    cases = [(1.0, 0, 0.9), (0.7, 5, 1.0), (1.3, 50, 0.8), (1.0, 0, 1.0), (1.0, 1, 0.5), (0.3, 3, 0.01), (2.0, 4, 0.99)]
    logits = torch.randn(len(cases), vocab) * 3
    columns = [torch.tensor(column) for column in zip(*cases)]
    masked = mask_top_k_top_p(logits, columns[0].float(), columns[1].int(), columns[2].float())
    for row, (temperature, top_k, top_p) in enumerate(cases):
        kept = set(torch.nonzero(masked[row] > -torch.inf).flatten().tolist())
        assert kept == kept_by_sorting(logits[row], temperature, min(top_k, vocab), top_p), cases[row]
        assert torch.equal(masked[row][sorted(kept)], logits[row][sorted(kept)])


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    masked = mask_top_k_top_p(
        torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), torch.ones(1), torch.tensor([2]), torch.ones(1)
    )
    assert (masked > -torch.inf).tolist() == [[False, True, True, True, False]]


def test_greedy_rows_of_a_mixed_batch_are_left_alone() -> None:
    logits = torch.randn(1, 50)
    masked = mask_top_k_top_p(logits, torch.zeros(1), torch.tensor([3]), torch.tensor([0.1]))
    assert torch.equal(masked, logits)


def test_a_top_p_that_float32_cannot_hold_keeps_the_most_likely_token() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0]])
    masked = mask_top_k_top_p(logits, torch.ones(1), torch.tensor([0]), torch.tensor([1e-46], dtype=torch.float32))
    assert (masked > -torch.inf).tolist() == [[False, True, False]]


def test_nan_survives_the_mask() -> None:
    logits = torch.randn(2, 50)
    logits[0, 7] = torch.nan
    state = make_state(2, top_k=5, top_p=0.5)
    tokens = sample_tokens(
        logits, torch.arange(2), torch.zeros(2, dtype=torch.int32), state, SamplingVariant.FULL, select("cpu")
    )
    assert tokens[0] == -1
    assert tokens[1] >= 0


def make_state(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> BatchState:
    state = BatchState(rows, 64, 16, torch.device("cpu"))
    state.temperature[:rows] = temperature
    state.top_k[:rows] = top_k
    state.top_p[:rows] = top_p
    state.seed[:rows] = torch.arange(rows) * 7919
    return state


@pytest.mark.parametrize(
    ("variant", "temperature", "top_k", "top_p"),
    [
        (SamplingVariant.PLAIN, 1.0, 0, 1.0),
        (SamplingVariant.PLAIN, 0.5, 0, 1.0),
        (SamplingVariant.FULL, 1.0, 4, 1.0),
        (SamplingVariant.FULL, 1.0, 0, 0.7),
        (SamplingVariant.FULL, 1.5, 6, 0.8),
    ],
)
def test_draws_follow_the_distribution(variant: SamplingVariant, temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(1)
    vocab, draws = 12, 20_000
    logits = torch.randn(vocab) * 2
    state = make_state(draws, temperature, top_k, top_p)
    tokens = sample_tokens(
        logits.expand(draws, vocab), torch.arange(draws), torch.full((draws,), 5, dtype=torch.int32), state, variant,
        select("cpu"),
    )  # fmt: skip
    kept = sorted(kept_by_sorting(logits, temperature, top_k, top_p))
    expected = torch.zeros(vocab)
    expected[kept] = (logits[kept] / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    # The 99.99 % quantile of the chi-square distribution with at most 11 degrees of freedom is 37.4.
    assert chi_square < 37.4


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 200).expand(6, 200)
    state = make_state(6)
    state.seed[:6] = torch.tensor([1, 1, 1, 2, 1, 1])
    positions = torch.tensor([4, 4, 5, 4, 6, 4], dtype=torch.int32)
    tokens = sample_tokens(logits, torch.arange(6), positions, state, SamplingVariant.PLAIN, select("cpu")).tolist()
    assert tokens[0] == tokens[1] == tokens[5]
    assert len(set(tokens)) > 1
