"""What min-p, top-k and top-p keep, said by their definitions, and when counts contradict a distribution."""

from __future__ import annotations

import torch


def kept_by_definition(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, tolerance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that must be kept and those that may be, which differ only where a tolerance is given: by how much
    a share of the probability may be off. A token is kept if it is at least min_p as likely as the most likely one,
    fewer than k tokens are likelier, and the likelier ones have less than top_p of the probability that is left.

    Args:
        logits: [vocab] of one row, without NaN.

    Returns:
        Two masks [vocab]; tokens of logit -inf are in neither.
    """
    values, order = logits.double().sort(descending=True)
    weights = ((values - values[0]) / temperature).exp()
    first_equal = torch.searchsorted(-values, -values)  # how many are likelier
    left = values > -torch.inf
    if 0 < top_k < len(values):
        left &= first_equal < top_k
    must, may = left, left
    if min_p > 0:
        must, may = left & (weights >= min_p * (1 + tolerance)), left & (weights >= min_p * (1 - tolerance))
    if top_p < 1:
        share = torch.where(may, weights, 0.0).cumsum(0)
        likelier = torch.where(first_equal > 0, share[(first_equal - 1).clamp(min=0)], 0.0) / share[-1]
        # A top_p of 1e-46 is 0 in float32, and the most likely token stays.
        must, may = must & (likelier < max(top_p - tolerance, 1e-9)), may & (likelier < max(top_p, 1e-9) + tolerance)
    masks = torch.zeros(2, len(values), dtype=torch.bool, device=logits.device)
    masks[:, order] = torch.stack((must, may))
    return masks[0], masks[1]


def assert_drawn_from(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-square test at the 99.99 % quantile (Wilson and Hilferty's approximation).

    Args:
        tokens: [draws] ids.
        probabilities: [vocab]; those above 0 should expect five draws or more.
    """
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities.double()[possible] * len(tokens)
    assert expected.min() >= 5
    degrees = len(expected) - 1
    if degrees:
        limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
        assert ((counts[possible] - expected) ** 2 / expected).sum() < limit
