"""What the text of an answer must be, as a user states it. Knows nothing of grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from protocol.limits import require_shallow

MAX_CHOICES = 1024
MAX_GRAMMAR_CHARS = 128 * 1024
MAX_REGEX_CHARS = 8 * 1024  # compiling one takes more than in proportion to its length


class StructuredOutputsParams(msgspec.Struct, kw_only=True, frozen=True, array_like=True):
    """Exactly one of the first five says what the answer is; the names are vLLM's.

    Attributes:
        json: a JSON Schema, as an object or as its JSON text: the answer is JSON that is valid against it.
        regex: the answer as a whole matches this regular expression (of Rust's, which has no look-around).
        choice: the answer is one of these strings.
        grammar: the answer is in the language of this Lark grammar, whose first rule is `start`.
        json_object: true: the answer is any JSON object.
        whitespace_pattern: a regular expression of what may stand between the tokens of JSON. Without it JSON is
            written on one line, with one space after each comma and colon.

    Raises:
        InvalidRequestError: none or several of them are given, or one has a wrong type; the error names the field.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            msgspec.structs.force_setattr(self, "json_object", None)
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs must have exactly one of {', '.join(kinds)}, got {' and '.join(given) or 'none'}",
                "structured_outputs",
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            self._require_text(name, getattr(self, name))
        if isinstance(self.json, str):
            self._require_text("json", self.json)
        elif self.json is not None and not isinstance(self.json, Mapping | bool):
            raise _wrong("json", self.json, "a JSON schema, as an object or as text")
        else:
            require_shallow(self.json, "structured_outputs.json")
        if self.json_object not in (None, True):
            raise _wrong("json_object", self.json_object, "true or false")
        if self.choice is not None:
            self._check_choice()

    def _check_choice(self) -> None:
        choices = self.choice
        if not isinstance(choices, list | tuple) or not all(isinstance(text, str) for text in choices):
            raise _wrong("choice", choices, "a list of strings")
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise _wrong("choice", f"{len(choices)} strings", f"1 to {MAX_CHOICES} strings")
        msgspec.structs.force_setattr(self, "choice", tuple(choices))

    def _require_text(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, str):
            raise _wrong(name, value, "a string")
        most = MAX_REGEX_CHARS if name in ("regex", "whitespace_pattern") else MAX_GRAMMAR_CHARS
        if not 1 <= len(value) <= most:
            raise _wrong(name, f"{len(value)} characters", f"1 to {most} characters")

    def schema(self) -> Any:
        """The JSON schema as an object, or as true or false, if the answer is JSON.

        Raises:
            InvalidRequestError: its text is not JSON.
        """
        if self.json_object:
            return {"type": "object"}
        if not isinstance(self.json, str):
            return self.json
        try:
            schema = json.loads(self.json)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"structured_outputs.json is not valid JSON: {error}", "structured_outputs.json"
            ) from error
        require_shallow(schema, "structured_outputs.json")
        return schema


def _wrong(name: str, value: object, expected: str) -> InvalidRequestError:
    return InvalidRequestError.out_of_range(f"structured_outputs.{name}", value, expected)
