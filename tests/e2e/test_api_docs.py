"""Everything in docs/api.md works as it is written there.

A section's examples are run against the engine that all share, or, where the section has a `python launch.py` line, one
started by it. A JSON block behind a curl command is what it answers, a text block what the code before it prints.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import promql_parser
import pytest

from tests.e2e.conftest import ROOT, RunningEngine
from tests.support.metrics import read_metrics

DOCS = ROOT / "docs"
PAGE = (DOCS / "api.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def run(language: str, code: str, url: str) -> str:
    code = code.replace("http://127.0.0.1:8000", url)
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{code}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("title", SECTIONS)
def test_the_examples_of_a_section_run(
    title: str, engine: RunningEngine, start_engine: Callable[..., RunningEngine]
) -> None:
    url, answer, num_run = engine.url, "", 0
    for language, code in BLOCK.findall(SECTIONS[title]):
        if language == "json":
            assert json.loads(answer) == json.loads(code)
        elif language == "text":
            assert answer == code
        elif code.startswith("python launch.py"):
            started = start_engine("--port", "0", *shlex.split(code.removeprefix("python launch.py")))
            # The log may be JSON, so it is the address that is waited for, as whoever reads the log would.
            url = started.wait_for(r"(http://127\.0\.0\.1:\d+)")
        else:
            answer = run(language, code, url)
            assert len(answer.strip()) > 4
            assert '"error"' not in answer
            num_run += 1
    assert num_run


def test_the_metrics_of_the_table_are_those_that_are_served(engine: RunningEngine) -> None:
    served = {name.partition("{")[0] for name in read_metrics(engine.http)}
    histograms = {name.removesuffix("_bucket") for name in served if name.endswith("_bucket")}
    parts = {histogram + part for histogram in histograms for part in ("_bucket", "_count", "_sum")}
    tabled = set(re.findall(r"^\| `((?:mini_)?vllm:\w+)` \|", PAGE, re.MULTILINE))
    assert tabled == {name for name in (served - parts) | histograms if name.startswith(("vllm:", "mini_vllm:"))}


def test_the_dashboard_asks_for_metrics_that_are_served(engine: RunningEngine) -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    served = {name.partition("{")[0] for name in read_metrics(engine.http)}
    named = {name for text in expressions for name in re.findall(r"\b(?:(?:mini_)?vllm:|process_|python_)\w+", text)}
    assert named <= served
    # Nothing that looks like a metric has another name.
    for text in expressions:
        words = set(re.findall(r"[\w:]+(?=\{)", text))
        assert words <= named, words - named
    # What the engine is there for is on it, and what is on it is where Grafana can draw it.
    assert len({name for name in named if name.startswith("vllm:")}) >= 20
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_panel_of_the_dashboard_asks_in_promql() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    variables = {f"${variable['name']}": "x" for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$__interval", "1m")
            for name, value in variables.items():
                text = text.replace(name, value)
            assert "$" not in text
            promql_parser.parse(text)
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("rate(vllm:prompt_tokens_total[)")


def test_files_that_the_page_names_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (DOCS / Path(path)).exists(), path
