"""What the launcher itself says, to people or, as JSON records, to programs. Knows nothing of processes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from protocol.config import EngineOptions
from protocol.launcher_messages import Progress
from protocol.logs import configure_logging

logger = logging.getLogger("launch")


class Console:
    """What the launcher itself says: to people, with progress bars on a terminal, or to the log if that is JSON."""

    def __init__(self, options: EngineOptions) -> None:
        configure_logging("launcher", options.log_level, options.log_format)
        self._as_records = options.log_format == "json"
        self._bars: dict[str, tqdm] = {}
        self._began: dict[str, float] = {}  # when each phase was first told of

    def error(self, message: str) -> None:
        if self._as_records:
            logger.error("%s", message)
        else:
            print(f"error: {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        if self._as_records:
            logger.warning("%s", message)
        else:
            print(message, file=sys.stderr, flush=True)

    def announce(self, lines: Sequence[str], fields: dict[str, str | int | float]) -> None:
        """Says that the engine is ready, in lines or as fields."""
        if self._as_records:
            logger.info("ready", extra={"fields": fields})
        else:
            print("\n".join(lines), flush=True)

    def progress(self, progress: Progress) -> None:
        """Shows how much of a phase is done: as a bar on a terminal, elsewhere in a line when all of it is."""
        phase, is_done = progress.phase, progress.done == progress.total
        began = self._began.setdefault(phase, time.monotonic())
        done = f"loading {phase}: {progress.total} done in {time.monotonic() - began:.1f} s"
        if self._as_records:
            if is_done:
                logger.info("%s", done)
            return
        if not sys.stderr.isatty():
            if is_done:
                print(done, file=sys.stderr, flush=True)
            return
        if phase not in self._bars:
            self._bars[phase] = tqdm(total=progress.total, desc=f"loading {phase}", file=sys.stderr)
        bar = self._bars[phase]
        bar.update(progress.done - bar.n)
        if is_done:
            bar.close()

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
