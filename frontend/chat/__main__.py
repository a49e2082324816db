"""`python -m frontend.chat`: finds the engine, reads the flags, and talks until someone leaves.

Every sampling parameter is a flag, with the name that `/set` knows it by.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

from frontend.chat.session import COMMANDS, Session
from frontend.chat.settings import Settings
from frontend.chat.terminal import Terminal
from frontend.client import Client
from protocol.errors import EngineError, InvalidRequestError

# How long an engine that is starting may keep silent before that is said.
_PATIENCE_S = 0.5
_START_SECONDS = 3600.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m frontend.chat", description="Chat with the running engine.")
    parser.add_argument("--ipc", metavar="ADDRESS", help="the engine's ipc:// address; default: this user's")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    sampling = parser.add_argument_group("sampling parameters", "as `/set` in the chat; the defaults are the model's")
    for name in Settings.names():
        sampling.add_argument(f"--{name.replace('_', '-')}", dest=f"set_{name}", metavar="VALUE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Chats. Returns the exit code: 0, or 1 if something that was asked for could not be done."""
    given = parse_arguments(arguments)
    terminal = Terminal([command.split(" ")[0] for command in COMMANDS])
    session: Session | None = None
    try:
        with _connect(given.ipc) as client:
            if not client.engine.has_tokenizer:
                print(
                    f"error: the engine at {client.address} runs without a tokenizer (--skip-tokenizer-init), "
                    "and a chat needs one",
                    file=sys.stderr,
                )
                return 1
            settings = Settings(client.engine.sampling_defaults)
            for name in Settings.names():
                value = getattr(given, f"set_{name}")
                if value is not None:
                    settings.set(name, value)
            session = Session(client, terminal, settings, given.system)
            session.run()
    except InvalidRequestError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the answers has enough. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        terminal.close()
    return 1 if session is not None and session.had_errors and not terminal.is_interactive else 0


def _connect(address: str | None) -> Client:
    """The client, once the engine is ready; says so on standard error if that takes long."""
    waiting = threading.Timer(_PATIENCE_S, print, ["waiting for the engine to start …"], {"file": sys.stderr})
    waiting.daemon = True
    waiting.start()
    try:
        return Client(address, timeout=_START_SECONDS)
    finally:
        waiting.cancel()


if __name__ == "__main__":
    sys.exit(main())
