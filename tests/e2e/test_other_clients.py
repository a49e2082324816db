"""litellm and langchain-openai against the real engine: answers, streams, thoughts and tools."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

# Set before litellm is imported, which otherwise asks a host elsewhere for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.e2e.conftest import RunningEngine
from tests.support.requests import WEATHER, ask

# About litellm's own types.
pytestmark = pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning")

SUM = "What is 3 plus 4?"
TWO_CITIES = "What is the weather in Paris and in Rome?"
RESULT = json.dumps({"temperature": 12, "condition": "sunny"})
SUNNY = "In Paris it is sunny and 12 degrees. In Rome it is sunny and 12 degrees."


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return RESULT


@pytest.fixture
def lite(engine: RunningEngine) -> dict[str, Any]:
    return {"model": "hosted_vllm/tiny-qwen3", "api_base": f"{engine.url}/v1", "temperature": 0, "num_retries": 0}


@pytest.fixture
def langchain(engine: RunningEngine) -> ChatOpenAI:
    return ChatOpenAI(
        model="tiny-qwen3", base_url=f"{engine.url}/v1", api_key="none", temperature=0, max_retries=0, stream_usage=True
    )


def test_litellm_answers_with_thoughts(lite: dict[str, Any]) -> None:
    message = litellm.completion(messages=ask(SUM), **lite).choices[0].message
    assert message.content == "3 plus 4 is 7."
    assert message.reasoning_content.endswith("3 + 4 = 7.")
    deltas = [chunk.choices[0].delta for chunk in litellm.completion(messages=ask(SUM), stream=True, **lite)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts == message.reasoning_content


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_calls_functions(lite: dict[str, Any], stream: bool) -> None:
    answer: Any = litellm.completion(messages=ask(TWO_CITIES), tools=[WEATHER], stream=stream, **lite)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Paris"}, {"city": "Rome"}]
    results = [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in message.tool_calls]
    messages = [*ask(TWO_CITIES), message.model_dump(exclude_none=True), *results]
    assert litellm.completion(messages=messages, tools=[WEATHER], **lite).choices[0].message.content == SUNNY


def test_litellm_makes_responses(lite: dict[str, Any]) -> None:
    response: Any = litellm.responses(input=SUM, **(lite | {"model": "openai/tiny-qwen3", "api_key": "none"}))
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[1].content[0].text == "3 plus 4 is 7."


def test_langchain_answers_and_streams(langchain: ChatOpenAI) -> None:
    answer = langchain.invoke(SUM)
    assert answer.content == "3 plus 4 is 7."
    chunks = list(langchain.stream(SUM))
    assert len(chunks) > 3
    total = sum(chunks[1:], start=chunks[0])
    assert total.content == answer.content
    assert total.usage_metadata == answer.usage_metadata


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_langchain_calls_functions(langchain: ChatOpenAI, engine: RunningEngine, stream: bool, api: str) -> None:
    if api == "responses":
        langchain = langchain.model_copy(update={"use_responses_api": True})
    model = langchain.bind_tools([get_weather])
    question = HumanMessage(TWO_CITIES)
    called: Any
    if stream:
        chunks = list(model.stream([question]))
        called = sum(chunks[1:], start=chunks[0])
        assert isinstance(called, AIMessageChunk)
    else:
        called = model.invoke([question])
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Rome"}),
    ]
    results = [ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in called.tool_calls]
    answer = model.invoke([question, called, *results])
    assert answer.text == SUNNY
