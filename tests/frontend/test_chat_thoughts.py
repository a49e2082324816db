"""Thoughts and answers are told apart however the text was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.chat.thoughts import ThoughtSplitter


def split(*texts: str) -> tuple[str, str]:
    """All that was thought, and all that was said."""
    splitter = ThoughtSplitter()
    pieces = [piece for text in texts for piece in splitter.feed(text)] + splitter.flush()
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, reverse=True), "thoughts come first"
    thought, said = ("".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("thought", "said"))
    return thought, said


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("Paris.", "", "Paris."),
        ("  Paris.\n", "", "  Paris.\n"),
        ("<think>\nHm.\n\nWell.\n</think>\n\nParis.", "Hm.\n\nWell.", "Paris."),
        ("<think>\n\n</think>\n\nParis.", "", "Paris."),
        ("\n<think>Hm. </thin </think>So < that.", "Hm. </thin", "So < that."),
        ("<think>\nUnfinished </th", "Unfinished </th", ""),
        ("<thin", "", "<thin"),
        ("a <think>b</think>", "", "a <think>b</think>"),
        ("", "", ""),
    ],
)
def test_thoughts_are_what_stands_between_tags_at_the_beginning(text: str, thought: str, said: str) -> None:
    assert split(text) == (thought, said)
    assert split(*text) == (thought, said)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", " ", "\n", "a", "<"]), max_size=12), st.data()
)
def test_where_the_text_is_cut_makes_no_difference(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    assert split(text[:cut], text[cut:]) == split(text) == split(*text)
