"""From the items of the Responses API to the messages of a chat.

An assistant's turn is one message to chat templates and several items here: what it thought, what it said, and each of
its calls. Knows nothing of how messages are rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from frontend.responses_types import OutputItem
from protocol.errors import InvalidRequestError

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")
Message = dict[str, Any]


def messages_of(items: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages that a request's `input` stands for; a string is what the user says.

    Raises:
        InvalidRequestError: an item is of a kind or has a form that is not served.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not items:
        raise InvalidRequestError("input must hold at least one item, got []", "input")
    messages: list[Message] = []
    for index, item in enumerate(items):
        _add_item(messages, item, f"input[{index}]")
    return messages


def messages_of_output(output: Sequence[OutputItem]) -> list[Message]:
    """The messages that stand for a response where the conversation goes on."""
    messages: list[Message] = []
    for item in output:
        _add_item(messages, msgspec.to_builtins(item), "output")
    return messages


def _add_item(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r}", "input")
        text = _text_of(item.get("content"), f"{where}.content", _TEXT_PARTS)
        turn = _open_turn(messages) if role == "assistant" else None
        if turn is not None and not turn["content"] and "tool_calls" not in turn:
            turn["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        thoughts = _text_of(item.get("content") or [], f"{where}.content", ("reasoning_text",))
        messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
    elif kind == "function_call":
        call_id, name, arguments = (_string(item, field, where) for field in ("call_id", "name", "arguments"))
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        turn = _open_turn(messages)
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        turn.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text_of(item.get("output"), f"{where}.output", _TEXT_PARTS)
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": text})
    else:
        raise InvalidRequestError(
            f"{where}.type must be message, reasoning, function_call or function_call_output, got {kind!r}", "input"
        )


def _open_turn(messages: list[Message]) -> Message | None:
    """The assistant's turn that the conversation is in."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None


def _text_of(content: Any, where: str, kinds: tuple[str, ...]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where} must be a string or a list of parts, got {content!r}", "input")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind not in kinds:
            raise InvalidRequestError(f"{where}[{index}].type must be {' or '.join(kinds)}, got {kind!r}", "input")
        texts.append(_string(part, "text", f"{where}[{index}]"))
    return "\n".join(texts)


def _string(item: Mapping[str, Any], field: str, where: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{field} must be a string, got {value!r}", "input")
    return value
