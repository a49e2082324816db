"""Turns token ids into text as they arrive: never half a character, never one lost.

For byte-level vocabularies a table from id to bytes and an incremental UTF-8 decoder do it in constant time a token;
other vocabularies are decoded in a sliding window. Knows nothing of requests or stop strings.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol

import tokenizers
from tokenizers import decoders

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
# How vocabularies that are not byte-level write a single byte.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """The text of one sequence. What `feed` and one `flush` at the end return, joined, is the text of all the ids."""

    def feed(self, token_id: int) -> str:
        """The text that became final with this token."""
        ...

    def flush(self) -> str:
        """What was held back, with U+FFFD for characters that never became whole."""
        ...


class ByteLevelDetokenizer:
    """For tokens that stand for bytes: characters are emitted as soon as their last byte is there."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = _Utf8Decoder(errors="replace")
        self._is_inside_character = False

    def feed(self, token_id: int) -> str:
        if not self._is_inside_character:
            try:
                # Nearly always a token is whole characters, and this several times faster.
                return self._token_bytes[token_id].decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(self._token_bytes[token_id])
        self._is_inside_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any other decoder: decodes the last few tokens with and without the newest, and emits the difference.

    Tokens before the window only serve as context, so the cost of a token does not grow with the sequence. Text that a
    later token may still change is held back: an incomplete character, a run of byte tokens, anything that does not
    extend what the window said before.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        """`skipped` are the special tokens, or none if they are to be part of the text."""
        self._backend = backend
        self._skipped = skipped
        self._in_byte_run = False
        self._token_ids: list[int] = []
        self._window_start = 0
        self._window_end = 0
        self._num_emitted = 0

    def _text(self, start: int, end: int | None = None) -> str:
        ids = self._token_ids[start:end]
        return self._backend.decode(ids, skip_special_tokens=bool(self._skipped))

    def feed(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        token = self._backend.id_to_token(token_id)
        if token is not None and token_id not in self._skipped:
            # A run of byte tokens is decoded as a whole, so its first characters are not final before the run ends.
            self._in_byte_run = BYTE_TOKEN.fullmatch(token) is not None
        before = self._text(self._window_start, self._window_end)
        after = self._text(self._window_start)
        unfinished = self._in_byte_run or after.endswith("\ufffd")
        if unfinished or len(after) <= len(before) or not after.startswith(before):
            return ""
        self._window_start = self._window_end
        self._window_end = len(self._token_ids)
        self._num_emitted += len(after) - len(before)
        return after[len(before) :]

    def flush(self) -> str:
        return self._text(0)[self._num_emitted :]


def special_token_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    return isinstance(backend.decoder, decoders.ByteLevel)


def token_bytes_table(backend: tokenizers.Tokenizer, size: int, skip_special_tokens: bool) -> list[bytes]:
    """The bytes each id below `size` contributes to the text; ids that stand for nothing contribute none.

    A byte-level vocabulary writes each byte as one printable character. A token that has any other character, as added
    tokens may, stands for its own UTF-8 bytes.
    """
    table = [b""] * max(size, backend.get_vocab_size(with_added_tokens=True))
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id >= len(table):
            table.extend([b""] * (token_id + 1 - len(table)))
        try:
            table[token_id] = token.translate(_BYTE_OF_CHARACTER).encode("latin-1")
        except UnicodeEncodeError:
            table[token_id] = token.encode()
    if skip_special_tokens:
        for token_id in special_token_ids(backend):
            table[token_id] = b""
    return table


def _byte_of_character() -> dict[int, int]:
    """GPT-2's printable stand-ins for bytes, as a table for `str.translate` to Latin-1.

    Bytes that are printable in Latin-1 stand for themselves and the others, in order, are U+0100 onwards. Characters
    below U+0100 that stand for no byte are sent out of Latin-1, so that encoding a token that holds one fails.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(others, 256)
    table.update({0x100 + index: byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()
