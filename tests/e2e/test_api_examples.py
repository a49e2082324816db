"""The examples in the API's documentation that show what they print run as they are written, and print that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, RunningEngine

API = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", API, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=lambda text: text.splitlines()[-1][:40])
def test_example_prints_what_is_shown(engine: RunningEngine, code: str, printed: str, tmp_path: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", engine.url)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed


def test_every_example_was_found() -> None:
    assert len(EXAMPLES) == API.count("```text") >= 5
