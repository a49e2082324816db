"""Sampling options and log-probabilities over HTTP, with OpenAI's client: numbers are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from tokenizers import Tokenizer

from bundled import MODEL_DIR
from frontend import Client
from tests.e2e.conftest import RunningEngine
from tests.support.models import reference_model
from tests.support.requests import ask

MODEL = "tiny-qwen3"
STORY = "Once upon a time, a fox found a こんにちは"
QUESTION = ask("What is 3 plus 4?")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def ai(engine: RunningEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def reference_logprobs(ids: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]`: of what comes after each token."""
    with torch.inference_mode():
        return reference_model(MODEL_DIR)(torch.tensor([ids])).logits[0].log_softmax(-1)


def complete(ai: OpenAI, **options: Any) -> Any:
    return ai.completions.create(**{"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 20, **options})


def chat(ai: OpenAI, **options: Any) -> Any:
    return ai.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 40, **options}
    )


# --- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_chats_logprobs_are_those_of_transformers(ai: OpenAI, streams: bool) -> None:
    """The temperature makes no difference to them, and the thoughts have theirs as the rest of the answer."""
    options = {"logprobs": True, "top_logprobs": 4, "temperature": 0.9, "seed": 3}
    extra = {"return_token_ids": True}
    content: list[Any] = []
    if streams:
        prompt_ids, ids = [], []
        for chunk in chat(ai, **options, extra_body=extra, stream=True):
            prompt_ids += chunk.model_extra.get("prompt_token_ids", [])
            ids += chunk.choices[0].model_extra.get("token_ids") or []
            content += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    else:
        answer = chat(ai, **options, extra_body=extra)
        prompt_ids, ids = answer.model_extra["prompt_token_ids"], answer.choices[0].model_extra["token_ids"]
        content = answer.choices[0].logprobs.content
    assert len(content) == len(ids) > 20
    expected = reference_logprobs([*prompt_ids, *ids])[len(prompt_ids) - 1 : -1]
    best = expected.topk(4)
    for position, (entry, token) in enumerate(zip(content, ids, strict=True)):
        assert entry.logprob == pytest.approx(expected[position, token].item(), abs=TOLERANCE)
        top = [each.logprob for each in entry.top_logprobs]
        assert top == pytest.approx(best.values[position].tolist(), abs=TOLERANCE)
        assert top == sorted(top, reverse=True)


def test_a_completions_logprobs_are_those_of_transformers(ai: OpenAI, tokenizer: Tokenizer) -> None:
    choice = complete(ai, logprobs=2, extra_body={"return_token_ids": True}).choices[0]
    prompt_ids, ids = tokenizer.encode(STORY).ids, choice.model_extra["token_ids"]
    expected = reference_logprobs([*prompt_ids, *ids])[len(prompt_ids) - 1 : -1]
    found = choice.logprobs
    wanted = [expected[position, token].item() for position, token in enumerate(ids)]
    assert found.token_logprobs == pytest.approx(wanted, abs=TOLERANCE)
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(
        expected.max(-1).values.tolist(), abs=TOLERANCE
    )
    # Greedy, so the token that is there is the best, and the two best are all there are.
    assert {len(top) for top in found.top_logprobs} == {2}
    for token, offset, following in zip(found.tokens, found.text_offset, [*found.text_offset[1:], None], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset:following] == token
    streamed = [chunk.choices[0].logprobs for chunk in complete(ai, logprobs=2, stream=True)]
    assert [token for part in streamed if part for token in part.tokens] == found.tokens
    assert [value for part in streamed if part for value in part.token_logprobs] == pytest.approx(
        found.token_logprobs, abs=1e-4
    )


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echoed_prompts_logprobs_are_those_of_transformers(
    ai: OpenAI, tokenizer: Tokenizer, max_tokens: int
) -> None:
    choice = complete(ai, logprobs=1, echo=True, max_tokens=max_tokens, extra_body={"return_token_ids": True}).choices[
        0
    ]
    ids = [*tokenizer.encode(STORY).ids, *choice.model_extra["token_ids"]]
    expected = reference_logprobs(ids)
    wanted = [expected[position, token].item() for position, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=TOLERANCE)
    assert choice.text.startswith(STORY)
    assert (choice.text == STORY) == (max_tokens == 0)


def test_prompt_logprobs_are_those_of_transformers_whatever_is_cached(ai: OpenAI, tokenizer: Tokenizer) -> None:
    prompt = STORY * 4  # several blocks
    ids = tokenizer.encode(prompt).ids
    expected = reference_logprobs(ids)
    best = expected.topk(3)
    for _ in range(2):
        choice = complete(ai, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 3}).choices[0]
        first, *others = choice.model_extra["prompt_logprobs"]
        assert first is None
        for position, (at, token) in enumerate(zip(others, ids[1:], strict=True)):
            entry = at[str(token)]
            assert entry["logprob"] == pytest.approx(expected[position, token].item(), abs=TOLERANCE)
            ranked = sorted(at.values(), key=lambda each: each["rank"])[:3]
            assert [each["logprob"] for each in ranked] == pytest.approx(best.values[position].tolist(), abs=TOLERANCE)
            assert (expected[position] > expected[position, token] + 1e-4).sum() < entry["rank"]


# --- options that change the answer -------------------------------------------------------------------------------


def test_bias_and_bans_change_the_answer(ai: OpenAI, tokenizer: Tokenizer) -> None:
    def answer(**extra: Any) -> str:
        messages = ask("What is the capital of France?")
        return chat(ai, messages=messages, max_tokens=24, extra_body=extra).choices[0].message.content or ""

    (seven,) = tokenizer.encode("7", add_special_tokens=False).ids
    assert "Paris" in answer()
    assert "Paris" not in answer(bad_words=["Paris"])
    assert set(answer(allowed_token_ids=[seven])) == {"7"}
    assert set(answer(logit_bias={str(seven): 100})) == {"7"}
    assert len(answer(min_tokens=24)) > len(answer())


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.8}])
def test_a_penalty_makes_an_answer_repeat_itself_less(ai: OpenAI, penalty: dict[str, float]) -> None:
    def num_different(**extra: Any) -> int:
        extra |= {"ignore_eos": True, "return_token_ids": True}
        (choice,) = complete(ai, prompt="The fox and the fox", max_tokens=64, extra_body=extra).choices
        return len(set(choice.model_extra["token_ids"]))

    assert num_different(**penalty) > num_different()


def test_what_ends_an_answer_can_stay_in_it(ai: OpenAI) -> None:
    without = complete(ai, prompt="The capital of Italy is", stop=["me"]).choices[0]
    within = complete(
        ai, prompt="The capital of Italy is", stop=["me"], extra_body={"include_stop_str_in_output": True}
    )
    assert without.text + "me" == within.choices[0].text
    assert within.choices[0].finish_reason == "stop"


def test_choices_with_a_seed_differ_and_come_again(ai: OpenAI) -> None:
    options = {"n": 4, "temperature": 1.2, "seed": 5, "max_tokens": 24}
    answer = complete(ai, **options)
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) > 1
    assert [choice.text for choice in complete(ai, **options).choices] == texts
    assert complete(ai, **options | {"n": 1}).choices[0].text == texts[0]
    streamed = [""] * 4
    for chunk in complete(ai, **options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert answer.usage.prompt_tokens == complete(ai).usage.prompt_tokens


def test_a_prompt_is_cut_to_its_last_tokens(ai: OpenAI, tokenizer: Tokenizer) -> None:
    extra = {"truncate_prompt_tokens": 5, "return_token_ids": True}
    answer = complete(ai, extra_body=extra)
    assert answer.choices[0].model_extra["prompt_token_ids"] == tokenizer.encode(STORY).ids[-5:]
    assert answer.usage.prompt_tokens == 5


def test_probabilities_of_a_whole_vocabulary_sum_to_one(ai: OpenAI, client: Client) -> None:
    answer = chat(ai, logprobs=True, top_logprobs=-1, max_tokens=2)
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == client.engine.vocab_size
        assert sum(math.exp(each.logprob) for each in entry.top_logprobs) == pytest.approx(1, abs=1e-3)


# --- best_of --------------------------------------------------------------------------------------------------------


def test_best_of_returns_those_of_the_highest_mean_logprob_and_counts_all(ai: OpenAI) -> None:
    prompts = [STORY, "The dog"]
    # A seed with six different answers to each prompt: of equal ones rounding would say which is better.
    options: dict[str, Any] = {"prompt": prompts, "temperature": 2, "seed": 8, "max_tokens": 12}
    everything = complete(ai, n=6, logprobs=0, **options)
    expected = []
    for index in range(len(prompts)):
        of_prompt = everything.choices[6 * index : 6 * index + 6]
        means = [sum(each.logprobs.token_logprobs) / len(each.logprobs.tokens) for each in of_prompt]
        ranked = sorted(zip(means, of_prompt, strict=True), key=lambda each: -each[0])
        assert ranked[1][0] > ranked[2][0], "the worst may not be as good as the best"
        expected += [choice.text for _, choice in ranked[:2]]
    assert expected != [choice.text for start in (0, 6) for choice in everything.choices[start : start + 2]]
    best = complete(ai, n=2, best_of=6, **options)
    assert [choice.text for choice in best.choices] == expected
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    counts = (best.usage.prompt_tokens, best.usage.completion_tokens)
    assert counts == (everything.usage.prompt_tokens, everything.usage.completion_tokens)


def test_best_of_goes_with_logprobs_and_echo(ai: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 5, "best_of": 4, "prompt": [STORY, "The dog"]}
    plain = complete(ai, **options)
    shown = complete(ai, **options, logprobs=2, echo=True)
    for prompt, choice, alone in zip(options["prompt"], shown.choices, plain.choices, strict=True):
        assert choice.text == prompt + alone.text
        assert len(choice.logprobs.top_logprobs[-1]) in (2, 3)


def test_best_of_as_many_as_are_returned_changes_nothing_even_in_a_stream(ai: OpenAI) -> None:
    chunks = list(complete(ai, n=2, best_of=2, stream=True))
    texts = ["".join(each.choices[0].text for each in chunks if each.choices[0].index == index) for index in (0, 1)]
    assert texts == [choice.text for choice in complete(ai, n=2).choices]


def test_the_best_of_more_than_are_returned_cannot_be_streamed(ai: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        complete(ai, best_of=2, stream=True)
    assert caught.value.param == "best_of"
    assert "best_of must be 1, as n is, in a stream, got 2" in caught.value.message
