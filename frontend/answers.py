"""The two forms in which completions are answered, chat and plain text: whole, and as a stream of chunks.

Builds bodies from text, token ids and counts; knows nothing of sockets or of running requests.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from frontend.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    Message,
    TextChoice,
    TextCompletion,
    Usage,
)
from protocol.logs import current_request_id
from protocol.messages import Finished


class WholeChoice(Struct):
    """A finished choice."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finished: Finished


class _Answer:
    """What is the same in every body of one answer."""

    _prefix = ""

    def __init__(self, model: str, *, with_token_ids: bool, with_usage: bool) -> None:
        """`with_usage` ends a stream with the counts, and as in the OpenAI API puts a null before into every chunk."""
        self._id = self._prefix + (current_request_id.get() or uuid.uuid4().hex)
        self._created = int(time.time())
        self._model = model
        self.with_token_ids = with_token_ids
        self.with_usage = with_usage
        self._no_usage: UnsetType | None = None if with_usage else UNSET

    def _ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self.with_token_ids else UNSET


class ChatAnswer(_Answer):
    _prefix = "chatcmpl-"

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> ChatCompletion:
        body = [
            ChatChoice(
                index=index,
                message=Message(choice.text),
                finish_reason=choice.finished.reason,
                stop_reason=choice.finished.stop_reason,
                token_ids=self._ids(choice.token_ids),
            )
            for index, choice in enumerate(choices)
        ]
        prompt_token_ids = self._ids(choices[0].prompt_token_ids)
        return ChatCompletion(self._id, self._created, self._model, body, usage, prompt_token_ids=prompt_token_ids)

    def first_chunk(self, index: int, prompt_token_ids: list[int]) -> ChatChunk | None:
        chunk = self._chunk([ChatChunkChoice(index, Delta(role="assistant", content=""))])
        chunk.prompt_token_ids = self._ids(prompt_token_ids)
        return chunk

    def chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> ChatChunk:
        choice = ChatChunkChoice(index, Delta(content=text) if text else Delta(), token_ids=self._ids(token_ids))
        if finished is not None:
            choice.finish_reason, choice.stop_reason = finished.reason, finished.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._model, choices, usage=self._no_usage)


class TextAnswer(_Answer):
    _prefix = "cmpl-"

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> TextCompletion:
        body = [
            TextChoice(
                index=index,
                text=choice.text,
                finish_reason=choice.finished.reason,
                stop_reason=choice.finished.stop_reason,
                token_ids=self._ids(choice.token_ids),
                prompt_token_ids=self._ids(choice.prompt_token_ids),
            )
            for index, choice in enumerate(choices)
        ]
        return TextCompletion(self._id, self._created, self._model, body, usage=usage)

    def first_chunk(self, index: int, prompt_token_ids: list[int]) -> TextCompletion | None:
        """Only needed where the prompt's ids are wanted: plain completions have no role to announce."""
        if not self.with_token_ids:
            return None
        return self._chunk([TextChoice(index, "", token_ids=[], prompt_token_ids=prompt_token_ids)])

    def chunk(self, index: int, text: str, token_ids: list[int], finished: Finished | None) -> TextCompletion:
        choice = TextChoice(index, text, token_ids=self._ids(token_ids))
        if finished is not None:
            choice.finish_reason, choice.stop_reason = finished.reason, finished.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> TextCompletion:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(self._id, self._created, self._model, choices, usage=self._no_usage)


Answer = ChatAnswer | TextAnswer
