"""Tells what a model thinks from what it says, in text that arrives in pieces.

Qwen3's form: an answer may open with thoughts between <think> and </think>, and the prompt may already have opened or
closed them. What comes out does not depend on how the text was cut into pieces. Knows nothing of tokens or of requests.
"""

from __future__ import annotations

from typing import Literal

from frontend.tags import beginning_of

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"

# Before an answer or in it: thoughts may still begin, their tag is open, they have begun, or they cannot come any more.
Thinking = Literal["undecided", "open", "begun", "over"]


def thinking_after_prompt(prompt_end: str) -> Thinking:
    """Where an answer starts, by the last characters of the prompt, which the chat template wrote."""
    prompt_end = prompt_end.rstrip()
    if prompt_end.endswith(CLOSING_TAG):
        return "over"
    return "open" if prompt_end.endswith(OPENING_TAG) else "undecided"


def thinking_after_beginning(answer: str) -> Thinking:
    """Where an answer goes on of which `answer` is written already."""
    if not answer.lstrip().startswith(OPENING_TAG):
        return "over" if answer.strip() else "undecided"
    if CLOSING_TAG in answer:
        return "over"
    return "begun" if answer.strip() != OPENING_TAG else "open"


class ReasoningParser:
    """One answer. Line breaks next to the tags belong to the tags: they are in neither text.

    Attributes:
        is_over: all further text is said and comes back from `feed` as it is.
    """

    def __init__(self, thinking: Thinking = "undecided") -> None:
        self._state: Literal["undecided", "open", "begun", "closed", "over"] = thinking
        self._held = ""

    @property
    def is_over(self) -> bool:
        return self._state == "over"

    def feed(self, text: str) -> tuple[str, str]:
        """The thoughts and the said text that are final now."""
        text, self._held = self._held + text, ""
        thoughts = ""
        if self._state == "undecided":
            text = self._decide(text)
        if self._state in ("open", "begun"):
            thoughts, text = self._think(text)
        if self._state == "closed":
            text = text.lstrip("\n")
            if text:
                self._state = "over"
        return thoughts, text

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return (held.rstrip("\n"), "") if self._state in ("open", "begun") else ("", held)

    def _decide(self, text: str) -> str:
        start = text.lstrip()
        if start.startswith(OPENING_TAG):
            self._state = "open"
            return start.removeprefix(OPENING_TAG)
        if OPENING_TAG.startswith(start):
            self._held = text
            return ""
        self._state = "over"
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """The thoughts in `text` and what follows them."""
        if self._state == "open":
            text = text.lstrip("\n")
        thoughts, closed, rest = text.partition(CLOSING_TAG)
        if closed:
            self._state = "closed"
            return thoughts.rstrip("\n"), rest
        final = text[: beginning_of(CLOSING_TAG, text)].rstrip("\n")
        self._held = text[len(final) :]
        if final:
            self._state = "begun"
        return final, ""
