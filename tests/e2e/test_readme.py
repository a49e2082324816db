"""Everything in the README works as it is written there: commands, snippets, the list of flags."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.config import EngineOptions, help_rows
from tests.e2e.conftest import ROOT, RunningEngine

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in SNIPPETS if language == "python"]
CURL = [code for language, code in SNIPPETS if language == "bash" and code.startswith("curl")]

CHAT = [code for language, code in SNIPPETS if language == "bash" and "| python -m frontend.chat" in code]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An engine at this user's default IPC address, with a runtime directory of the test's own."""
    runtime = tmp_path_factory.mktemp("runtime")
    runtime.chmod(0o700)
    (runtime / "mini-vllm").mkdir(mode=0o700)
    engine = RunningEngine(runtime / "mini-vllm", "--port", "0").wait_until_ready()
    yield {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT), "ENGINE_URL": engine.url}
    engine.stop_at_any_cost()


def run(command: list[str], environment: dict[str, str], tmp_path: Path) -> str:
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_snippet_runs_and_prints_an_answer(code: str, environment: dict[str, str], tmp_path: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", environment["ENGINE_URL"])
    assert len(run([sys.executable, "-c", code], environment, tmp_path).strip()) > 4


@pytest.mark.parametrize("code", CURL)
def test_curl_snippet_answers(code: str, environment: dict[str, str], tmp_path: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", environment["ENGINE_URL"])
    assert "Paris" in run(["bash", "-c", code], environment, tmp_path)


@pytest.mark.parametrize("code", CHAT)
def test_chat_snippet_answers(code: str, environment: dict[str, str], tmp_path: Path) -> None:
    code = code.replace("python -m", f"{sys.executable} -m")
    assert "Paris" in run(["bash", "-c", code], environment, tmp_path)


def test_every_kind_of_snippet_was_found() -> None:
    assert len(PYTHON) >= 3
    assert len(CURL) >= 1
    assert len(CHAT) == 1


def test_the_list_of_flags_is_complete() -> None:
    assert len(help_rows()) == len(EngineOptions.__struct_fields__)
    for flag, default, text in help_rows():
        assert f"| `{flag}` | {default} | {text} |" in README


def test_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
