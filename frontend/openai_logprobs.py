"""Log-probabilities as the OpenAI API and vLLM write them: of a chat's tokens, of a plain completion's, of a prompt's.

Takes token ids with what was measured of them, and decides how a token is written. Knows neither requests as they come
nor the bodies that the results become part of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

from frontend.outputs import position_logprobs
from frontend.tokenizer import Tokenizer
from protocol.logprobs import TokenLogprob

# What stands for the logarithm of zero, which JSON cannot write.
_LOWEST = -9999.0


class WrittenToken(Struct):
    """`bytes` is null for a token whose bytes nobody knows: the engine has no tokenizer."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[WrittenToken]


class ChatLogprobs(Struct):
    """Of the tokens of a whole answer, or of those that are new in a chunk."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """The same for plain completions, in columns. An echoed prompt's first token has null for its log-probability."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptTokenLogprob(Struct):
    logprob: float
    rank: int
    decoded_token: str


# For each token of a prompt by token id: the token itself, then the most likely ones in its place.
PromptLogprobs = list[dict[int, PromptTokenLogprob] | None]


class Measured(Protocol):
    """A request of whose tokens, and perhaps of whose prompt's, log-probabilities are known."""

    prompt_token_ids: list[int]
    logprobs: list[TokenLogprob]

    def measured_prompt(self) -> list[TokenLogprob | None]: ...


class TokenNames:
    """How tokens are written: as their text, or as `token_id:…` where ids are wanted or there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_token_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_token_ids = as_token_ids or tokenizer is None

    def text(self, token_id: int) -> str:
        """As in the OpenAI API, `bytes:` and the bytes stand for a token that is only part of a character: as text
        such tokens would look alike."""
        if self._as_token_ids:
            return f"token_id:{token_id}"
        assert self.tokenizer is not None
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode() or f"token_id:{token_id}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes(self, token_id: int) -> list[int] | None:
        return list(self.tokenizer.token_bytes(token_id)) if self.tokenizer is not None else None


class LogprobsWriter(ABC):
    """Of the choices of one response, each by its index: tokens come as they are generated and leave with a body."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._num_seen: dict[int, int] = {}

    def add(self, index: int, token_ids: Sequence[int], request: Measured) -> None:
        """The next tokens of a choice, which is this request."""
        start = self._num_seen.get(index, 0)
        self._num_seen[index] = end = start + len(token_ids)
        for token, measured in zip(token_ids, request.logprobs[start:end], strict=True):
            self._write(index, token, measured)

    @abstractmethod
    def _write(self, index: int, token: int, measured: TokenLogprob) -> None: ...

    @abstractmethod
    def take(self, index: int) -> Any:
        """All that has been added to a choice since the last time; None if that is nothing."""


class ChatLogprobsWriter(LogprobsWriter):
    def __init__(self, names: TokenNames) -> None:
        super().__init__(names)
        self._content: dict[int, list[ChatTokenLogprob]] = defaultdict(list)

    def take(self, index: int) -> ChatLogprobs | None:
        content = self._content.pop(index, None)
        return ChatLogprobs(content) if content else None

    def _write(self, index: int, token: int, measured: TokenLogprob) -> None:
        names = self._names
        top = [
            WrittenToken(names.text(other), max(logprob, _LOWEST), names.bytes(other))
            for other, logprob in zip(measured.top_ids, measured.top_logprobs, strict=True)
        ]
        logprob = max(measured.logprob, _LOWEST)
        self._content[index].append(ChatTokenLogprob(names.text(token), logprob, names.bytes(token), top))


class TextLogprobsWriter(LogprobsWriter):
    """Also knows where in a choice's text each token begins."""

    def __init__(self, names: TokenNames, *, skip_special_tokens: bool, num_echoed: int | None = None) -> None:
        """`num_echoed` alternatives are given for the tokens of the prompt, which is part of the text; -1 gives all
        that are known, None leaves the prompt out."""
        super().__init__(names)
        self._skip_special_tokens = skip_special_tokens
        self._num_echoed = num_echoed
        self._columns: dict[int, TextLogprobs] = {}
        self._texts: dict[int, _TextLength] = {}

    def add(self, index: int, token_ids: Sequence[int], request: Measured) -> None:
        if self._num_echoed is not None and index not in self._num_seen:
            text = _TextLength(self._names.tokenizer, skip_special_tokens=False)
            for token, measured in zip(request.prompt_token_ids, request.measured_prompt(), strict=True):
                self._append(index, text.feed(token), token, measured and measured.narrowed(self._num_echoed))
            self._texts[index] = _TextLength(self._names.tokenizer, self._skip_special_tokens, text.end())
        super().add(index, token_ids, request)

    def take(self, index: int) -> TextLogprobs | None:
        return self._columns.pop(index, None)

    def _write(self, index: int, token: int, measured: TokenLogprob) -> None:
        if index not in self._texts:
            self._texts[index] = _TextLength(self._names.tokenizer, self._skip_special_tokens)
        self._append(index, self._texts[index].feed(token), token, measured)

    def _append(self, index: int, offset: int, token: int, measured: TokenLogprob | None) -> None:
        columns = self._columns.setdefault(index, TextLogprobs([], [], [], []))
        columns.text_offset.append(offset)
        columns.tokens.append(self._names.text(token))
        columns.token_logprobs.append(max(measured.logprob, _LOWEST) if measured else None)
        columns.top_logprobs.append(self._alternatives(token, measured) if measured else None)

    def _alternatives(self, token: int, measured: TokenLogprob) -> dict[str, float]:
        """The token that is there is among them, besides as many as were asked for."""
        found = position_logprobs(token, measured)
        return {self._names.text(other): max(entry.logprob, _LOWEST) for other, entry in found.items()}


class _TextLength:
    """How long the text of some tokens is, in characters; 0 where there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, length: int = 0) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens) if tokenizer is not None else None
        self._length = length

    def feed(self, token: int) -> int:
        """The length before this token, which is where its text begins."""
        length = self._length
        if self._detokenizer is not None:
            self._length += len(self._detokenizer.feed(token))
        return length

    def end(self) -> int:
        if self._detokenizer is not None:
            self._length += len(self._detokenizer.flush())
        return self._length


def prompt_logprobs(names: TokenNames, request: Measured, width: int) -> PromptLogprobs:
    """Of a request's prompt, with so many alternatives; -1 gives all that are known."""
    written: PromptLogprobs = []
    for token, measured in zip(request.prompt_token_ids, request.measured_prompt(), strict=True):
        if measured is None:
            written.append(None)
            continue
        found = position_logprobs(token, measured.narrowed(width)).items()
        written.append({id: PromptTokenLogprob(max(at.logprob, _LOWEST), at.rank, names.text(id)) for id, at in found})
    return written
