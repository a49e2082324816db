"""Lines break between words, as a terminal shows them, however the text was cut into pieces."""

from __future__ import annotations

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.chat.wrap import WordWrap

COLUMNS = 20


def on_screen(*pieces: str) -> list[str]:
    wrap, screen = WordWrap(), pyte.Screen(COLUMNS, 60)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    for piece in pieces:
        stream.feed(wrap.feed(piece, COLUMNS))
    return [line.rstrip() for line in "\n".join(screen.display).rstrip().split("\n")]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one line", ["one line"]),
        ("the quick brown fox jumps over", ["the quick brown fox", "jumps over"]),
        ("the quick brown foxes jump", ["the quick brown", "foxes jump"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a donaudampfschifffahrtsgesellschaft", ["a", "donaudampfschifffah", "rtsgesellschaft"]),
        ("日本語のテキスト、そして漢字", ["日本語のテキスト、", "そして漢字"]),
        ("naïve café größer über", ["naïve café größer", "über"]),
    ],
)
def test_words_that_do_not_fit_go_to_the_next_line(text: str, lines: list[str]) -> None:
    expected = [line.replace(" ", "") for line in lines]
    # Pyte shows a wide character as itself and an empty cell.
    assert [line.replace(" ", "") for line in on_screen(text)] == expected
    assert [line.replace(" ", "") for line in on_screen(*text)] == expected


@given(st.lists(st.text("abcdefg", min_size=1, max_size=COLUMNS - 1), max_size=40), st.data())
def test_no_word_is_broken_and_none_is_lost(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    cut = data.draw(st.integers(0, len(text)))
    lines = on_screen(text[:cut], text[cut:])
    assert " ".join(lines).split() == words
    assert all(len(line) < COLUMNS for line in lines)
