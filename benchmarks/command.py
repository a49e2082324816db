"""How a benchmark ends as a command: with an exit code, and an error in one line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine

from frontend import EngineError


def run_command(command: Coroutine[None, None, int], *errors: type[Exception]) -> int:
    """The exit code of the command, 2 after an error of the engine, the system or of `errors`, 130 after Ctrl-C."""
    expected: tuple[type[Exception], ...] = (EngineError, OSError, *errors)
    try:
        return asyncio.run(command)
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
