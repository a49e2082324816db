"""Breaks lines between words in text that arrives in pieces, on a terminal that would break them anywhere.

A word is shown as it comes; where it turns out not to fit, it is taken back and written on the next line.
"""

from __future__ import annotations

import unicodedata


class WordWrap:
    """The line that is being written."""

    def __init__(self) -> None:
        self._column = 0
        self._word = ""
        self._word_cells = 0

    def feed(self, text: str, columns: int) -> str:
        """What to write for more text, on a terminal so wide. Contains codes that move the cursor back."""
        # The last column stays empty: a cursor behind it is somewhere else on every terminal.
        width = columns - 1
        written: list[str] = []
        for char in text:
            if char == "\n":
                written.append(char)
                self._start_line()
                continue
            cells = _cells(char, self._column)
            if self._column + cells > width:
                if char.isspace():
                    # The end of the line stands for it.
                    written.append("\n")
                    self._start_line()
                    continue
                written.append(self._next_line())
            if char.isspace() or cells == 2:
                # Scripts of wide characters have no blanks, and may be broken anywhere.
                self._word, self._word_cells = "", 0
            else:
                self._word += char
                self._word_cells += cells
            written.append(char)
            self._column += cells
        return "".join(written)

    def _next_line(self) -> str:
        word, cells = self._word, self._word_cells
        if not word or cells == self._column:
            # Nothing to take along, or a word as long as the line.
            self._start_line()
            return "\n"
        self._column = cells
        return f"\x1b[{cells}D\x1b[K\n{word}"

    def _start_line(self) -> None:
        self._column = 0
        self._word, self._word_cells = "", 0


def _cells(char: str, column: int) -> int:
    """Columns that a character takes."""
    if char == "\t":
        return 8 - column % 8
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
