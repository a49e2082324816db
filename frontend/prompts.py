"""From what a user sends to token ids that the core can be given, with every check that does not need the core.

Shared by HTTP and IPC, so that both refuse the same things in the same words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import msgspec

from frontend.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError
from protocol.limits import MAX_TEXT_CHARS, require_few
from protocol.messages import ChatPrompt, EngineInfo, Prompt, TextPrompt, unpack_ints
from protocol.sampling import SamplingParams

# A text longer than this (a few milliseconds of work) is encoded in a thread, so that running streams do not wait.
_LONG_TEXT_CHARS = 8192


class RenderedPrompt(msgspec.Struct, frozen=True):
    """A prompt as text, with what encoding it needs to know."""

    text: str
    add_special_tokens: bool
    param: str


def is_long(rendered: RenderedPrompt | list[int]) -> bool:
    return isinstance(rendered, RenderedPrompt) and len(rendered.text) > _LONG_TEXT_CHARS


class Prompts:
    """Renders, encodes and checks prompts for one engine."""

    def __init__(self, tokenizer: Tokenizer | None, engine: EngineInfo, executor: Executor) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = engine.max_model_len
        self._vocab_size = engine.vocab_size
        self._executor = executor

    def render(self, prompt: Prompt, truncate: int | None = None) -> RenderedPrompt | list[int]:
        """The prompt's text, or its token ids if it came as such, only those that `encode` is to keep of them.

        Raises:
            InvalidRequestError: it needs a tokenizer or a chat template that is not there, or the template refuses it,
                or it is longer than anything that is encoded.
        """
        if isinstance(prompt, TextPrompt):
            self._require_tokenizer("prompt")
            require_few(len(prompt.text), MAX_TEXT_CHARS, "prompt", "characters")
            return RenderedPrompt(prompt.text, True, "prompt")
        if isinstance(prompt, ChatPrompt):
            tokenizer = self._require_tokenizer("messages")
            text = tokenizer.render_chat(prompt.messages, prompt.tools, prompt.template_options)
            require_few(len(text), MAX_TEXT_CHARS, "messages", "characters")
            return RenderedPrompt(text, False, "messages")
        # Before there is an object for each id: a message may hold millions.
        token_ids = unpack_ints(prompt.token_ids)
        if truncate is None:
            self._require_room(len(token_ids), "prompt")
        return self._truncated(token_ids, truncate).tolist()

    def encode(self, rendered: RenderedPrompt | list[int], truncate: int | None = None) -> list[int]:
        """Checked token ids of a rendered prompt, in this thread; only the last `truncate` of them, if that is given,
        or for -1 as many as leave room for an answer of one."""
        if isinstance(rendered, list):
            return self.check(self._truncated(rendered, truncate), "prompt")
        tokenizer = self._require_tokenizer(rendered.param)
        if truncate is None:
            self._require_possible(tokenizer, rendered)
        token_ids = tokenizer.encode(rendered.text, rendered.add_special_tokens)
        return self.check(self._truncated(token_ids, truncate), rendered.param)

    def _require_possible(self, tokenizer: Tokenizer, rendered: RenderedPrompt) -> None:
        """Raises InvalidRequestError if a text cannot fit whatever its tokens are, which takes no encoding to know."""
        most = tokenizer.most_chars(self._max_model_len)
        if most is not None and len(rendered.text) > most:
            raise InvalidRequestError(
                f"{rendered.param} has {len(rendered.text)} characters, which leaves no room for an answer: this "
                f"model's maximum context length, {self._max_model_len} tokens, holds at most {most} characters",
                rendered.param,
            )

    def _truncated(self, token_ids: Any, truncate: int | None) -> Any:
        if truncate is None:
            return token_ids
        return token_ids[-(self._max_model_len - 1 if truncate == -1 else truncate) :]

    async def encode_in_thread(self, rendered: RenderedPrompt | list[int], truncate: int | None = None) -> list[int]:
        """The same in another thread, for prompts that are long."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.encode, rendered, truncate)

    async def token_ids(self, prompt: Prompt | list[int], truncate: int | None = None) -> list[int]:
        """Checked token ids of a prompt, without making the event loop wait for a long one. Cut as in `encode`.

        Raises:
            InvalidRequestError: the prompt cannot be served.
        """
        rendered = prompt if isinstance(prompt, list) else self.render(prompt)
        if is_long(rendered):
            return await self.encode_in_thread(rendered, truncate)
        return self.encode(rendered, truncate)

    async def tokenize(self, prompt: TextPrompt | ChatPrompt, add_special_tokens: bool | None = None) -> list[int]:
        """A prompt's token ids, also of one that is too long to be served.

        `add_special_tokens` of None does as a completion or chat would.

        Raises:
            InvalidRequestError: as `render`; or the text is not made of characters.
        """
        rendered = self.render(prompt)
        assert isinstance(rendered, RenderedPrompt)
        special = rendered.add_special_tokens if add_special_tokens is None else add_special_tokens
        encode = self._require_tokenizer(rendered.param).encode
        if not is_long(rendered):
            return encode(rendered.text, special)
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode, rendered.text, special)

    async def detokenize(self, token_ids: list[int], param: str) -> str:
        """The text of token ids, that of special tokens included.

        Raises:
            InvalidRequestError: there is no tokenizer, or an id is outside of the vocabulary.
        """
        decode = self._require_tokenizer(param).decode
        self._check_ids(token_ids, param)
        if len(token_ids) <= _LONG_TEXT_CHARS:
            return decode(token_ids, False)
        return await asyncio.get_running_loop().run_in_executor(self._executor, decode, token_ids, False)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        return self._require_tokenizer("return_token_strs").token_strings(token_ids)

    def check(self, token_ids: list[int], param: str) -> list[int]:
        """Returns the ids, if they are a prompt that can be served.

        Raises:
            InvalidRequestError: no ids, ids outside of the vocabulary, or no room for an answer.
        """
        if not token_ids:
            raise InvalidRequestError(f"{param} is empty: it must hold at least one token", param)
        self._require_room(len(token_ids), param)
        self._check_ids(token_ids, param)
        return token_ids

    def _require_room(self, num_tokens: int, param: str) -> None:
        if num_tokens >= self._max_model_len:
            raise InvalidRequestError(
                f"{param} has {num_tokens} tokens, which leaves no room for an answer: "
                f"this model's maximum context length is {self._max_model_len} tokens, prompt and answer",
                param,
            )

    def _check_ids(self, token_ids: list[int], param: str) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            position = next(i for i, token in enumerate(token_ids) if not 0 <= token < self._vocab_size)
            raise InvalidRequestError(
                f"{param} holds {token_ids[position]} at position {position}, which is no token id: "
                f"ids are 0 to {self._vocab_size - 1}",
                param,
            )

    def fit_max_tokens(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> SamplingParams:
        """`params` with as many tokens as were asked for and as fit into the context."""
        room = self._max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None and params.max_tokens <= room:
            return params
        return msgspec.structs.replace(params, max_tokens=room)

    def require_room(self, max_tokens: int, prompt_token_ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequestError if so many tokens do not fit behind the prompt."""
        if max_tokens > self._max_model_len - len(prompt_token_ids):
            raise InvalidRequestError(
                f"{param} is too large: {max_tokens} tokens behind a prompt of {len(prompt_token_ids)} exceed "
                f"this model's maximum context length of {self._max_model_len} tokens",
                param,
            )

    def _require_tokenizer(self, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(
                "the engine runs without a tokenizer (--skip-tokenizer-init): send the prompt as token ids", param
            )
        return self._tokenizer
