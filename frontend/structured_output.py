"""From what an answer must be to the grammar that the core follows, checked where it can still be refused.

Grammars are in llguidance's form: a list of which the first is where an answer starts, and `@answer` the one that a
request asks for. Where a model thinks first, its thoughts come first and are free. Knows nothing of tokens' ids.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from frontend.answer_parser import AnswerFormat
from frontend.reasoning import Thinking
from frontend.tokenizer import Tokenizer
from frontend.tool_choice import Tools, arguments_schema, call_rules, spacing, thoughts_rules
from protocol.errors import InvalidRequestError
from protocol.messages import ChatPrompt, Prompt
from protocol.structured_outputs import MAX_GRAMMAR_CHARS, StructuredOutputsParams

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_FORMAT_FIELDS = ("name", "description", "schema", "strict")
# Checked grammars that are remembered, so that a schema which many requests share is checked once.
_MOST_REMEMBERED = 256
# Places of unsupported keywords that an error names.
_MOST_POINTERS = 5


class AnswerGrammars:
    """Makes and checks the grammars of one model's answers."""

    def __init__(self, tokenizer: Tokenizer | None, answer_format: AnswerFormat, executor: Executor) -> None:
        self._answer_format = answer_format
        self._has_tokenizer = tokenizer is not None
        self._tokens = {tag for tag in TAGS if tokenizer is not None and tokenizer.token_id(tag) is not None}
        self._executor = executor

    async def of_answer(
        self,
        wanted: StructuredOutputsParams | None,
        prompt: Prompt | Sequence[int],
        token_ids: Sequence[int],
        tools: Tools | None = None,
        param: str = "structured_outputs",
    ) -> str | None:
        """The grammar of the answer to a prompt, which has these ids; None if it may be anything.

        `param` is the field that says what is wanted. An answer that must call does, whatever else is wanted.

        Raises:
            InvalidRequestError: it cannot be followed; the error says which part of it.
        """
        must_call = tools is not None and tools.must_call
        if wanted is None and not must_call:
            return None
        if not self._has_tokenizer:
            raise InvalidRequestError(
                f"{'tool_choice' if must_call else param} needs text, and the engine runs without a tokenizer "
                "(--skip-tokenizer-init)",
                "tool_choice" if must_call else param,
            )
        if must_call and not self._answer_format.has_tool_calls:
            raise InvalidRequestError(
                "tool_choice can only be 'auto' or 'none' with this model: how it writes calls is not known "
                "(--tool-call-parser)",
                "tool_choice",
            )
        thinking: Thinking = "over"
        if isinstance(prompt, ChatPrompt) and self._answer_format.has_reasoning:
            thinking = self._answer_format.thinking(prompt, token_ids)
        if tools is None or not self._answer_format.has_tool_calls:
            tools = Tools()
        # In a thread: a large schema takes a while.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._make, wanted, thinking, tools, param)

    def _make(self, wanted: StructuredOutputsParams | None, thinking: Thinking, tools: Tools, param: str) -> str:
        parts: list[tuple[str, dict[str, Any]]] = []
        for index, tool in enumerate(tools.offered):
            schema = {"json_schema": arguments_schema(tool["function"])}
            parts.append((f"tools[{index}].function.parameters", schema))
        if wanted is not None and not tools.must_call:
            parts.append((param, _body(wanted)))
        for part, one in parts:
            try:
                text = json.dumps({"grammars": [one]})
            except RecursionError:
                raise InvalidRequestError(f"{part} is nested too deeply", part) from None
            if len(text) > 2 * MAX_GRAMMAR_CHARS:  # a schema as an object, or many choices
                raise InvalidRequestError(f"{part} is too large: {len(text)} characters of JSON", part)
            problem = _problem(text)
            if problem:
                problem += _where(problem, one.get("json_schema"))
                raise InvalidRequestError(f"{part} cannot be followed: {problem}", part)
        grammar = answer_grammar(wanted, thinking, tools, self._tokens)
        problem = _problem(grammar)
        if problem:
            raise InvalidRequestError(f"{param} cannot be followed: {problem}", param)
        return grammar


@lru_cache(maxsize=_MOST_REMEMBERED)
def _problem(grammar: str) -> str:
    """What llguidance finds wrong with a grammar; "" if nothing."""
    return LLMatcher.validate_grammar(grammar).strip()


_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*\])")
# Keywords whose values are schemas by name, and those whose values are no schemas.
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")


def _where(problem: str, schema: Any) -> str:
    """Where in a schema the keywords stand that are not supported, as JSON pointers; "" if the problem is another."""
    match = _UNSUPPORTED.search(problem)
    keywords = set(json.loads(match[1])) if match else set()
    found = [pointer for pointer in _pointers(schema, "") if pointer.rpartition("/")[2] in keywords]
    return f" (at {', '.join(found[:_MOST_POINTERS])})" if found else ""


def _pointers(schema: Any, base: str) -> Iterator[str]:
    """The JSON pointers (RFC 6901) of all keywords of a schema and of the schemas in it."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _pointers(item, f"{base}/{index}")
    elif isinstance(schema, dict):
        for keyword, value in schema.items():
            here = f"{base}/{_escaped(keyword)}"
            yield here
            if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
                for name, nested in value.items():
                    yield from _pointers(nested, f"{here}/{_escaped(name)}")
            elif keyword not in _VALUES:
                yield from _pointers(value, here)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def answer_grammar(
    wanted: StructuredOutputsParams | None, thinking: Thinking, tools: Tools, tokens: Container[str]
) -> str:
    """Thoughts if they may come, then calls if there are tools, or what is wanted; calls only where one must come.

    `thinking` says where the answer starts, `tokens` are those tags that are tokens of their own.
    """
    if wanted is not None and thinking == "over" and not tools.offered:
        return json.dumps({"grammars": [_body(wanted)]})
    forms = (["calls"] if tools.offered else []) + (["@answer"] if wanted is not None and not tools.must_call else [])
    lines = thoughts_rules(thinking, f"({' | '.join(forms)})", tokens)
    if tools.offered:
        lines += call_rules(tools, tokens)
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(lines) + "\n"}]
    if "@answer" in forms:
        assert wanted is not None
        grammars.append({"name": "answer", **_body(wanted)})
    return json.dumps({"grammars": grammars})


def _body(wanted: StructuredOutputsParams) -> dict[str, Any]:
    """One grammar of llguidance's list."""
    if wanted.grammar is not None:
        return {"lark_grammar": wanted.grammar}
    if wanted.choice is not None:
        return {"lark_grammar": "start: " + " | ".join(json.dumps(text) for text in wanted.choice) + "\n"}
    if wanted.regex is not None:
        (grammar,) = json.loads(LLMatcher.grammar_from_regex(wanted.regex))["grammars"]
        return {"lark_grammar": grammar["lark_grammar"]}
    schema = wanted.schema()
    if schema is True:
        schema = {}
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": spacing(wanted.whitespace_pattern)}
    return {"json_schema": schema}


def read_structured_outputs(
    structured_outputs: Mapping[str, Any] | None, by_format: StructuredOutputsParams | None, format_field: str
) -> tuple[StructuredOutputsParams | None, str]:
    """What a request's body asks for, and the name of the field that does.

    Raises:
        InvalidRequestError: a field is unknown or wrong, or both ask for something.
    """
    if structured_outputs is None:
        return by_format, format_field
    if by_format is not None:
        raise InvalidRequestError(
            f"{format_field} and structured_outputs cannot both say what the answer is", "structured_outputs"
        )
    for name in structured_outputs:
        if name not in StructuredOutputsParams.__struct_fields__:
            raise InvalidRequestError(f"structured_outputs.{name} is not supported", f"structured_outputs.{name}")
    return StructuredOutputsParams(**structured_outputs), "structured_outputs"


def read_format(value: Mapping[str, Any], where: str) -> StructuredOutputsParams | None:
    """From `{"type": "json_schema", "name": …, "schema": {…}}` or one of the other types.

    Raises:
        InvalidRequestError: it is none of them; names are told as parts of `where`.
    """
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        expected = "'text', 'json_object' or 'json_schema'"
        raise InvalidRequestError(f"{where}.type must be {expected}, got {kind!r}", f"{where}.type")
    for name in value:
        if name != "type" and (kind != "json_schema" or name not in _FORMAT_FIELDS):
            raise InvalidRequestError(f"{where}.{name} is not supported", f"{where}.{name}")
    if kind != "json_schema":
        return StructuredOutputsParams(json_object=True) if kind == "json_object" else None
    if not isinstance(value.get("schema"), Mapping | bool):
        raise InvalidRequestError.out_of_range(f"{where}.schema", value.get("schema"), "a JSON schema")
    return StructuredOutputsParams(json=value["schema"])


def read_response_format(value: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """The same from a chat's form of it, which has a schema and its name in an object of their own."""
    if value is None or value.get("type") != "json_schema":
        return None if value is None else read_format(value, "response_format")
    for name in value:
        if name not in ("type", "json_schema"):
            raise InvalidRequestError(f"response_format.{name} is not supported", f"response_format.{name}")
    nested = value.get("json_schema")
    if not isinstance(nested, Mapping):
        raise InvalidRequestError.out_of_range("response_format.json_schema", nested, "an object")
    return read_format({**nested, "type": "json_schema"}, "response_format.json_schema")
