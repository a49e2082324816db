"""The text of one running request: detokenizer and stop strings in a row.

Exists only for requests that stream text or have stop strings; the others are decoded once, when they end.
"""

from __future__ import annotations

from collections.abc import Sequence

from frontend.detokenizer import Detokenizer
from frontend.stop_strings import StopStrings


class TextOutput:
    """Attributes:
    stopped_by: the stop string that ended the text, or None so far.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        """Stop strings are not looked for in the text of the first `min_tokens` tokens."""
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stop, include_stop) if stop else None
        self._num_unchecked = min_tokens
        self.stopped_by: str | None = None

    def feed(self, token_id: int) -> str:
        """The text that became final with this token."""
        text = self._detokenizer.feed(token_id)
        if self._num_unchecked:
            self._num_unchecked -= 1
            return text
        return self._checked(text) if self._stop_strings is not None else text

    def flush(self) -> str:
        """The rest of the text. It too can complete a stop string."""
        text = self._detokenizer.flush()
        if self._stop_strings is None:
            return text
        text = self._checked(text)
        return text if self.stopped_by is not None else text + self._stop_strings.flush()

    def _checked(self, text: str) -> str:
        assert self._stop_strings is not None
        text = self._stop_strings.feed(text)
        self.stopped_by = self._stop_strings.found
        return text
