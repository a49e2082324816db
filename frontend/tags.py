"""Finds tags such as `<think>` in text that arrives in pieces. Knows nothing of what the tags mean."""

from __future__ import annotations


def beginning_of(tag: str, text: str) -> int:
    """Where the end of `text` that may become `tag` starts, or the length of `text` if it has no such end.

    `tag` begins with the only "<" that it has, and is not in `text` as a whole.
    """
    start = text.rfind("<")
    return start if start >= 0 and tag.startswith(text[start:]) else len(text)
