"""The examples of docs/tuning.md work, and those of docs/troubleshooting.md fail with the message that is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.e2e.conftest import ROOT, RunningEngine

BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
LAUNCH = "python launch.py"


def sections(page: str) -> dict[str, str]:
    return {part.splitlines()[0]: part for part in (ROOT / "docs" / page).read_text().split("\n## ")[1:]}


def run(command: str, url: str) -> str:
    """What a shell command prints."""
    command = command.replace("http://127.0.0.1:8000", url).replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    return result.stdout + result.stderr


TUNING, TROUBLESHOOTING = sections("tuning.md"), sections("troubleshooting.md")


@pytest.mark.parametrize("title", [title for title, text in TUNING.items() if "```" in text])
def test_tuning_examples_work(title: str, engine: RunningEngine, start_engine: Callable[..., RunningEngine]) -> None:
    url = engine.url
    for _, code in BLOCK.findall(TUNING[title]):
        if code.startswith(LAUNCH):
            url = start_engine("--port", "0", *shlex.split(code.removeprefix(LAUNCH))).wait_until_ready().url
        else:
            answer = run(code, url)
            assert answer.strip()
            assert "error" not in answer


@pytest.mark.parametrize("title", [title for title, text in TROUBLESHOOTING.items() if "```text" in text])
def test_errors_read_as_shown(title: str, engine: RunningEngine) -> None:
    printed = ""
    for language, code in BLOCK.findall(TROUBLESHOOTING[title]):
        if language == "text":
            # "ADDRESS" stands for the address of the engine that runs already, as it does for the shared one here.
            assert code.strip().replace("ADDRESS", engine.address) in printed
        elif code.strip() != f"{LAUNCH} --port 0":
            printed = run(code.replace("ADDRESS", engine.address), engine.url)


def test_both_pages_have_the_examples_that_are_looked_for() -> None:
    assert sum(text.count(LAUNCH) for text in TUNING.values()) >= 4
    assert sum(text.count("```text") for text in TROUBLESHOOTING.values()) >= 8


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / path).exists(), path


def test_every_test_that_the_security_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 25
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
