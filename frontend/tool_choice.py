"""The functions that a request offers to the model, and which of them it may or must call.

Checks both, and writes the grammar rules of an answer that calls. Knows nothing of how calls are found in an answer.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from frontend.reasoning import Thinking
from protocol.errors import InvalidRequestError
from protocol.limits import MAX_TOOLS, require_few

_LONGEST_NAME = 128
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str


class NamedToolChoice(Struct, forbid_unknown_fields=True):
    """`{"type": "function", "function": {"name": …}}`"""

    type: Literal["function"]
    function: NamedFunction


class Tools(Struct, frozen=True):
    """What a request offers.

    Attributes:
        offered: the functions as the chat template sees them; empty if none may be called.
        must_call: an answer has to be one or more calls; with `name`, of that function.
        parallel: an answer may have several calls.
    """

    offered: list[dict[str, Any]] = []
    must_call: bool = False
    name: str | None = None
    parallel: bool = True


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None,
    parallel_tool_calls: bool | None,
) -> Tools:
    """The functions a request offers; none if it also says that none is to be called.

    Raises:
        InvalidRequestError: a tool is not a function, or the choice is one that the tools do not allow.
    """
    require_few(len(tools or ()), MAX_TOOLS, "tools", "functions")
    offered = [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in offered]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"tools has two functions named {name!r}", "tools")
    name = tool_choice.function.name if isinstance(tool_choice, NamedToolChoice) else None
    if name is not None and name not in names:
        raise InvalidRequestError(
            f"tool_choice must name one of the tools ({', '.join(names)}), got {name!r}", "tool_choice"
        )
    if tool_choice == "required" and not offered:
        raise InvalidRequestError("tool_choice 'required' needs tools, and there are none", "tool_choice")
    if tool_choice == "none":
        offered = []
    must_call = tool_choice == "required" or name is not None
    return Tools(offered, must_call, name, parallel_tool_calls is not False)


def _read_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequestError(f"{where}.type must be 'function', got {tool.get('type')!r}", "tools")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{where}.function must be an object, got {function!r}", "tools")
    for field in function:
        if field not in _FUNCTION_FIELDS:
            raise InvalidRequestError(f"{where}.function.{field} is not supported, got {function[field]!r}", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME:
        raise InvalidRequestError(
            f"{where}.function.name must be a string of 1 to {_LONGEST_NAME} characters, got {name!r}", "tools"
        )
    if not isinstance(function.get("parameters"), Mapping | None):
        raise InvalidRequestError(
            f"{where}.function.parameters must be a JSON schema, got {function['parameters']!r}", "tools"
        )
    # `strict` speaks to the server, and models have not seen it in training.
    shown = {field: value for field, value in function.items() if value is not None and field != "strict"}
    return {"type": "function", "function": shown}


def thoughts_rules(thinking: Thinking, answer: str, tokens: Container[str]) -> list[str]:
    """Lark rules, in llguidance's dialect, of thoughts if they may come, and then `answer`.

    `thinking` says where it starts. `tokens` are those tags that are tokens of their own, which such a grammar does not
    spell out.
    """
    if thinking == "over":
        return [f"start: {answer}"]
    is_token = "</think>" in tokens
    return [
        f"start: thoughts? {answer}" if thinking == "undecided" else f"start: thinking {answer}",
        f"thoughts: {_tag('<think>', tokens)} thinking",
        'thinking: within "\\n\\n"',
        "within: /(?s:.*)/ </think>" if is_token else 'within[suffix="</think>"]: /(?s:.*)/',
    ]


def call_rules(tools: Tools, tokens: Container[str]) -> list[str]:
    """Lark rules of `calls`, as Qwen3 writes them, with arguments that fit the function's schema."""
    functions = [tool["function"] for tool in tools.offered if tools.name in (None, tool["function"]["name"])]
    several = tools.parallel and tools.name is None
    lines = [
        'calls: call ("\\n" call)*' if several else "calls: call",
        f'call: {_tag("<tool_call>", tokens)} "\\n" object "\\n" {_tag("</tool_call>", tokens)}',
        "object: " + " | ".join(f"object_{index}" for index in range(len(functions))),
    ]
    for index, function in enumerate(functions):
        head = _quoted('{"name": ' + _quoted(function["name"]) + ', "arguments": ')
        lines.append(f'object_{index}: {head} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {json.dumps(arguments_schema(function))}")
    return lines


def spacing(whitespace_pattern: str | None = None) -> dict[str, Any]:
    """How llguidance lets JSON be written: as models have seen it in training, and nothing between its parts that could
    go on for ever; or with what the pattern allows there."""
    if whitespace_pattern is not None:
        return {"whitespace_pattern": whitespace_pattern}
    return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _tag(text: str, tokens: Container[str]) -> str:
    return text if text in tokens else f'"{text}"'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(function.get("parameters") or {}), "x-guidance": spacing()}
