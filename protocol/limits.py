"""How much of a thing a request may hold, where no other file says so, and how deep what it holds may be nested."""

from __future__ import annotations

from typing import Any

from protocol.errors import InvalidRequestError

# Levels of objects and lists within a field. Half of a schema's levels are its own keywords.
MAX_JSON_DEPTH = 128
# Objects and lists in one HTTP body, each of which takes many times the bytes in memory that it takes in the body.
MAX_JSON_NODES = 1_000_000
MAX_MESSAGES = 8192
MAX_TOOLS = 512
# Characters of one text or conversation, whatever the model's context. Encoding takes some 50 bytes of memory for each.
MAX_TEXT_CHARS = 8 * 1024 * 1024
# As OpenAI has them.
MAX_METADATA_PAIRS, MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS = 16, 64, 512


def require_shallow(value: Any, name: str) -> None:
    """Raises InvalidRequestError if a field's value is nested more deeply than what follows it later can follow."""
    # By level and not by recursion, which is what there must be no need for.
    level: list[Any] = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list | tuple)
        ]
        if not level:
            return
    raise InvalidRequestError(f"{name} is nested too deeply: at most {MAX_JSON_DEPTH} levels are allowed", name)


def require_few(num: int, most: int, name: str, what: str) -> None:
    """Raises InvalidRequestError if a field holds more of something than is allowed."""
    if num > most:
        raise InvalidRequestError(f"{name} must have at most {most} {what}, got {num}", name)
