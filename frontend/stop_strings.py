"""Finds the strings that end an answer in text that arrives in pieces.

Text that may be the beginning of a stop string is held back until it is known not to be one. Where the text is cut
does not depend on how it was cut into pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class StopStrings:
    """Watches one answer.

    The first stop string to be completed ends it; of several completed by the same character, the longest. With
    `include` it is the end of the text, without it is left out.

    Attributes:
        found: the stop string that ended the text, or None so far.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = sorted(stop)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now known to be part of the answer. Nothing comes after `found` is set."""
        if self.found is not None or not text:
            return ""
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, self.found = match
            self._held = ""
            return text[: start + len(self.found) * self._include]
        start = self._held_from(text)
        self._held = text[start:]
        return text[:start]

    def flush(self) -> str:
        """What was held back, when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        first: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first[:2]):
                first = (start + len(stop), start, stop)
        return None if first is None else first[1:]

    def _held_from(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts.

        A position that is passed over here is never looked at again, so the cost is constant a character.
        """
        for start in range(len(text)):
            if self._begins_stop(text[start:]):
                return start
        return len(text)

    def _begins_stop(self, text: str) -> bool:
        # In sorted order, the strings that begin with `text` come right where `text` itself would be.
        index = bisect_left(self._stop, text)
        return index < len(self._stop) and self._stop[index].startswith(text)
