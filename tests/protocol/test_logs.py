"""Log records as lines, in a process of their own: logging's setup is the whole process's."""

import json
import subprocess
import sys

CODE = """
import logging, warnings
from protocol.logs import configure_logging, current_request_id
configure_logging("core", {level!r}, {format!r})
logger = logging.getLogger("a.b")
logger.info("%d blocks", 7, extra={{"fields": {{"size": 1.5, "name": None}}}})
logger.debug("hidden")
current_request_id.set("trace-7")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("about\\nthis")
warnings.warn("old")
"""


def lines(log_format: str, level: str = "info") -> list[str]:
    code = CODE.format(level=level, format=log_format)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_json_is_one_object_a_line_with_the_request_it_is_about() -> None:
    first, failure, warning = map(json.loads, lines("json"))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "process": "core",
        "logger": "a.b",
        "message": "7 blocks",
        "size": 1.5,
        "name": None,
    }
    assert (failure["level"], failure["message"], failure["request_id"]) == ("error", "about\nthis", "trace-7")
    assert "ZeroDivisionError" in failure["exception"]
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")


def test_text_has_the_fields_behind_the_message() -> None:
    first, *rest = lines("text")
    assert first.endswith(" core INFO 7 blocks size=1.5 name=-")
    assert any(line.endswith("this request_id=trace-7") for line in rest)
    assert "ZeroDivisionError: division by zero" in rest


def test_records_below_the_level_are_not_written() -> None:
    assert [json.loads(line)["level"] for line in lines("json", "warning")] == ["error", "warning"]
    assert [json.loads(line)["level"] for line in lines("json", "debug")] == ["info", "debug", "error", "warning"]
