"""The commands of docs/benchmarking.md work, one after another, as written there; only their sizes are smaller."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks.sweep_file import load_sweep
from tests.benchmarks.test_sweep_plot import png_size, texts
from tests.e2e.conftest import ROOT, RunningEngine

PAGE = (ROOT / "docs" / "benchmarking.md").read_text()
COMMANDS = [code.replace("\\\n", " ").strip() for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
SMALLER = {
    "--concurrency": "1,2",
    "--rate": "10,20",
    "--duration": "0.3",
    "--num-requests": "4",
    "--request-rate": "20",
    "--output-len": "4-16",
}


def smaller(arguments: list[str]) -> list[str]:
    """The command with fewer requests, and loads that take less long."""
    changed = list(arguments)
    for index, argument in enumerate(arguments[:-1]):
        if argument in SMALLER:
            size = SMALLER[argument]
            changed[index + 1] = size.split(",")[-1] if "," not in arguments[index + 1] else size
    return changed


def test_the_commands_work_one_after_another(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    (runtime / "mini-vllm").mkdir(parents=True)
    for directory in (runtime, runtime / "mini-vllm"):
        directory.chmod(0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
    engine: RunningEngine | None = None
    try:
        for command in COMMANDS:
            program, *arguments = shlex.split(command)
            if program == "pip":
                # The test's own environment has it already.
                assert arguments == ["install", "-e", ".[plot]"]
                assert (
                    "plot" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                )
                continue
            assert program == "python"
            if arguments[0] == "launch.py":
                if engine is not None:
                    assert engine.stop() == 0
                engine = RunningEngine(runtime / "mini-vllm", "--port", "0", *arguments[1:]).wait_until_ready()
                continue
            assert engine is not None
            arguments = [engine.url if part == "http://127.0.0.1:8000" else part for part in smaller(arguments)]
            result = subprocess.run(
                [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{command}\n{result.stderr}"
    finally:
        if engine is not None:
            engine.stop_at_any_cost()
    results = tmp_path / "results"
    four, by_rate, sixty_four = (load_sweep(results / f"{name}.json") for name in ("4", "4-by-rate", "64"))
    assert {(sweep.workload.input_len, sweep.workload.output_len) for sweep in (four, by_rate, sixty_four)} == {
        ("64-512", "4-16")
    }
    assert by_rate.swept == "request_rate"
    assert png_size(results / "sweep.png") >= (1280, 1000)
    assert {four.name, sixty_four.name} <= set(texts(results / "sweep.svg"))


def test_the_plot_on_the_page_is_of_what_the_page_measures() -> None:
    names = re.findall(r'--name "(.*?)"', PAGE)
    written = texts(ROOT / "docs" / "sweep.svg")
    assert {names[0], names[-1]} <= set(written)
    assert "Latency against throughput: tiny-qwen3, 64–512 tokens in, 64–256 out" in written
    assert png_size(ROOT / "docs" / "sweep.png") >= (1280, 1000)


def test_every_option_that_the_page_names_exists() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    ).stdout
    (table,) = re.findall(r"\| option \| meaning \|\n(.*?)\n\n", PAGE, re.DOTALL)
    options = re.findall(r"--[a-z][a-z-]+", table)
    assert len(options) >= 12
    for option in options:
        assert option in text


def test_files_that_the_page_names_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)[)#]", PAGE):
        assert (ROOT / "docs" / path).exists(), path
