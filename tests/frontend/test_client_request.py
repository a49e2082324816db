"""What users may pass as prompts, conversations and sampling parameters, and how everything else is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frontend.client_request import as_chat_prompt, as_conversations, as_prompt, as_prompts, params_for_each
from protocol.errors import InvalidRequestError
from protocol.messages import ChatPrompt, TextPrompt, TokenPrompt, pack_ints
from protocol.sampling import SamplingParams

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
BYE: dict[str, Any] = {"role": "user", "content": "bye"}
ONE_TWO = TokenPrompt(pack_ints([1, 2]))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", [TextPrompt("text")]),
        ("", [TextPrompt("")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        (("a", "b"), [TextPrompt("a"), TextPrompt("b")]),
        ((text for text in "ab"), [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [ONE_TWO]),
        ((1, 2), [ONE_TWO]),
        (range(1, 3), [ONE_TWO]),
        (np.array([1, 2]), [ONE_TWO]),
        (np.array([1, 2], dtype=np.uint16), [ONE_TWO]),
        ([[1, 2], [1, 2]], [ONE_TWO, ONE_TWO]),
        (np.array([[1, 2], [1, 2]]), [ONE_TWO, ONE_TWO]),
        ([np.array([1, 2]), (1, 2)], [ONE_TWO, ONE_TWO]),
        (["a", [1, 2]], [TextPrompt("a"), ONE_TWO]),
        ({"prompt": "a"}, [TextPrompt("a")]),
        ({"prompt_token_ids": [1, 2]}, [ONE_TWO]),
        ([{"prompt": "a"}, {"prompt_token_ids": (1, 2)}], [TextPrompt("a"), ONE_TWO]),
        ({"prompt": "a", "prompt_token_ids": [1, 2]}, [ONE_TWO]),
        ([], []),
        ([[]], [TokenPrompt(b"")]),
    ],
    # Not all of their text: a generator's has an address.
    ids=lambda prompts: type(prompts).__name__,
)
def test_prompts_come_in_the_forms_that_vllm_takes(prompts: Any, expected: list[Any]) -> None:
    assert as_prompts(prompts) == expected


@pytest.mark.parametrize(
    "prompts",
    [None, 5, 1.5, True, [None], [1.5], [[1.5]], [1, "a"], [True, False], [[1, [2]]], {"text": "a"}, {}, [{}]],
    ids=str,
)
def test_what_is_no_prompt_is_refused(prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"token.ids") as caught:
        as_prompts(prompts)
    assert caught.value.param in ("prompt", "prompts")


@pytest.mark.parametrize("data", [b"text", bytearray(b"text"), [b"text"]], ids=str)
def test_bytes_are_not_taken_for_token_ids(data: Any) -> None:
    with pytest.raises(InvalidRequestError, match="text or a list of token ids"):
        as_prompts(data)


@pytest.mark.parametrize(
    "ids", [[1, 2**31], [-(2**31) - 1], [2**80], np.array([1, 2**40]), np.array([2**32 + 5])], ids=str
)
def test_an_id_that_does_not_fit_is_named_and_never_wraps(ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match=str(max(map(int, ids), key=abs))) as caught:
        as_prompts(ids)
    assert caught.value.param == "prompt"


def test_a_field_of_a_prompt_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        as_prompt({"prompt": "a", "cache_salt": "tenant"})
    assert as_prompt({"prompt": "a", "multi_modal_data": None}) == TextPrompt("a")


@pytest.mark.parametrize("ids", ["text", {"prompt": "a"}, None, 5], ids=str)
def test_prompt_token_ids_must_be_token_ids(ids: Any) -> None:
    with pytest.raises(InvalidRequestError):
        as_prompt({"prompt_token_ids": ids})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HELLO], [[HELLO]]),
        ((HELLO, BYE), [(HELLO, BYE)]),
        ([[HELLO], [BYE]], [[HELLO], [BYE]]),
        (((HELLO,), [BYE, HELLO]), [(HELLO,), [BYE, HELLO]]),
    ],
    ids=str,
)
def test_one_conversation_is_told_from_several(messages: Any, expected: list[Any]) -> None:
    assert as_conversations(messages) == expected


@pytest.mark.parametrize(
    "messages",
    [None, "hello", [], HELLO, 5, ["hello"], [[HELLO], "hello"], [HELLO, "hello"], [[HELLO], ["hello"]]],
    ids=str,
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        [as_chat_prompt(conversation, None, None) for conversation in as_conversations(messages)]
    assert caught.value.param == "messages"


def test_a_chat_prompt_is_a_copy_in_plain_types() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    prompt = as_chat_prompt((HELLO,), (tool,), {"enable_thinking": False})
    assert prompt == ChatPrompt([HELLO], [tool], {"enable_thinking": False})
    assert as_chat_prompt([HELLO], None, None) == ChatPrompt([HELLO], None, {})


@pytest.mark.parametrize("tools", ["get_weather", ["get_weather"], {"name": "f"}, 5], ids=str)
def test_tools_must_be_objects(tools: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_chat_prompt([HELLO], tools, None)
    assert caught.value.param == "tools"


def test_parameters_are_for_all_prompts_or_one_for_each() -> None:
    greedy, short = SamplingParams(temperature=0), SamplingParams(max_tokens=1)
    assert params_for_each(None, 2) == [SamplingParams()] * 2
    assert params_for_each(greedy, 3) == [greedy] * 3
    assert params_for_each([greedy, short], 2) == [greedy, short]
    assert params_for_each((short,), 1) == [short]
    assert params_for_each([], 0) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([SamplingParams()], "1 sampling_params for 2 prompts"),
        ([SamplingParams()] * 3, "3 sampling_params for 2 prompts"),
        ({"temperature": 0.0, "top_p": 1.0}, "sampling_params must be"),
        ([{"temperature": 0.0}] * 2, "sampling_params must be"),
        ([SamplingParams(), None], "sampling_params must be"),
        ("ab", "sampling_params must be"),
        (0.5, "sampling_params must be"),
    ],
    ids=str,
)
def test_parameters_of_another_number_or_kind_are_refused(params: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        params_for_each(params, 2)
    assert caught.value.param == "sampling_params"
