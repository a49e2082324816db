"""Stored responses make room for each other, and items turn into the messages they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.http_errors import ResponseNotFoundError
from frontend.response_store import ResponseStore, StoredResponse
from frontend.responses_input import messages_of


def stored(num_bytes: int = 1) -> StoredResponse:
    return StoredResponse(b"{}", [], num_bytes)


def names(store: ResponseStore, candidates: str) -> str:
    """Which of these are there. Looks at them from the last to the first, so that the first was used last."""
    return "".join(reversed([name for name in reversed(candidates) if is_there(store, name)]))


def is_there(store: ResponseStore, name: str) -> bool:
    try:
        store.get(name)
    except ResponseNotFoundError:
        return False
    return True


def test_the_least_recently_used_makes_room() -> None:
    store = ResponseStore(max_responses=3, max_bytes=100)
    for name in "abc":
        store.end(name, stored())
    store.get("a")
    store.end("d", stored())
    assert names(store, "abcd") == "acd"


def test_room_is_counted_in_bytes_too() -> None:
    store = ResponseStore(max_responses=10, max_bytes=100)
    store.end("a", stored(40))
    store.end("b", stored(40))
    store.delete("a")
    store.end("c", stored(60))
    assert names(store, "abc") == "bc"
    store.end("d", stored(101))
    assert names(store, "abcd") == ""
    store.end("e", stored(100))
    assert names(store, "e") == "e"


def test_a_response_that_came_to_nothing_is_not_there() -> None:
    store = ResponseStore()
    store.end("a", None)
    with pytest.raises(ResponseNotFoundError, match="'a'"):
        store.get("a")


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
NESTED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": "a\nb"}],
        ),
        (
            [
                {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So"}]},
                CALL,
                CALL | {"call_id": "2", "name": "g"},
                {"type": "function_call_output", "call_id": "1", "output": "one"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
            ],
            [
                {
                    "role": "assistant",
                    "content": "So",
                    "reasoning_content": "Hm",
                    "tool_calls": [NESTED, NESTED | {"id": "2", "function": {"name": "g", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "one"},
                {"role": "tool", "tool_call_id": "2", "content": "two"},
            ],
        ),
        # Two answers in a row stay two, and thoughts begin a new one.
        (
            [
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"type": "reasoning", "summary": []},
                CALL,
            ],
            [
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [NESTED]},
            ],
        ),
    ],
    ids=["string", "parts", "one turn", "several turns"],
)
def test_items_are_the_messages_of_a_chat(items: Any, messages: list[dict[str, Any]]) -> None:
    assert messages_of(items) == messages
