"""One conversation in the terminal: messages and commands in, answers and what they cost out.

Knows the Python client and the terminal's surface; knows nothing of HTTP, sockets or escape codes.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from frontend.chat.settings import Settings, shown
from frontend.chat.terminal import Terminal
from frontend.client import Client
from frontend.reasoning import CLOSING_TAG, OPENING_TAG, ReasoningParser
from protocol.errors import EngineUnavailableError, InvalidRequestError, RequestFailedError

COMMANDS = {
    "/help": "these commands",
    "/set NAME VALUE": "a sampling parameter, such as `/set temperature 0.2`; `default` as value takes it back",
    "/show": "the model and the current settings",
    "/system TEXT": "what the model is told before the conversation; without TEXT, nothing",
    "/reset": "forget the conversation, keep the settings",
    "/quit": "leave, as Ctrl-D does",
}
_KEYS = """\
A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer, and leaves when there is none. Arrow keys edit and recall what you typed."""
_FULL = "The conversation fills the model's context: /reset begins a new one."


class Session:
    """The conversation and its settings.

    Attributes:
        had_errors: whether anything that was asked for could not be done.
    """

    def __init__(self, client: Client, terminal: Terminal, settings: Settings, system: str | None = None) -> None:
        self._client = client
        self._terminal = terminal
        self._settings = settings
        self._system = system
        self._turns: list[dict[str, str]] = []
        self.had_errors = False

    def run(self) -> None:
        """Answers until the input ends or someone wants to leave.

        Raises:
            EngineUnavailableError: the engine went away.
        """
        if self._terminal.is_interactive:
            engine = self._client.engine
            self._terminal.notice(f"{engine.model} · context of {engine.max_model_len:,} tokens · /help for commands\n")
        while True:
            try:
                message = self._terminal.read_message()
            except KeyboardInterrupt:
                message = None
            if message is None:
                if self._terminal.is_interactive:
                    # The prompt stands alone on its line.
                    self._terminal.notice("")
                return
            if message.startswith("/"):
                if not self._obey(message):
                    return
            elif message.strip():
                self._answer(message)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _obey(self, line: str) -> bool:
        """Follows a command. False if it was the last one."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            width = max(map(len, COMMANDS))
            rows = [f"{name:{width}}  {what}" for name, what in COMMANDS.items()]
            self._terminal.notice("\n".join([*rows, "", _KEYS]))
        elif command == "/reset":
            self._turns.clear()
            self._terminal.notice("The conversation is forgotten.")
        elif command == "/system":
            self._system = argument or None
            self._terminal.notice("The system prompt is set." if argument else "There is no system prompt.")
        elif command == "/set":
            self._set(argument)
        elif command == "/show":
            self._show()
        else:
            self._error(f"there is no command {command}; /help lists them (a message may begin with a space and /)")
        return True

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if not value.strip():
            self._error(f"/set wants a name and a value, such as `/set temperature 0.2`, got {argument!r}")
            return
        try:
            accepted = self._settings.set(name, value.strip())
        except InvalidRequestError as error:
            self._error(error.message)
        else:
            self._terminal.notice(f"{name} = {shown(accepted)}")

    def _show(self) -> None:
        engine = self._client.engine
        rows = [
            ("model", engine.model),
            ("context", f"{engine.max_model_len:,} tokens"),
            ("messages", str(len(self._turns))),
            ("system", self._system or "none"),
            *((name, value + ("  (set)" if changed else "")) for name, value, changed in self._settings.rows()),
        ]
        width = max(len(name) for name, _ in rows)
        self._terminal.notice("\n".join(f"{name:{width}}  {value}" for name, value in rows))

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        """Asks, shows the answer as it comes, and keeps both if there was one."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        turns: list[dict[str, Any]] = [*system, *self._turns, {"role": "user", "content": message}]
        parser, speed = ReasoningParser(), _Speed()
        said: list[str] = []
        reason: str | None = None
        try:
            # Leaving the stream, however, aborts the request in the engine.
            with closing(self._client.stream(turns, self._settings.params)) as chunks:  # type: ignore[type-var]
                for chunk in chunks:
                    speed.count(len(chunk.token_ids))
                    said.append(self._write(*parser.feed(chunk.text)))
                    reason = chunk.finish_reason
            said.append(self._write(*parser.flush()))
        except KeyboardInterrupt:
            reason = "interrupt"
        except InvalidRequestError as error:
            self._error(error.message)
            if self._turns and error.param == "messages":
                self._terminal.notice("/reset begins a new conversation.")
            return
        except RequestFailedError as error:
            self._error(str(error))
            return
        except EngineUnavailableError:
            self._terminal.end_answer()
            raise
        self._end_thoughts()
        self._terminal.notice(self._summary(reason, speed))
        if reason == "length" and speed.num_tokens != self._settings.params.max_tokens:
            self._terminal.notice(_FULL)
        if self._terminal.is_interactive:
            self._terminal.notice("")
        if any(said):
            self._turns += [turns[-1], {"role": "assistant", "content": "".join(said)}]

    def _write(self, thoughts: str, said: str) -> str:
        """Shows a piece of an answer and returns what is said in it."""
        if thoughts:
            if not self._is_thinking:
                self._begin_thoughts()
            self._terminal.write_answer(thoughts, "dim")
        if said:
            self._end_thoughts()
            self._terminal.write_answer(said)
        return said

    _is_thinking = False

    def _begin_thoughts(self) -> None:
        self._is_thinking = True
        if not self._terminal.is_styled:
            self._terminal.write_answer(f"{OPENING_TAG}\n")

    def _end_thoughts(self) -> None:
        if not self._is_thinking:
            return
        self._is_thinking = False
        self._terminal.end_answer()
        # Where thoughts cannot be dimmed, they stay between their tags.
        self._terminal.write_answer("\n" if self._terminal.is_styled else f"{CLOSING_TAG}\n\n")

    def _summary(self, reason: str | None, speed: _Speed) -> str:
        parts = [str(speed)]
        if reason == "interrupt":
            parts.insert(0, "stopped")
        elif reason == "abort":
            parts.insert(0, "ended by the engine")
        elif reason == "length":
            parts.insert(0, "cut off")
        return " · ".join(parts)

    def _error(self, message: str) -> None:
        self.had_errors = True
        self._terminal.notice(f"error: {message}", "error")


class _Speed:
    """How many tokens came, and how fast."""

    def __init__(self) -> None:
        self._asked = time.perf_counter()
        self._first = self._last = self._asked
        self._num_first = 0
        self.num_tokens = 0

    def count(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        self._last = time.perf_counter()
        if not self.num_tokens:
            self._first, self._num_first = self._last, num_tokens
        self.num_tokens += num_tokens

    def __str__(self) -> str:
        if not self.num_tokens:
            return "no tokens"
        parts = [f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"]
        if self._last > self._first:
            # Between tokens: how long the first took depends on the prompt, and is said apart.
            parts.append(f"{(self.num_tokens - self._num_first) / (self._last - self._first):.0f} tokens/s")
        parts.append(f"first after {(self._first - self._asked) * 1000:.0f} ms")
        return " · ".join(parts)
