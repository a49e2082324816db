"""The two forms in which completions are answered, chat and plain text: whole, and as a stream of chunks.

Builds bodies from text, token ids and counts, and from what requests have measured; knows nothing of sockets.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from frontend.answer_parser import AnswerParser, Part, Thoughts
from frontend.openai_logprobs import LogprobsWriter, PromptLogprobs, TokenNames, prompt_logprobs
from frontend.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    FunctionCall,
    Message,
    TextChoice,
    TextCompletion,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from frontend.requests import RunningRequest
from frontend.tool_calls import CallDelta
from protocol.logs import current_request_id
from protocol.messages import Finished


class WholeChoice(Struct):
    """A finished choice."""

    text: str
    token_ids: list[int]
    request: RunningRequest
    finished: Finished

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, which must have been measured. Nothing is less likely than an answer without any."""
        measured = self.request.logprobs
        return sum(token.logprob for token in measured) / len(measured) if measured else -math.inf


def best_choices(choices: Sequence[WholeChoice], num_generated: int, num_choices: int) -> Sequence[WholeChoice]:
    """Of each `num_generated` choices, which are of one prompt, those of the highest mean log-probability a token.

    The best comes first, and of equal ones the one that was asked for first.
    """
    if num_generated == num_choices:
        return choices
    best: list[WholeChoice] = []
    for start in range(0, len(choices), num_generated):
        of_prompt = choices[start : start + num_generated]
        best += sorted(of_prompt, key=lambda choice: -choice.mean_logprob)[:num_choices]
    return best


class AnswerOptions(Struct, kw_only=True):
    """What is wanted beside the text.

    `with_usage` ends a stream with the counts, and as in the OpenAI API puts a null before into every chunk, or, with
    `continuous_usage`, the counts so far. `num_choices` is for each prompt, and so is `num_generated`, of which the
    answer has the best. `prompt_logprobs` is the number of alternatives, as in `SamplingParams`.
    """

    with_token_ids: bool
    with_usage: bool
    continuous_usage: bool
    num_choices: int
    num_generated: int
    token_names: TokenNames
    prompt_logprobs: int | None


class _Answer:
    """What is the same in every body of one answer."""

    _prefix = ""
    # Whether the answer is only a prompt that comes back: the tokens behind it are left out.
    is_prompt_only = False

    def __init__(self, model: str, options: AnswerOptions, logprobs: LogprobsWriter | None = None) -> None:
        """`logprobs` writes those of the answer's tokens, if they are wanted."""
        self._id = self._prefix + (current_request_id.get() or uuid.uuid4().hex)
        self._created = int(time.time())
        self._model = model
        self.options = options
        self.with_token_ids = options.with_token_ids
        self.with_usage = options.with_usage
        self.logprobs = logprobs
        self._no_usage: UnsetType | None = None if options.with_usage else UNSET

    @property
    def sees_every_token(self) -> bool:
        """Whether a stream has to hand over tokens that make no text yet."""
        return self.with_token_ids or self.logprobs is not None

    def is_plain(self, index: int) -> bool:
        """Whether from here on all that chunks of a choice say before its end is new text, as it comes."""
        return not (self.sees_every_token or self.options.continuous_usage or self.is_prompt_only)

    @property
    def has_logprobs(self) -> bool:
        return self.logprobs is not None or self.options.prompt_logprobs is not None

    def _ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self.with_token_ids else UNSET

    def _whole_logprobs(self, index: int, choice: WholeChoice) -> Any:
        if self.logprobs is None:
            return None
        self.logprobs.add(index, choice.token_ids, choice.request)
        return self.logprobs.take(index)

    def _prompt_logprobs(self, request: RunningRequest) -> PromptLogprobs | UnsetType:
        width = self.options.prompt_logprobs
        return UNSET if width is None else prompt_logprobs(self.options.token_names, request, width)


class ChatAnswer(_Answer):
    _prefix = "chatcmpl-"

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ChatCompletion:
        body = [
            ChatChoice(
                index=index,
                message=Message(choice.text),
                finish_reason=choice.finished.reason,
                stop_reason=choice.finished.stop_reason,
                logprobs=self._whole_logprobs(index, choice),
                token_ids=self._ids(choice.token_ids),
            )
            for index, choice in enumerate(choices)
        ]
        request = choices[0].request
        completion = ChatCompletion(self._id, self._created, self._model, body, usage)
        completion.prompt_token_ids = self._ids(request.prompt_token_ids)
        completion.prompt_logprobs = self._prompt_logprobs(request)
        return completion

    def first_chunk(self, index: int, prompt_token_ids: list[int]) -> ChatChunk | None:
        chunk = self._chunk([ChatChunkChoice(index, Delta(role="assistant", content=""))])
        chunk.prompt_token_ids = self._ids(prompt_token_ids)
        return chunk

    def chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> ChatChunk | None:
        """What is new in a choice, or None if there is nothing to say yet.

        Log-probabilities of tokens that make no text yet come with the next chunk.
        """
        if not (text or finished is not None or self.with_token_ids):
            return None
        return self._choice_chunk(index, text, token_ids, finished)

    def _choice_chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> ChatChunk:
        choice = ChatChunkChoice(index, Delta(content=text) if text else Delta(), token_ids=self._ids(token_ids))
        if self.logprobs is not None:
            choice.logprobs = self.logprobs.take(index)
        if finished is not None:
            choice.finish_reason, choice.stop_reason = finished.reason, finished.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._model, choices, usage=self._no_usage)


class ParsedChatAnswer(ChatAnswer):
    """A chat whose text holds thoughts or calls, each choice with a parser of its own until the rest is plain."""

    def __init__(
        self,
        model: str,
        options: AnswerOptions,
        logprobs: LogprobsWriter | None,
        new_parser: Callable[[], AnswerParser],
        *,
        with_reasoning: bool,
    ) -> None:
        super().__init__(model, options, logprobs)
        self._new_parser = new_parser
        self._with_reasoning = with_reasoning
        self._parsers: dict[int, AnswerParser | None] = {}
        self._has_calls: set[int] = set()

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ChatCompletion:
        completion = super().whole(choices, usage)
        for choice in completion.choices:
            said, thoughts, calls = self._sorted(self._new_parser().feed(choice.message.content or "", is_last=True))
            message = Message(said if said or not (thoughts or calls) else None)
            if calls:
                message.tool_calls = [
                    ToolCall(_new_call_id(), FunctionCall(call.name or UNSET, call.arguments)) for call in calls
                ]
                if choice.finish_reason == "stop":
                    choice.finish_reason = "tool_calls"
            if thoughts:
                message.reasoning_content = message.reasoning = thoughts
            choice.message = message
        return completion

    def chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> ChatChunk | None:
        if index not in self._parsers:
            self._parsers[index] = self._new_parser()
        parser = self._parsers[index]
        if parser is None:
            return super().chunk(index, text, token_ids, finished)
        said, thoughts, calls = self._sorted(parser.feed(text, finished is not None))
        if parser.is_plain:
            self._parsers[index] = None
        if not (said or thoughts or calls or finished is not None or self.with_token_ids):
            return None
        chunk = self._choice_chunk(index, said, token_ids, finished)
        (choice,) = chunk.choices
        if thoughts:
            choice.delta.reasoning_content = choice.delta.reasoning = thoughts
        if calls:
            choice.delta.tool_calls = [_call_delta(call) for call in calls]
            self._has_calls.add(index)
        if choice.finish_reason == "stop" and index in self._has_calls:
            choice.finish_reason = "tool_calls"
        return chunk

    def is_plain(self, index: int) -> bool:
        return super().is_plain(index) and self._parsers.get(index, self) is None

    def _sorted(self, parts: Sequence[Part]) -> tuple[str, str, list[CallDelta]]:
        """Said text, thoughts if they are wanted, and calls, with one delta for each."""
        said = "".join([part for part in parts if isinstance(part, str)])
        thoughts = "".join([part.text for part in parts if isinstance(part, Thoughts)])
        calls: dict[int, CallDelta] = {}
        for part in parts:
            if isinstance(part, CallDelta):
                first = calls.setdefault(part.index, part)
                if first is not part:
                    first.arguments += part.arguments
        return said, thoughts if self._with_reasoning else "", list(calls.values())


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(call.index, FunctionCall(arguments=call.arguments))
    return ToolCallDelta(call.index, FunctionCall(call.name, call.arguments), _new_call_id(), "function")


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class TextAnswer(_Answer):
    _prefix = "cmpl-"

    def __init__(
        self,
        model: str,
        options: AnswerOptions,
        logprobs: LogprobsWriter | None = None,
        *,
        echo: list[str] | None = None,
        is_prompt_only: bool = False,
    ) -> None:
        """`echo` has the text of each prompt, if it is to come back in front of the answers."""
        super().__init__(model, options, logprobs)
        self._echo = echo
        self._echoed: set[int] = set()
        self.is_prompt_only = is_prompt_only

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> TextCompletion:
        body = [
            TextChoice(
                index=index,
                text=self._with_echo(index, choice.text),
                finish_reason=choice.finished.reason,
                stop_reason=choice.finished.stop_reason,
                logprobs=self._whole_logprobs(index, choice),
                token_ids=self._ids(choice.token_ids),
                prompt_token_ids=self._ids(choice.request.prompt_token_ids),
                prompt_logprobs=self._prompt_logprobs(choice.request),
            )
            for index, choice in enumerate(choices)
        ]
        return TextCompletion(self._id, self._created, self._model, body, usage=usage)

    def first_chunk(self, index: int, prompt_token_ids: list[int]) -> TextCompletion | None:
        """Only needed where the prompt's ids are wanted: plain completions have no role to announce."""
        if not self.with_token_ids:
            return None
        return self._chunk([TextChoice(index, "", token_ids=[], prompt_token_ids=prompt_token_ids)])

    def chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> TextCompletion | None:
        """As of a chat."""
        text = self._with_echo(index, text)
        if not (text or finished is not None or self.with_token_ids):
            return None
        choice = TextChoice(index, text, token_ids=self._ids(token_ids))
        if self.logprobs is not None:
            choice.logprobs = self.logprobs.take(index)
        if finished is not None:
            choice.finish_reason, choice.stop_reason = finished.reason, finished.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> TextCompletion:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def is_plain(self, index: int) -> bool:
        return super().is_plain(index) and (self._echo is None or index in self._echoed)

    def _with_echo(self, index: int, text: str) -> str:
        """The prompt in front of the first text of a choice."""
        if self._echo is None or index in self._echoed:
            return text
        self._echoed.add(index)
        return self._echo[index // self.options.num_choices] + text

    def _chunk(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(self._id, self._created, self._model, choices, usage=self._no_usage)


Answer = ChatAnswer | TextAnswer
