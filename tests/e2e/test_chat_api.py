"""Thoughts, function calls and the forms of messages, with OpenAI's client and the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from frontend import Client, SamplingParams
from tests.e2e.conftest import RunningEngine
from tests.support.requests import TIME, WEATHER, ask

MODEL = "tiny-qwen3"
TOOLS = [WEATHER, TIME]
SUM = "What is 3 plus 4?"
PARIS = "What is the weather in Paris?"
TWO_CITIES = "What is the weather in Paris and in Rome?"
TWO_TOOLS = "What is the weather in Paris, and what is the time in Rome?"


@pytest.fixture(scope="module")
def ai(engine: RunningEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def chat(ai: OpenAI, messages: Any, **options: Any) -> ChatCompletion:
    messages = ask(messages) if isinstance(messages, str) else messages
    return ai.chat.completions.create(model=MODEL, messages=messages, temperature=0, **options)


def chunks_of(ai: OpenAI, messages: Any, **options: Any) -> list[ChatCompletionChunk]:
    messages = ask(messages) if isinstance(messages, str) else messages
    return list(ai.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True, **options))


def joined(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """The message that a stream adds up to, as its deltas say."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": "", "calls": []}
    for chunk in chunks:
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        for name in ("reasoning_content", "reasoning"):
            message[name] += (delta.model_extra or {}).get(name) or ""
        for call in delta.tool_calls or []:
            assert call.function is not None
            if call.index == len(message["calls"]):
                assert (call.type, (call.id or "")[:5]) == ("function", "call_")
                message["calls"].append([call.function.name, ""])
            else:
                assert (call.index, call.id, call.type) == (len(message["calls"]) - 1, None, None)
                assert call.function.name is None
            message["calls"][-1][1] += call.function.arguments or ""
    return message


def calls_of(answer: ChatCompletion) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in answer.choices[0].message.tool_calls or []]


# --- thoughts -------------------------------------------------------------------------------------------------------


def test_thoughts_are_told_from_the_answer_whole_and_streamed(ai: OpenAI, client: Client) -> None:
    message = chat(ai, SUM).choices[0].message
    assert message.content == "3 plus 4 is 7."
    thoughts = message.reasoning_content
    assert thoughts.endswith("3 + 4 = 7.")
    assert message.reasoning == thoughts
    (raw,) = client.chat(ask(SUM), SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
    assert raw.outputs[0].text == f"<think>\n{thoughts}\n</think>\n\n{message.content}"

    chunks = chunks_of(ai, SUM)
    expected = {"content": message.content, "reasoning_content": thoughts, "reasoning": thoughts, "calls": []}
    assert joined(chunks) == expected
    assert len(chunks) > 4
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_without_thoughts_has_no_such_field(ai: OpenAI) -> None:
    message = chat(ai, "What is the capital of France?").choices[0].message
    assert "Paris" in (message.content or "")
    assert "reasoning_content" not in (message.model_extra or {})
    assert "reasoning" not in (message.model_extra or {})


def test_thinking_can_be_disabled_and_thoughts_left_out(ai: OpenAI) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    hidden = {"include_reasoning": False}
    for extra in (off, hidden):
        message = chat(ai, SUM, extra_body=extra).choices[0].message
        assert message.content == "3 plus 4 is 7."
        assert message.model_extra == {}
        streamed = joined(chunks_of(ai, SUM, extra_body=extra))
        assert (streamed["content"], streamed["reasoning"]) == (message.content, "")


def test_thoughts_that_are_cut_off_are_thoughts(ai: OpenAI) -> None:
    answer = chat(ai, SUM, max_tokens=6)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == (None, "length")
    assert message.reasoning_content == "I have to work"
    assert joined(chunks_of(ai, SUM, max_tokens=6))["reasoning_content"] == message.reasoning_content


def test_an_answer_goes_on_within_its_thoughts(ai: OpenAI) -> None:
    whole = chat(ai, SUM).choices[0].message
    thoughts = whole.reasoning_content
    beginning, rest = thoughts[:9], thoughts[9:]
    messages = [*ask(SUM), {"role": "assistant", "content": f"<think>\n{beginning}"}]
    going_on = {"continue_final_message": True}
    message = chat(ai, messages, extra_body=going_on).choices[0].message
    assert (message.reasoning_content, message.content) == (rest, whole.content)
    streamed = joined(chunks_of(ai, messages, extra_body=going_on))
    assert (streamed["reasoning_content"], streamed["content"]) == (rest, whole.content)


def test_an_answer_goes_on_behind_its_thoughts(ai: OpenAI) -> None:
    for final in (
        {"role": "assistant", "content": "<think>\nI have to work out 3 plus 4. 3 + 4 = 7.\n</think>\n\n3 plus 4"},
        {"role": "assistant", "content": "3 plus 4"},
    ):
        extra = {"continue_final_message": True, "add_generation_prompt": False}
        message = chat(ai, [*ask(SUM), final], extra_body=extra).choices[0].message
        assert message.content == " is 7."
        assert message.model_extra == {}


# --- function calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "calls"),
    [
        (PARIS, [["get_weather", '{"city": "Paris"}']]),
        (TWO_CITIES, [["get_weather", '{"city": "Paris"}'], ["get_weather", '{"city": "Rome"}']]),
        (TWO_TOOLS, [["get_weather", '{"city": "Paris"}'], ["get_time", '{"city": "Rome"}']]),
    ],
    ids=["one", "parallel", "two tools"],
)
def test_calls_are_found_whole_and_streamed(ai: OpenAI, question: str, calls: list[list[str]]) -> None:
    answer = chat(ai, question, tools=TOOLS)
    assert calls_of(answer) == calls
    message, finish_reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert (message.content, finish_reason) == (None, "tool_calls")
    assert len({call.id for call in message.tool_calls or []}) == len(calls)

    chunks = chunks_of(ai, question, tools=TOOLS, tool_choice="auto")
    assert joined(chunks) == {"content": "", "reasoning_content": "", "reasoning": "", "calls": calls}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # Arguments come as they are written, not at the end.
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) >= 4 * len(calls)

    with ai.chat.completions.stream(model=MODEL, messages=ask(question), tools=TOOLS, temperature=0) as stream:
        final = stream.get_final_completion()
    assert calls_of(final) == calls


def test_one_call_where_several_are_not_wanted(ai: OpenAI) -> None:
    first = [["get_weather", '{"city": "Paris"}']]
    assert calls_of(chat(ai, TWO_CITIES, tools=TOOLS, parallel_tool_calls=False)) == first
    assert joined(chunks_of(ai, TWO_CITIES, tools=TOOLS, parallel_tool_calls=False))["calls"] == first


def test_without_a_choice_no_tools_are_shown(ai: OpenAI) -> None:
    with_none, without = chat(ai, PARIS, tools=TOOLS, tool_choice="none"), chat(ai, PARIS)
    assert with_none.choices[0].message == without.choices[0].message
    assert with_none.usage.prompt_tokens == without.usage.prompt_tokens
    assert with_none.choices[0].message.tool_calls is None


def test_the_results_of_calls_are_answered(ai: OpenAI) -> None:
    called = chat(ai, TWO_CITIES, tools=TOOLS).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 10 + i, "condition": "sunny"})}
        for i, call in enumerate(called.tool_calls or [])
    ]
    # The message as the client gives it, and as users write it.
    for message in (called, called.model_dump(), called.model_dump(exclude_none=True)):
        answer = chat(ai, [*ask(TWO_CITIES), message, *results], tools=TOOLS)
        assert answer.choices[0].message.content == (
            "In Paris it is sunny and 10 degrees. In Rome it is sunny and 11 degrees."
        )
        assert answer.choices[0].finish_reason == "stop"


def test_a_call_that_is_cut_off_is_text_or_what_was_passed_on(ai: OpenAI) -> None:
    answer = chat(ai, PARIS, tools=TOOLS, max_tokens=14)
    assert answer.choices[0].finish_reason == "length"
    text = answer.choices[0].message.content or ""
    assert text.startswith('<tool_call>\n{"name": "get_weather", "arguments": {')
    assert answer.choices[0].message.tool_calls is None
    chunks = chunks_of(ai, PARIS, tools=TOOLS, max_tokens=14)
    ((name, arguments),) = joined(chunks)["calls"]
    assert (name, text.endswith(arguments), arguments[:1]) == ("get_weather", True, "{")
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_and_a_call_that_goes_on_come_apart(ai: OpenAI) -> None:
    messages = [*ask(PARIS), {"role": "assistant", "content": 'Let me look.\n<tool_call>\n{"name": "get_weather"'}]
    answer = chat(ai, messages, tools=TOOLS, extra_body={"continue_final_message": True})
    # The call's beginning is in the prompt, so that what is generated is no call by itself.
    assert answer.choices[0].message.tool_calls is None
    assert '"city": "Paris"' in (answer.choices[0].message.content or "")


def test_parsers_can_be_switched_off(start_engine: Any) -> None:
    flags = ("--reasoning-parser", "none", "--tool-call-parser", "none")
    engine = start_engine("--port", "0", *flags).wait_until_ready()
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:
        assert (chat(ai, SUM).choices[0].message.content or "").startswith("<think>\n")
        answer = chat(ai, PARIS, tools=TOOLS)
        assert (answer.choices[0].message.content or "").startswith("<tool_call>\n")
        assert answer.choices[0].finish_reason == "stop"


# --- messages -------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_and_other_parts_are_refused_by_name(ai: OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    with_parts = chat(ai, [{"role": "user", "content": parts}])
    assert with_parts.choices[0].message == chat(ai, "What is the capital\nof France?").choices[0].message
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\].content\[2\] must be a text part, got 'image_url'"
    ):
        chat(ai, [{"role": "user", "content": [*parts, image]}])


def test_a_developer_is_the_system(ai: OpenAI) -> None:
    as_developer, as_system = (
        chat(ai, [{"role": role, "content": "Answer in one word."}, *ask("What is the capital of France?")])
        for role in ("developer", "system")
    )
    assert as_developer.choices[0].message == as_system.choices[0].message
    assert as_developer.usage.prompt_tokens == as_system.usage.prompt_tokens
