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
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "0"),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: None}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("logit_bias", "5"),
        ("logit_bias", 5),
        ("logit_bias", [5]),
        ("bad_words", [""]),
        ("bad_words", [3]),
        ("bad_words", ["x"] * 129),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", ["a"]),
        ("n", 0),
        ("n", 129),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("include_stop_str_in_output", None),
        ("logprobs", 21),
        ("logprobs", -2),
        ("logprobs", True),
        ("prompt_logprobs", 1.0),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
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
    assert SamplingParams(bad_words=["a"]).bad_words == ("a",)
    assert SamplingParams(allowed_token_ids=[3, 4]).allowed_token_ids == (3, 4)
    assert SamplingParams(bad_words=None, logit_bias=None) == SamplingParams()


def test_a_bias_is_given_by_token_id_or_as_json_has_it() -> None:
    assert SamplingParams(logit_bias={5: 1, 7: -100.0}).logit_bias == ((5, 1.0), (7, -100.0))
    assert SamplingParams(logit_bias={"5": 1}) == SamplingParams(logit_bias=[(5, 1)])


def test_choices_are_requests_of_their_own_with_seeds_that_follow_from_the_first() -> None:
    params = SamplingParams(n=3, seed=11, min_p=0.1)
    choices = [params.choice(index) for index in range(3)]
    assert choices[0] == SamplingParams(seed=11, min_p=0.1)
    assert choices == [params.choice(index) for index in range(3)]
    seeds = {choice.seed for choice in choices} | {SamplingParams(n=3, seed=12).choice(1).seed}
    assert len(seeds) == 4
    assert {choice.n for choice in choices} == {1}
    assert SamplingParams(n=2).choice(1) == SamplingParams()


@pytest.mark.parametrize(
    ("temperature", "top_k", "greedy"), [(0, 0, True), (1e-38, 0, True), (1, 1, True), (1, 0, False), (0.5, 2, False)]
)
def test_greedy_is_temperature_zero_or_one_candidate(temperature: float, top_k: int, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature, top_k=top_k).is_greedy is greedy
