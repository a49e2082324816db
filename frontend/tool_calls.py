"""Finds the function calls in an answer, in text that arrives in pieces.

The form is that of Qwen3 and Hermes: `<tool_call>`, an object with "name" and "arguments", `</tool_call>`. What comes
out does not depend on how the text was cut into pieces. Knows nothing of the functions that were offered.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from msgspec import Struct

from frontend.tags import beginning_of

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# How a call begins when its keys come in the usual order. Then its arguments can be passed on as they are written.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\<]+)"\s*,\s*"arguments"\s*:\s*\{')
_LONGEST_HEAD = 512
# What matters in JSON to whoever looks for its end, outside and inside of strings.
_OUTSIDE = re.compile(r'["{}\[\]<]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')


class CallDelta(Struct):
    """New text of the arguments of call `index`; the first delta of a call has its name."""

    index: int
    arguments: str
    name: str | None = None


class ToolCallParser:
    """One answer.

    What looks like a call and is none stays in the said text, with its tags. White space around calls is dropped. With
    `stream`, arguments are passed on while they are written, so that the name and the form of a call are all that is
    known of it; otherwise a call is one delta, and its arguments are a JSON object.
    """

    def __init__(self, *, stream: bool, parallel: bool = True) -> None:
        """Without `parallel`, calls after the first are dropped."""
        self._stream = stream
        self._parallel = parallel
        self._num_calls = 0
        self._held = ""
        self._call: _CallText | None = None
        self._follows_call = False
        self._close_is_due = False

    def feed(self, text: str) -> list[str | CallDelta]:
        """What is final now, in the order in which it was written: said text and parts of calls."""
        parts: list[str | CallDelta] = []
        text, self._held = self._held + text, ""
        while text:
            text = self._read_text(text, parts) if self._call is None else self._read_call(self._call, text, parts)
        return parts

    def flush(self) -> list[str | CallDelta]:
        """What was held back, at the end of the text. A call that is not complete is none, unless it was passed on."""
        parts: list[str | CallDelta] = []
        call, self._call = self._call, None
        held, self._held = self._held, ""
        if call is None:
            self._say(held, parts)
        elif call.is_passed_on:
            self._pass_on(call, len(call.text), parts)
        else:
            self._say(call.before + call.text, parts)
        return parts

    def _read_text(self, text: str, parts: list[str | CallDelta]) -> str:
        """Reads up to the next call and returns what follows its opening tag."""
        if self._follows_call:
            text = text.lstrip()
            if self._close_is_due and text.startswith(_CLOSE):
                self._close_is_due = False
                return text.removeprefix(_CLOSE)
            if not text or (self._close_is_due and _CLOSE.startswith(text)):
                self._held = text
                return ""
            self._follows_call = self._close_is_due = False
        said, opened, rest = text.partition(_OPEN)
        end = len(said) if opened else beginning_of(_OPEN, said)
        final = said[:end].rstrip()
        self._say(final, parts)
        if opened:
            self._call = _CallText(said[len(final) :] + _OPEN)
        else:
            self._held = said[len(final) :]
        return rest

    def _read_call(self, call: _CallText, text: str, parts: list[str | CallDelta]) -> str:
        """Reads to the end of the call and returns what follows it."""
        call.read(text)
        if self._stream and call.name is not None and not call.is_passed_on:
            self._begin_call(call, parts)
        if call.state == "open":
            if call.is_passed_on:
                self._pass_on(call, call.position, parts)
            return ""
        if not call.is_passed_on:
            whole = call.parsed() if call.state == "complete" else None
            if whole is None:
                self._say(call.before + call.text[: call.position], parts)
            else:
                call.name, arguments = whole
                self._begin_call(call, parts)
                self._add(CallDelta(call.index, arguments), parts)
            return self._end_call(call, call.position, is_call=whole is not None)
        if call.state == "complete":
            self._pass_on(call, call.position, parts)
            return self._end_call(call, call.position, is_call=True)
        # Too late to take it back: it is passed on as it is, up to where a call ends.
        end = call.text.find(_CLOSE, call.position)
        if end < 0:
            self._pass_on(call, beginning_of(_CLOSE, call.text), parts)
            return ""
        self._pass_on(call, end, parts)
        return self._end_call(call, end, is_call=True)

    def _end_call(self, call: _CallText, end: int, is_call: bool) -> str:
        self._call = None
        self._follows_call = self._close_is_due = is_call
        return call.text[end:]

    def _begin_call(self, call: _CallText, parts: list[str | CallDelta]) -> None:
        call.index, call.is_passed_on = self._num_calls, True
        self._num_calls += 1
        self._add(CallDelta(call.index, "", call.name), parts)

    def _pass_on(self, call: _CallText, end: int, parts: list[str | CallDelta]) -> None:
        """Passes on the arguments up to `end` of the call's text."""
        assert call.arguments_start is not None
        end = end if call.arguments_end is None else call.arguments_end
        start = call.arguments_start + call.num_passed_on
        if end > start:
            call.num_passed_on += end - start
            self._add(CallDelta(call.index, call.text[start:end]), parts)

    def _add(self, delta: CallDelta, parts: list[str | CallDelta]) -> None:
        if delta.index and not self._parallel:
            return
        last = parts[-1] if parts else None
        if isinstance(last, CallDelta) and last.index == delta.index:
            last.arguments += delta.arguments
        else:
            parts.append(delta)

    @staticmethod
    def _say(text: str, parts: list[str | CallDelta]) -> None:
        if text:
            parts.append(text)


class _CallText:
    """The text behind one opening tag, read up to the end of the object in it.

    Attributes:
        before: what was held back before this text: white space and the tag.
        state: "open" until the object has ended, or "broken" if it cannot be one.
        position: the end of what has been read; behind the object if complete, at what broke it if broken.
        name, arguments_start, arguments_end: of a call with its keys in the usual order, as soon as they are known.
    """

    def __init__(self, before: str) -> None:
        self.before = before
        self.text = ""
        self.state: Literal["open", "complete", "broken"] = "open"
        self.position = 0
        self.name: str | None = None
        self.arguments_start: int | None = None
        self.arguments_end: int | None = None
        self.index = 0
        self.is_passed_on = False
        self.num_passed_on = 0
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def read(self, text: str) -> None:
        head_was_short = len(self.text) < _LONGEST_HEAD
        self.text += text
        if self.name is None and head_was_short:
            head = _HEAD.match(self.text, 0, _LONGEST_HEAD)
            if head is not None:
                self.name, self.arguments_start = head[1], head.end() - 1
        while self.state == "open" and self.position < len(self.text):
            self._read_on()

    def _read_on(self) -> None:
        """To behind the next character that matters."""
        if self._depth == 0:
            character = self.text[self.position]
            if character == "{":
                self._depth = 1
            elif not character.isspace():
                self.state = "broken"
                return
            self.position += 1
            return
        if self._is_escaped:
            self._is_escaped = False
            self.position += 1
            return
        found = (_INSIDE if self._in_string else _OUTSIDE).search(self.text, self.position)
        if found is None:
            self.position = len(self.text)
            return
        character = found[0]
        if character == "<" or character < " ":
            # A tag outside of a string, or a control character in one.
            self.state, self.position = "broken", found.start()
            return
        self.position = found.end()
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\":
            self._is_escaped = True
        elif character in "{[":
            self._depth += 1
        else:
            self._depth -= 1
            if self._depth == 1 and self.arguments_start is not None and self.arguments_end is None:
                self.arguments_end = self.position
            if self._depth == 0:
                self.state = "complete"

    def parsed(self) -> tuple[str, str] | None:
        """Name and arguments of a complete call, or None if it is none."""
        try:
            call = json.loads(self.text[: self.position])
        except (ValueError, RecursionError):
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        if self.arguments_start is not None and name == self.name:
            return name, self.text[self.arguments_start : self.arguments_end]
        try:
            return name, json.dumps(arguments, ensure_ascii=False)
        except RecursionError:
            return None
