"""Renders a conversation with the model's own chat template, in Jinja's sandbox.

Templates are written for Hugging Face `transformers`, so the environment offers what its
`apply_chat_template` offers: the same options, filters, functions and tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import ConfigError, InvalidRequestError
from protocol.limits import MAX_MESSAGES, MAX_TOOLS, require_few, require_shallow

# What the engine itself hands to the template; `template_options` cannot replace them.
_RESERVED_NAMES = ("messages", "tools")
# Stands at the end of a message that is to be continued while it is rendered, to see where it ended up.
_CONTINUE_HERE = "\ue000continue here\ue000"
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")


class ChatTemplate:
    """A compiled chat template; `tool_source` is the variant some models have for conversations with tools.

    Attributes:
        source: the template's text, both variants.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], tool_source: str | None = None) -> None:
        """Raises ConfigError if the template does not compile."""
        self.source = source + (tool_source or "")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source) if tool_source else self._template
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, ending where the assistant is to speak.

        Options are variables of the template. Two have a meaning of their own: without `add_generation_prompt` the
        prompt ends with the last message, and with `continue_final_message` within it, at the end of its content.

        Raises:
            InvalidRequestError: the messages have the wrong form, or the template refuses them.
        """
        require_few(len(messages), MAX_MESSAGES, "messages", "messages")
        require_few(len(tools or ()), MAX_TOOLS, "tools", "functions")
        for field, value in (("messages", messages), ("tools", tools), ("chat_template_kwargs", options)):
            require_shallow(value, field)
        options = dict(options or {})
        for name in _RESERVED_NAMES:
            if name in options:
                raise InvalidRequestError(
                    f"chat_template_kwargs cannot set {name!r}, which is the request's own", "chat_template_kwargs"
                )
        is_continued = options.pop("continue_final_message", None) or False
        if is_continued:
            if options.get("add_generation_prompt"):
                raise InvalidRequestError(
                    "continue_final_message and add_generation_prompt cannot both be true: "
                    "an answer is either continued or begun",
                    "continue_final_message",
                )
            options["add_generation_prompt"] = False
        variables = {"documents": None, "add_generation_prompt": True, **self._special_tokens, **options}
        conversation = normalize_messages(messages)
        if is_continued:
            conversation[-1]["content"] += _CONTINUE_HERE
        template = self._tool_template if tools else self._template
        try:
            prompt = template.render(messages=conversation, tools=tools or None, **variables)
        except Exception as error:
            # The template is the model's program and runs on the user's data: whatever it raises, the data caused it.
            raise InvalidRequestError(f"the chat template refused the messages: {error}", "messages") from error
        if not is_continued:
            return prompt
        before, found, _ = prompt.rpartition(_CONTINUE_HERE)
        if not found:
            raise InvalidRequestError(
                "the chat template leaves out the final message's content, which therefore cannot be continued",
                "continue_final_message",
            )
        return before


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The form that templates expect: text as one string, arguments of tool calls as objects, no empty fields.

    Raises:
        InvalidRequestError: a message is not one of the OpenAI API, or is not text.
    """
    if not messages:
        raise InvalidRequestError("messages must hold at least one message", "messages")
    return [_normalize_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalize_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object, got {message!r}", "messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{where}.role must be a string such as 'user', got {role!r}", "messages")
    # Clients send back whole message objects, with fields that were never set.
    given = {name: value for name, value in message.items() if value not in (None, [])}
    for name in given:
        if name not in _MESSAGE_FIELDS:
            raise InvalidRequestError(f"{where}.{name} is not supported, got {given[name]!r}", "messages")
    # OpenAI's newer name, which chat templates do not know.
    given["role"] = "system" if role == "developer" else role
    given["content"] = text_of_content(message.get("content"), f"{where}.content")
    if "tool_calls" in given:
        given["tool_calls"] = [
            _normalize_tool_call(call, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(_as_list(given["tool_calls"], f"{where}.tool_calls"))
        ]
    return given


def text_of_content(content: Any, where: str) -> str:
    """A message's text, given as a string or as a list of text parts, which are joined by line breaks.

    Raises:
        InvalidRequestError: something else, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(_as_list(content, where)):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InvalidRequestError(f"{where}[{index}] must be a text part, got {kind!r}", "messages")
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}[{index}].text must be a string, got {part.get('text')!r}", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _normalize_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{where} must have a function with a name, got {call!r}", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{where}.function.arguments is not JSON: {error}", "messages") from error
        require_shallow(arguments, "messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{where} must be a list, got {value!r}", "messages")
    return list(value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - how Jinja asks for it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
