"""The Responses API of the real engine with OpenAI's client: answers, tools, conversations, cancelling."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from frontend import Client
from tests.e2e.conftest import RunningEngine
from tests.support.requests import TIME, WEATHER, ask, is_idle, wait_until

MODEL = "tiny-qwen3"
TOOLS: Any = [{"type": "function", **tool["function"], "strict": True} for tool in (WEATHER, TIME)]
SUM = "What is 3 plus 4?"
TWO_CITIES = "What is the weather in Paris and in Rome?"
RESULT = '{"temperature": 12, "condition": "sunny"}'
SUNNY = "In Paris it is sunny and 12 degrees. In Rome it is sunny and 12 degrees."
ENDLESS = {"max_output_tokens": 1900, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def ai(engine: RunningEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def respond(ai: OpenAI, input: Any, **options: Any) -> Response:
    return ai.responses.create(model=MODEL, input=input, temperature=0, **options)


def outputs_of(response: Response) -> list[Any]:
    """The results of the functions that a response calls."""
    calls = [item for item in response.output if item.type == "function_call"]
    return [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT} for call in calls]


def test_a_response_says_what_a_chat_says(ai: OpenAI) -> None:
    response = respond(ai, SUM, instructions="Be brief.", metadata={"a": "b"})
    chat = ai.chat.completions.create(
        model=MODEL, temperature=0, messages=[{"role": "system", "content": "Be brief."}, *ask(SUM)]
    )
    message = chat.choices[0].message
    thoughts, said = response.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", message.reasoning_content)
    assert (said.type, response.output_text) == ("message", message.content)
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0)
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


def test_a_stream_makes_the_same_response(ai: OpenAI) -> None:
    whole = respond(ai, SUM)
    with ai.responses.stream(model=MODEL, input=SUM, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(said) == final.output_text == whole.output_text
    assert "".join(thoughts) == whole.output[0].content[0].text
    # Not by how many tokens there are: those of several steps may come in one event.
    assert len(said) + len(thoughts) > 3
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("stream", [False, True])
def test_functions_are_called_and_their_results_answered(ai: OpenAI, stream: bool) -> None:
    if stream:
        with ai.responses.stream(model=MODEL, input=TWO_CITIES, tools=TOOLS, temperature=0) as events:
            called = events.get_final_response()
    else:
        called = respond(ai, TWO_CITIES, tools=TOOLS)
    calls = [(item.type, item.name, item.arguments, item.status) for item in called.output]
    assert calls == [
        ("function_call", "get_weather", '{"city": "Paris"}', "completed"),
        ("function_call", "get_weather", '{"city": "Rome"}', "completed"),
    ]
    # The conversation sent whole, and continued from what the engine has kept.
    items = [item.to_dict() for item in called.output]
    for item in items:
        item.pop("parsed_arguments", None)
    answer = respond(ai, [*ask(TWO_CITIES), *items, *outputs_of(called)], tools=TOOLS)
    assert answer.output_text == SUNNY
    answer = respond(ai, outputs_of(called), tools=TOOLS, previous_response_id=called.id)
    assert (answer.output_text, answer.previous_response_id) == (SUNNY, called.id)


def test_one_call_where_several_are_not_wanted(ai: OpenAI) -> None:
    response = respond(ai, TWO_CITIES, tools=TOOLS, parallel_tool_calls=False)
    assert [item.arguments for item in response.output] == ['{"city": "Paris"}']


def test_a_conversation_goes_on_from_response_to_response_without_its_instructions(ai: OpenAI) -> None:
    first = respond(ai, "My name is Anna.", instructions="Be kind.")
    second = respond(ai, "What is the capital of France?", previous_response_id=first.id)
    third = respond(ai, "What is my name?", previous_response_id=second.id)
    assert "Anna" in third.output_text
    messages = [
        *ask("My name is Anna."),
        {"role": "assistant", "content": first.output_text},
        *ask("What is the capital of France?"),
        {"role": "assistant", "content": second.output_text},
        *ask("What is my name?"),
    ]
    chat = ai.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert (third.output_text, third.usage.input_tokens) == (chat.choices[0].message.content, chat.usage.prompt_tokens)


def test_stored_responses_can_be_read_and_deleted(ai: OpenAI) -> None:
    response = respond(ai, SUM)
    assert ai.responses.retrieve(response.id) == response
    ai.responses.delete(response.id)
    for use in (
        lambda: ai.responses.retrieve(response.id),
        lambda: ai.responses.delete(response.id),
        lambda: ai.responses.cancel(response.id),
        lambda: respond(ai, "And then?", previous_response_id=response.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            use()
        assert caught.value.code == "response_not_found"
        assert response.id in caught.value.message


def test_a_response_that_is_not_to_be_stored_is_not(ai: OpenAI) -> None:
    response = respond(ai, SUM, store=False)
    assert (response.output_text, response.store) == ("3 plus 4 is 7.", False)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(response.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_cut_off_is_incomplete(ai: OpenAI, stream: bool) -> None:
    if stream:
        events = list(ai.responses.create(model=MODEL, input=SUM, temperature=0, max_output_tokens=6, stream=True))
        assert events[-1].type == "response.incomplete"
        response = events[-1].response
    else:
        response = respond(ai, SUM, max_output_tokens=6)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [(item.type, item.status) for item in response.output] == [("reasoning", "incomplete")]
    assert response.usage.output_tokens == response.usage.output_tokens_details.reasoning_tokens == 6


def test_a_stream_can_be_cancelled_from_elsewhere(ai: OpenAI, client: Client) -> None:
    events = ai.responses.create(model=MODEL, input="Tell me a story about a fox.", stream=True, **ENDLESS)
    created = next(events)
    assert ai.responses.retrieve(created.response.id).status == "in_progress"
    assert ai.responses.cancel(created.response.id).status == "cancelled"
    *_, last = events
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert ai.responses.retrieve(created.response.id) == last.response
    wait_until(lambda: is_idle(client.stats()), "the engine is idle", seconds=5)
    with pytest.raises(openai.BadRequestError, match="has ended"):
        ai.responses.cancel(created.response.id)


def test_a_client_that_leaves_its_stream_leaves_nothing(ai: OpenAI, client: Client) -> None:
    with ai.responses.create(model=MODEL, input="Tell me a story.", stream=True, **ENDLESS) as events:
        response_id = next(iter(events)).response.id
    wait_until(lambda: is_idle(client.stats()), "the engine is idle", seconds=5)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(response_id)


def test_responses_side_by_side_are_not_mixed_up(ai: OpenAI) -> None:
    questions = [f"What is {number} plus 2?" for number in range(16)]
    texts: dict[str, str] = {}

    def run(question: str) -> None:
        with ai.responses.stream(model=MODEL, input=question, temperature=0) as stream:
            texts[question] = stream.get_final_response().output_text

    threads = [threading.Thread(target=run, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {question: f"{number} plus 2 is {number + 2}." for number, question in enumerate(questions)}
