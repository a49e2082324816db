"""Sampling parameters refuse what cannot be served, by name and value."""

import pytest

from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("min_p", "0.1"),
        ("seed", 2**63),
        ("seed", "1"),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 2.5),
        ("stop", ""),
        ("stop", 7),
        ("stop", [7]),
        ("stop", ["x"] * 65),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("detokenize", "no"),
    ],
)
def test_bad_value_is_refused_with_field_and_value(param: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param
    assert param in str(caught.value)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_one_string_or_a_list_or_nothing_is_the_same_as_a_tuple() -> None:
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)


@pytest.mark.parametrize(
    ("temperature", "top_k", "greedy"), [(0, 0, True), (1e-38, 0, True), (1, 1, True), (1, 0, False), (0.5, 2, False)]
)
def test_greedy_is_temperature_zero_or_one_candidate(temperature: float, top_k: int, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature, top_k=top_k).is_greedy is greedy
