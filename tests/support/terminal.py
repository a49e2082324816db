"""A terminal with a program in it: types keys, and reads the screen as someone who sits there would see it."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl

import pyte

from tests.support.requests import wait_until

CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"


class TerminalProgram:
    """A process on a pseudo-terminal, which is its controlling one, so that Ctrl-C is a signal to it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 100, lines: int = 40
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = ""
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                # Linux reports the end of the other side as an error.
                return
            if not data:
                return
            with self._lock:
                self.raw += data.decode(errors="replace")
                self._stream.feed(data)

    @property
    def text(self) -> str:
        """What stands on the screen, without the blanks at the ends of lines."""
        with self._lock:
            return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 60.0) -> str:
        """Waits until the screen matches a pattern, `count` times; returns the screen."""
        self.wait_until(lambda: len(re.findall(pattern, self.text, re.MULTILINE)) >= count, pattern, seconds)
        return self.text

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        try:
            wait_until(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def wait(self, seconds: float = 30.0) -> int:
        """Waits until the program has ended; returns its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        os.close(self._master)
