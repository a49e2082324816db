"""What answers with thoughts and calls become in HTTP, chat and Responses API, for answers that the tests write.

The chat template is the first message's content, which the fake core gives back, so that this is the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.frontend.conftest import MODEL_NAME, Frontend, make_tokenizer

TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FLAT_TOOLS: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]


# A property whose name is the keyword that it has.
NOT: dict[str, Any] = {"not": {"not": {}}}


def call(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# Answer, thoughts, said text and calls. The last two hold what looks like a call and is none.
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("Größe 🙂", "", "Größe 🙂", []),
    ("<think>\nHow big?\n</think>\n\nBig.", "How big?", "Big.", []),
    ("<think>\nHow big?", "How big?", "", []),
    (call('{"a": "ß"}'), "", "", [("f", '{"a": "ß"}')]),
    (f"Let me look.\n{call('{}')}\n{call('{}', 'g')}", "", "Let me look.", [("f", "{}"), ("g", "{}")]),
    (f"<think>\nHm.\n</think>\n\nSo:\n{call('{}')}\nDone.", "Hm.", "So:Done.", [("f", "{}")]),
    (f"So: {call('[1]')}", "", f"So: {call('[1]')}", []),
    ("So: <tool_call>\nnothing\n</tool_call>", "", "So: <tool_call>\nnothing\n</tool_call>", []),
]  # fmt: skip
IDS = ["plain", "thoughts", "cut off", "call", "text and calls", "all", "no object", "no JSON"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    template = "{{ messages[0].content }}<|im_end|>{# </think> #}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    frontend = Frontend(Path(directory), tool_call_parser="hermes").start()
    yield frontend.url
    frontend.close()


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream of the Responses API."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize(("answer", "thoughts", "said", "calls"), ANSWERS, ids=IDS)
def test_chat(http: httpx.Client, answer: str, thoughts: str, said: str, calls: list[tuple[str, str]]) -> None:
    body = {"messages": [{"role": "user", "content": answer}], "tools": TOOLS}
    reason = "tool_calls" if calls else "stop"
    raw = http.post("/v1/chat/completions", json=body).json()
    choice = ChatCompletion.model_validate(raw, strict=True).choices[0]
    found = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or []]
    assert (choice.message.content or "", found, choice.finish_reason) == (said, calls, reason)
    assert (choice.message.content is None) == (said == "" and answer != "")
    assert (choice.message.model_extra or {}).get("reasoning_content", "") == thoughts

    text = http.post("/v1/chat/completions", json=body | {"stream": True}).text
    deltas, reasons = [], []
    for part in text.split("\n\n")[:-2]:
        chunk = ChatCompletionChunk.model_validate_json(part.removeprefix("data: "), strict=True)
        deltas.append(chunk.choices[0].delta)
        reasons.append(chunk.choices[0].finish_reason)
    if "[1]" not in answer:
        assert "".join(delta.content or "" for delta in deltas) == said
        assert reasons == [None] * (len(reasons) - 1) + [reason]
    else:
        # In a stream it is known too late that the arguments are no object.
        assert reasons[-1] == "stop"
    assert "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas) == thoughts
    for index, (name, arguments) in enumerate(calls):
        parts = [each for delta in deltas for each in delta.tool_calls or [] if each.index == index]
        assert [part.function.name for part in parts] == [name] + [None] * (len(parts) - 1)
        assert [part.type for part in parts] == ["function"] + [None] * (len(parts) - 1)
        assert "".join(part.function.arguments for part in parts) == arguments


@pytest.mark.parametrize(("answer", "thoughts", "said", "calls"), ANSWERS, ids=IDS)
def test_responses(http: httpx.Client, answer: str, thoughts: str, said: str, calls: list[tuple[str, str]]) -> None:
    body = {"input": answer, "tools": FLAT_TOOLS}
    raw = http.post("/v1/responses", json=body).json()
    response = Response.model_validate(raw, strict=True)
    assert (response.status, response.output_text) == ("completed", said)
    assert [(item.name, item.arguments) for item in response.output if item.type == "function_call"] == calls
    assert "".join(item.content[0].text for item in response.output if item.type == "reasoning") == thoughts
    assert {item.status for item in response.output} == {"completed"}

    events = events_of(http.post("/v1/responses", json=body | {"stream": True}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event, strict=True)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    streamed = events[-1]["response"]
    if "[1]" not in answer:
        assert [without_ids(item) for item in streamed["output"]] == [without_ids(item) for item in raw["output"]]
    assert items_by_events(events) == streamed["output"]


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def items_by_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream's events tell of, each of which has to begin, grow and end in order."""
    items: list[dict[str, Any]] = []
    text = ""
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            assert not items or items[-1]["status"] == "completed"
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            text = ""
        elif kind == "output_item.done":
            assert event["item"]["id"] == items[-1]["id"]
            assert event["item"].get("arguments", text) == text
            items[-1] = event["item"]
        else:
            assert event["item_id"] == items[-1]["id"]
            if kind.endswith(".delta"):
                text += event["delta"]
            elif kind == "content_part.added":
                assert (event["content_index"], event["part"]["text"], text) == (0, "", "")
            elif kind == "content_part.done":
                assert event["part"]["text"] == text
            else:
                assert event.get("text", event.get("arguments")) == text
    return items


def test_openais_client_puts_a_stream_of_responses_together(client: openai.OpenAI) -> None:
    answer = f"<think>\nHm.\n</think>\n\nSo:\n{call('{}')}"
    with client.responses.stream(model=MODEL_NAME, input=answer, tools=FLAT_TOOLS) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == "So:"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "at least one item"),
        ({"input": 5}, "input", "got 5"),
        ({"input": "x" * 1000}, "input", "input has"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input", "input[0].role must be one of"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input[0].content must be a string or a list"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            "input[0].content[0].type must be input_text or output_text or text, got 'input_image'",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "input[0].type must be message, reasoning"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input", "input[0].name must be a string, got None"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input[0].call_id must be a string"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type must be 'function', got 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools", "got None"),
        ({"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "got 'g'"),
        ({"text": {"format": {"type": "json"}}}, "text.format.type", "got 'json'"),
        ({"text": {"format": 5}}, "text.format", "an object, got 5"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"items": {"properties": NOT}}}}},
            "text.format",
            'Unimplemented keys: ["not"] (at /items/properties/not/not)',
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "got 'low'"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "got 'high'"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "'resp_1' is not stored"),
        ({"background": True}, "background", "got True"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "encrypted_content"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1, got 0"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "maximum context length"),
        ({"max_tokens": 5}, "max_tokens", "got 5"),
        ({"messages": []}, "messages", "not a field"),
        ({"temperature": -1}, "temperature", "got -1"),
        ({"metadata": {"a": 1}}, "metadata", "str"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_fields_of_responses_that_cannot_be_served_are_named(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    response = http.post("/v1/responses", json={"input": "a"} | fields if fields else {})
    assert response.status_code == (404 if param == "previous_response_id" else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_fields_of_responses_that_ask_for_nothing_are_accepted(http: httpx.Client) -> None:
    body = {
        "input": "a", "model": MODEL_NAME, "store": False, "background": False, "include": [], "truncation": "disabled",
        "text": {"format": {"type": "text"}, "verbosity": None}, "reasoning": {"effort": None, "summary": None},
        "service_tier": "auto", "user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "top_logprobs": 0,
        "stream_options": {"include_obfuscation": False}, "stream": True, "tool_choice": "auto", "tools": [],
        "previous_response_id": None, "metadata": {}, "max_tool_calls": None, "instructions": None, "seed": 3,
    }  # fmt: skip
    assert http.post("/v1/responses", json=body).status_code == 200
