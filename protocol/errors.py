"""The errors a user can meet, with the field and the value that caused them.

Knows nothing of HTTP or sockets: the frontend turns these into OpenAI error bodies, the Python client raises them.
"""

from __future__ import annotations

from typing import Any

# Characters of what a user is told.
_LONGEST_MESSAGE, _LONGEST_PARAM, _LONGEST_VALUE = 2000, 200, 1000


def shown(value: Any) -> str:
    """A value as a message shows it, whatever it is: `repr` refuses some."""
    try:
        return _shortened(repr(value), _LONGEST_VALUE)
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too long to show"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


class EngineError(Exception):
    """Base of every error that this engine raises on purpose."""


class InvalidRequestError(EngineError, ValueError):
    """A request or option that cannot be served as given.

    Attributes:
        param: name of the field at fault, or None if it is the request as a whole.
        message: what is wrong and what would be right, naming the value. A long one is cut: a value may be megabytes.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        message, param = _shortened(message, _LONGEST_MESSAGE), param and _shortened(param, _LONGEST_PARAM)
        super().__init__(message)
        self.message = message
        self.param = param

    @classmethod
    def out_of_range(cls, param: str, value: Any, expected: str) -> InvalidRequestError:
        return cls(f"{param} must be {expected}, got {shown(value)}", param)


class ConfigError(EngineError, ValueError):
    """A start-up option, model directory or address that cannot be used. The message says what to do next."""


class EngineUnavailableError(EngineError, ConnectionError):
    """No engine answers at the address, or the engine went away while a request was running."""


class EngineOverloadedError(EngineError, RuntimeError):
    """More waits already than the engine lets wait: the request was not taken.

    Attributes:
        retry_after: seconds after which it may be, by what the engine has seen lately.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(EngineError, TimeoutError):
    """The request was not finished in the time that it had.

    Attributes:
        param: the field that says how long that is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestFailedError(EngineError, RuntimeError):
    """The engine accepted a request and could not finish it."""
