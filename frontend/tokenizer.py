"""A model's tokenizer: text to token ids, ids to text, conversations to prompts.

Reads the files of a Hugging Face model directory with the `tokenizers` package alone, since importing transformers
would bring torch with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from frontend.chat_template import ChatTemplate
from frontend.detokenizer import (
    BYTE_TOKEN,
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    is_byte_level,
    special_token_ids,
    token_bytes_table,
)
from protocol.errors import ConfigError, InvalidRequestError

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Characters that Unicode's composition (NFC) makes one of, at most: a letter and three marks.
_MOST_COMPOSED = 4


class Tokenizer:
    """Encodes, decodes and renders for one model. Safe to call from several threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, vocab_size: int, chat_template: ChatTemplate | None = None
    ) -> None:
        """`vocab_size` is the model's, which may exceed the tokenizer's: ids without a token decode to nothing."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = special_token_ids(backend)
        self._token_bytes: dict[bool, list[bytes]] = {}
        if is_byte_level(backend):
            for skip_special_tokens in (False, True):
                self._token_bytes[skip_special_tokens] = token_bytes_table(backend, vocab_size, skip_special_tokens)
        self._most_chars_of_token = self._longest_token()

    @classmethod
    def load(cls, model_path: Path, file: Path, vocab_size: int) -> Tokenizer:
        """Reads `file`, the model's tokenizer.json, and what the model directory says beside it.

        Raises:
            ConfigError: a file cannot be read.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            # The package raises bare Exception for whatever is wrong with the file.
            raise ConfigError(f"{file} cannot be read: {error}") from error
        settings_file = model_path / "tokenizer_config.json"
        settings = _read_json(settings_file)
        try:
            _add_missing_tokens(backend, settings)
            chat_template = _load_chat_template(model_path, settings)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{settings_file} or a file that belongs to it has a wrong form: {error!r}") from error
        return cls(backend, vocab_size, chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens around it that the model was trained with, if it was.

        Raises:
            InvalidRequestError: the text is not made of characters.
        """
        try:
            # The batch form releases the interpreter while it works, so that a long text does not stop the event loop.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:
            raise InvalidRequestError("the text holds half a surrogate pair, which is no character") from error

    def most_chars(self, num_tokens: int) -> int | None:
        """More characters than this no text can have whose encoding has so many tokens; None if that is not known."""
        return None if self._most_chars_of_token is None else num_tokens * self._most_chars_of_token

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """How the vocabulary writes each token, in a byte-level one with Ġ for a space; "" for ids without a token."""
        return [self._backend.id_to_token(token) or "" for token in token_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in a text that it does not begin; b"" for ids without a token."""
        if self._token_bytes:
            return self._token_bytes[False][token_id]
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        # Decoders drop a space at the beginning, so the token is looked at behind itself.
        once, twice = self.decode([token_id], False), self.decode([token_id, token_id], False)
        return twice[len(once) :].encode()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental detokenizer for one sequence."""
        if self._token_bytes:
            return ByteLevelDetokenizer(self._token_bytes[skip_special_tokens])
        return WindowDetokenizer(self._backend, self._special_tokens if skip_special_tokens else frozenset())

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary writes so, if there is one."""
        return self._backend.token_to_id(text)

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._chat_template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, to be encoded without special tokens: the template writes its own.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template: use /v1/completions or a text prompt", "messages"
            )
        return self._chat_template.render(messages, tools, options)

    def _longest_token(self) -> int | None:
        """Characters of text that one token stands for at most, before normalization; None if there is no bound."""
        if not self._token_bytes:
            return None
        normalizer = self._backend.normalizer
        # Tokens that take the spaces around them take any number of them.
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return None
        if normalizer is not None and not isinstance(normalizer, tokenizers.normalizers.NFC):
            return None
        longest = max(map(len, self._token_bytes[False]))
        return longest if normalizer is None else longest * _MOST_COMPOSED


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _add_missing_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Adds tokens that only tokenizer_config.json knows, as transformers does."""
    added = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted(added.items(), key=lambda item: int(item[0])):
        known = backend.token_to_id(token["content"])
        is_next = known is None and int(token_id) == backend.get_vocab_size()
        # One that the vocabulary has, but not as a token apart from the text, becomes one under its own id.
        if is_next or (known == int(token_id) and token.get("special", False)):
            options = {name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
            backend.add_tokens(
                [tokenizers.AddedToken(token["content"], special=token.get("special", False), **options)]
            )


def _load_chat_template(model_path: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    special_tokens = {
        name: text for name in _SPECIAL_TOKEN_NAMES if (text := _token_text(settings.get(name))) is not None
    }
    file = model_path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if not template:
        return None
    if isinstance(template, str):
        return ChatTemplate(template, special_tokens)
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ConfigError(f"{model_path / 'tokenizer_config.json'}: chat_template has no entry named 'default'")
    return ChatTemplate(named["default"], special_tokens, named.get("tool_use"))


def _token_text(token: Any) -> str | None:
    """Special tokens are written as their text or as an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token
