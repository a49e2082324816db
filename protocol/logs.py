"""How every process writes its log: one record a line on standard error, as text for people or as JSON for collectors.

Adds to each record which process it comes from and which HTTP request it is about. Prompts, answers and API keys are
never handed to a logger; nothing here could take them out again.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

# Set for the duration of an HTTP request, in its own task: whatever is logged meanwhile is about that request.
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)


def configure_logging(process: str, level: LogLevel, log_format: LogFormat) -> None:
    """Makes the root logger of this process write records of `level` and above, Python's warnings among them.

    A record's own fields are given as `logger.info(message, extra={"fields": {...}})`; JSON lines carry them beside the
    message, text lines behind it as name=value.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(process) if log_format == "json" else _TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own: dict[str, Any] = getattr(record, "fields", {})
    current = current_request_id.get()
    return own if current is None or "request_id" in own else {**own, "request_id": current}


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process} %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={'-' if value is None else value}" for name, value in fields.items())])


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)
