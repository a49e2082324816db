"""Texts for parsers that read them in pieces, and ways to cut them."""

from __future__ import annotations

from hypothesis import strategies as st


def pieces_of(*parts: str) -> st.SearchStrategy[str]:
    """Texts made of these parts in any order."""
    return st.lists(st.sampled_from(parts), max_size=16).map("".join)


def cut(text: str, data: st.DataObject) -> list[str]:
    """The text in pieces, some of them empty."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12), label="cuts"))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
