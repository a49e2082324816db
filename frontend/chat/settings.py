"""What a chat is set to: the sampling parameters that differ from the model's own, given as text.

Any field of `SamplingParams` can be set by its name, so that a new one needs nothing here. Knows no terminal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams

# What a conversation cannot do without, or has no place to show.
_NOT_IN_A_CHAT = {"detokenize": "a chat needs text", "n": "a chat has one answer"}
# What takes a value back to the one it had at the start.
DEFAULT_WORDS = ("default", "none")


class Settings:
    """Sampling parameters of the answers to come.

    Args:
        defaults: what the model recommends, by name.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        # Unlike a single completion, an answer may fill the context.
        self._defaults = {"max_tokens": None, **defaults}
        self._changed: dict[str, Any] = {}

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(**{**self._defaults, **self._changed})

    @staticmethod
    def names() -> list[str]:
        return [name for name in SamplingParams.__struct_fields__ if name not in _NOT_IN_A_CHAT]

    def set(self, name: str, text: str) -> Any:
        """Sets a parameter to the value that the text stands for, as JSON or as it is, and returns that value.

        Raises:
            InvalidRequestError: there is no such parameter, or it cannot have that value.
        """
        if name in _NOT_IN_A_CHAT:
            raise InvalidRequestError(f"{name} cannot be set to {text!r}: {_NOT_IN_A_CHAT[name]}", name)
        if name not in SamplingParams.__struct_fields__:
            known = ", ".join(self.names())
            raise InvalidRequestError(f"there is no sampling parameter {name!r} to set to {text!r}; there are {known}")
        if text.lower() in DEFAULT_WORDS:
            self._changed.pop(name, None)
            return getattr(self.params, name)
        refused: InvalidRequestError | None = None
        for value in _readings(text):
            try:
                accepted = SamplingParams(**{**self._defaults, **self._changed, name: value})
            except InvalidRequestError as error:
                refused = refused or error
            else:
                self._changed[name] = value
                return getattr(accepted, name)
        assert refused is not None
        raise refused

    def rows(self) -> list[tuple[str, str, bool]]:
        """Name, value as `set` takes it, and whether it was changed, of every parameter."""
        params = self.params
        return [(name, shown(getattr(params, name)), name in self._changed) for name in self.names()]


def shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _readings(text: str) -> list[Any]:
    """What a text can mean: a JSON value such as `0.2`, `true` or `["a", "b"]`, else itself."""
    try:
        return [json.loads(text), text]
    except ValueError:
        return [text]
