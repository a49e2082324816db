"""The terminal as the chat uses it: lines in, with editing and history, and text out, styled where that can be seen.

Input and output may each be a pipe instead: then there are no prompts, no escape codes, and whatever is not the answer
goes to standard error. Knows nothing of engines.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from frontend.chat.wrap import WordWrap

try:
    import readline as _readline_module
except ImportError:
    # Python can be built without; lines are then edited as the terminal itself does.
    _readline: ModuleType | None = None
else:
    _readline = _readline_module

PROMPT, CONTINUED = "> ", "… "
BLOCK = '"""'
_HISTORY_LINES = 1000
_STYLES = {"dim": "\x1b[2m", "bold": "\x1b[1m", "error": "\x1b[31m"}
_RESET = "\x1b[0m"
# A model's answer must not be able to move the cursor or write to the clipboard: control characters are shown as signs.
_HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Terminal:
    """Standard input, output and error of this process.

    Attributes:
        is_interactive: whether someone types.
        is_styled: whether answers may contain escape codes.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        """`commands` are what Tab completes at the beginning of a line."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            # Bytes that are no text, or a terminal that cannot show a character, are no reason to end a conversation.
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        self.is_interactive = sys.stdin.isatty()
        self._has_screen = sys.stdout.isatty()
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
        self.is_styled = self._has_screen and not plain
        self._edits_lines = self.is_interactive and self._has_screen and _readline is not None
        self._commands = sorted(commands)
        self._column_is_0 = True
        self._wrap = WordWrap()
        if self._edits_lines:
            self._start_editing()

    # --- in ---------------------------------------------------------------------------------------------------------

    def read_message(self) -> str | None:
        """The next message, of one line or several, or None at the end of the input.

        A line that ends with a backslash is continued by the next, and three double quotes enclose any number of lines.

        Raises:
            KeyboardInterrupt: Ctrl-C on an empty line. With text typed, that is thrown away instead.
        """
        while True:
            try:
                return self._read_lines()
            except _TypedTextDropped:
                self._write_notice("\n")

    def _read_lines(self) -> str | None:
        line = self._read_line(PROMPT, False)
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            return self._read_block(line.lstrip()[len(BLOCK) :])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._read_line(CONTINUED, True)
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _read_block(self, first: str) -> str | None:
        lines = [first]
        while not lines[-1].rstrip().endswith(BLOCK):
            following = self._read_line(CONTINUED, True)
            if following is None:
                return "\n".join(lines).strip("\n")
            lines.append(following)
        lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str, is_continued: bool) -> str | None:
        try:
            if self._edits_lines:
                return input(self._invisible("bold", prompt))
            if self.is_interactive:
                self._write_notice(prompt)
            line = sys.stdin.readline()
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            if is_continued or (self._edits_lines and _readline is not None and _readline.get_line_buffer()):
                raise _TypedTextDropped from None
            raise
        if not line:
            return None
        return line.removesuffix("\n").removesuffix("\r")

    def _invisible(self, style: str, prompt: str) -> str:
        """A styled prompt, with its codes marked as taking no room, so that long lines wrap where they should."""
        if not self.is_styled:
            return prompt
        return f"\x01{_STYLES[style]}\x02{prompt}\x01{_RESET}\x02"

    def _start_editing(self) -> None:
        assert _readline is not None
        is_libedit = "libedit" in (_readline.__doc__ or "")
        _readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        _readline.set_completer(self._complete)
        _readline.set_completer_delims(" ")
        _readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            _readline.read_history_file(str(history_file()))

    def _complete(self, text: str, number: int) -> str | None:
        assert _readline is not None
        if _readline.get_begidx() > 0:
            return None
        fitting = [command for command in self._commands if command.startswith(text)]
        return fitting[number] if number < len(fitting) else None

    # --- out --------------------------------------------------------------------------------------------------------

    def write_answer(self, text: str, style: str | None = None) -> None:
        """A piece of an answer, at once."""
        if not text:
            return
        self._column_is_0 = text.endswith("\n")
        if self._has_screen:
            text = text.translate(_HARMLESS)
        if self.is_styled:
            text = self._wrap.feed(text, _columns())
        sys.stdout.write(self._styled(style, text) if style and self.is_styled else text)
        sys.stdout.flush()

    def end_answer(self) -> None:
        """Ends the answer's line, if it is not ended."""
        if not self._column_is_0:
            self.write_answer("\n")

    def notice(self, text: str, style: str = "dim") -> None:
        """A line about the chat that is no part of the conversation."""
        self.end_answer()
        if self.is_styled:
            text = self._styled(style, WordWrap().feed(text, _columns()))
        self._write_notice(text + "\n")

    def _write_notice(self, text: str) -> None:
        stream = sys.stdout if self._has_screen else sys.stderr
        stream.write(text)
        stream.flush()

    @staticmethod
    def _styled(style: str, text: str) -> str:
        return f"{_STYLES[style]}{text}{_RESET}"

    def close(self) -> None:
        """Saves what was typed for the next time."""
        if not self._edits_lines or _readline is None:
            return
        file = history_file()
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # What people type to a model is their own business.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            _readline.write_history_file(str(file))


def _columns() -> int:
    return shutil.get_terminal_size().columns


class _TypedTextDropped(Exception):
    """Ctrl-C on a line that was not empty."""


def history_file() -> Path:
    """`$XDG_STATE_HOME/mini-vllm/chat_history`, by default below `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "mini-vllm" / "chat_history"
