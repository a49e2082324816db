"""Tells what a model thinks from what it says, in an answer that arrives in pieces.

Qwen3's form: an answer may open with `<think>…</think>`. Tags may be cut anywhere between two pieces.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPENING, CLOSING = "<think>", "</think>"


class Piece(NamedTuple):
    kind: Literal["thought", "said"]
    text: str


class ThoughtSplitter:
    """Splits one answer. Tags are left out, and blank lines around the thoughts with them."""

    def __init__(self) -> None:
        self._state: Literal["start", "thought", "said"] = "start"
        self._held = ""
        self._is_fresh = True  # nothing but blanks since the part began

    def feed(self, text: str) -> list[Piece]:
        """What is known of the text so far; what may be a piece of a tag is held back."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if OPENING.startswith(begun[: len(OPENING)]) and len(begun) < len(OPENING):
                return []
            if begun.startswith(OPENING):
                self._held = begun[len(OPENING) :]
                self._state = "thought"
            else:
                # Blanks before an answer without thoughts are part of it.
                self._state, self._is_fresh = "said", False
        if self._state == "thought":
            thought, closing, rest = self._held.partition(CLOSING)
            if closing:
                self._add(pieces, "thought", thought.rstrip())
                self._state, self._held, self._is_fresh = "said", rest, True
            else:
                keep = _held_from(thought)
                self._held = thought[keep:]
                self._add(pieces, "thought", thought[:keep])
        if self._state == "said":
            self._add(pieces, "said", self._held)
            self._held = ""
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        text, self._held = self._held, ""
        return [Piece("thought" if self._state == "thought" else "said", text)] if text.strip() else []

    def _add(self, pieces: list[Piece], kind: Literal["thought", "said"], text: str) -> None:
        if self._is_fresh:
            text = text.lstrip()
        if text:
            self._is_fresh = False
            pieces.append(Piece(kind, text))


def _held_from(text: str) -> int:
    """Where blanks and the beginning of a closing tag at the end of the text start."""
    for length in range(min(len(CLOSING) - 1, len(text)), 0, -1):
        if text.endswith(CLOSING[:length]):
            text = text[:-length]
            break
    return len(text.rstrip())
