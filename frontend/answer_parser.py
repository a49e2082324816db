"""From an answer's text to its parts: thoughts, said text and function calls, in the order in which they were written.

Also decides, once for a model, which of these its answers can have. Knows nothing of how parts are sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from frontend.chat_template import ChatTemplate, text_of_content
from frontend.reasoning import ReasoningParser, Thinking, thinking_after_beginning, thinking_after_prompt
from frontend.tokenizer import Tokenizer
from frontend.tool_calls import CallDelta, ToolCallParser
from protocol.config import EngineOptions
from protocol.errors import ConfigError, InvalidRequestError
from protocol.messages import ChatPrompt

logger = logging.getLogger(__name__)

# Enough for the tags with which a template opens or closes thoughts, spelled out if they are no tokens of their own.
_PROMPT_END_TOKENS = 16


class Thoughts(Struct):
    """New text of what the model thinks."""

    text: str


# A plain string is new text of what the model says.
Part = Thoughts | str | CallDelta


class AnswerParser:
    """One answer.

    Attributes:
        is_plain: all further text is said and need not be parsed any more.
    """

    def __init__(self, reasoning: ReasoningParser | None, tool_calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tool_calls = tool_calls

    @property
    def is_plain(self) -> bool:
        return self._tool_calls is None and (self._reasoning is None or self._reasoning.is_over)

    def feed(self, text: str, is_last: bool = False) -> Sequence[Part]:
        """The parts that became final with this text, and if it is the last, what was held back."""
        parts: list[Part] = []
        self._read(*(self._reasoning.feed(text) if self._reasoning is not None else ("", text)), parts)
        if is_last:
            if self._reasoning is not None:
                self._read(*self._reasoning.flush(), parts)
            if self._tool_calls is not None:
                parts += self._tool_calls.flush()
        return parts

    def _read(self, thoughts: str, said: str, parts: list[Part]) -> None:
        if thoughts:
            parts.append(Thoughts(thoughts))
        if said:
            parts += [said] if self._tool_calls is None else self._tool_calls.feed(said)


class AnswerFormat:
    """What this model's answers are made of besides text."""

    def __init__(self, tokenizer: Tokenizer | None, *, has_reasoning: bool, has_tool_calls: bool) -> None:
        self._tokenizer = tokenizer
        self.has_reasoning = has_reasoning
        self.has_tool_calls = has_tool_calls

    def parser_factory(
        self, prompt: ChatPrompt, token_ids: Sequence[int], *, parallel: bool, stream: bool
    ) -> Callable[[], AnswerParser] | None:
        """Makes the parser of an answer to a chat, whose prompt has these ids; None if there is nothing to look for."""
        thinking = self.thinking(prompt, token_ids) if self.has_reasoning else "over"
        finds_calls = self.has_tool_calls and bool(prompt.tools)
        if thinking == "over" and not finds_calls:
            return None

        def new_parser() -> AnswerParser:
            reasoning = ReasoningParser(thinking) if thinking != "over" else None
            return AnswerParser(reasoning, ToolCallParser(stream=stream, parallel=parallel) if finds_calls else None)

        return new_parser

    def num_reasoning_tokens(self, thoughts: str, token_ids: list[int]) -> int:
        """How many of an answer's tokens are its thoughts, with the tags."""
        assert self._tokenizer is not None
        end = self._tokenizer.token_id("</think>")
        if end is None:
            return len(self._tokenizer.encode(thoughts, add_special_tokens=False))
        return token_ids.index(end) + 1 if end in token_ids else len(token_ids)

    def thinking(self, prompt: ChatPrompt, token_ids: Sequence[int]) -> Thinking:
        """Where the answer starts, or goes on."""
        assert self._tokenizer is not None
        if prompt.template_options.get("continue_final_message"):
            written = text_of_content(prompt.messages[-1].get("content"), "the final message's content")
            thinking = thinking_after_beginning(written)
            if thinking != "undecided":
                return thinking
        end = self._tokenizer.decode(token_ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
        return thinking_after_prompt(end)


def answer_format(options: EngineOptions, tokenizer: Tokenizer | None) -> AnswerFormat:
    """As the options say, or by "auto" as the chat template does: it names the tag that ends thoughts, and it writes a
    call of an earlier answer in a form that is read back as the same call.

    Raises:
        ConfigError: a parser is asked for where there is no text.
    """
    for flag, value in (
        ("--reasoning-parser", options.reasoning_parser),
        ("--tool-call-parser", options.tool_call_parser),
    ):
        if tokenizer is None and value not in ("auto", "none"):
            raise ConfigError(f"{flag} {value} needs text, and --skip-tokenizer-init leaves none")
    template = tokenizer.chat_template if tokenizer is not None else None
    reasoning, tool_calls = options.reasoning_parser == "qwen3", options.tool_call_parser == "hermes"
    if options.reasoning_parser == "auto":
        reasoning = template is not None and "</think>" in template.source
    if options.tool_call_parser == "auto":
        tool_calls = template is not None and _writes_calls(template)
    logger.info(
        "reasoning parser: %s, tool call parser: %s",
        "qwen3" if reasoning else "none",
        "hermes" if tool_calls else "none",
    )
    return AnswerFormat(tokenizer, has_reasoning=reasoning, has_tool_calls=tool_calls)


def _writes_calls(template: ChatTemplate) -> bool:
    name, arguments = "look_up", '{"of": "a thing"}'
    function = {"name": name, "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Look up a thing."},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]},
        {"role": "tool", "content": "It is there."},
    ]
    try:
        rendered = template.render(messages, [{"type": "function", "function": function}])
    except InvalidRequestError:
        return False
    parts = ToolCallParser(stream=False).feed(rendered)
    return any(isinstance(part, CallDelta) and (part.name, part.arguments) == (name, arguments) for part in parts)
