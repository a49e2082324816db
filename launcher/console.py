"""What the launcher itself says, to people or, as JSON records, to programs. Knows nothing of processes."""

from __future__ import annotations

import logging
import sys
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
        phase = progress.phase
        if self._as_records:
            if progress.done == progress.total:
                logger.info("loading %s: %d done", phase, progress.total)
            return
        if phase not in self._bars:
            self._bars[phase] = tqdm(
                total=progress.total, desc=f"loading {phase}", file=sys.stderr, disable=not sys.stderr.isatty()
            )
        bar = self._bars[phase]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            bar.close()
            if bar.disable:
                print(f"loading {phase}: {progress.total} done", file=sys.stderr, flush=True)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
