"""A sweep of the real engine over both ways in, a plot of both, and what is left of a sweep that is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sweep_file import load_sweep
from tests.benchmarks.test_sweep_plot import png_size, texts
from tests.e2e.conftest import ROOT, RunningEngine

SMALL = ["--input-len", "5-20", "--output-len", "4-9"]


def sweep_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.sweep", *flags]


def run_sweep(*flags: str, without_matplotlib: bool = False) -> subprocess.CompletedProcess[str]:
    command = sweep_command(*flags)
    if without_matplotlib:
        code = f"import sys; sys.modules['matplotlib'] = None; sys.argv = {command[2:]}; "
        command = [sys.executable, "-c", code + "from benchmarks.sweep import main; sys.exit(main())"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def way_to(engine: RunningEngine, way: str) -> list[str]:
    return ["--ipc", engine.address] if way == "ipc" else ["--http", engine.url, "--vocab-size", "2000"]


def test_a_sweep_over_ipc_and_one_over_http_are_plotted_together(engine: RunningEngine, tmp_path: Path) -> None:
    size = {
        "ipc": ["--concurrency", "1,4", "--num-requests", "8"],
        "http": ["--concurrency", "1,4", "--duration", "0.5"],
    }
    files = []
    for way, flags in size.items():
        files.append(tmp_path / f"{way}.json")
        result = run_sweep(*way_to(engine, way), *flags, *SMALL, "--name", f"over {way}", "--json", str(files[-1]))
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == 4
        sweep = load_sweep(files[-1])
        assert [point.load for point in sweep.points] == [1, 4]
        for point in sweep.points:
            assert point.inter_token_ms is not None
            assert 0 < point.ttft_ms.p50 < point.e2e_ms.p50 <= point.e2e_ms.p99
            assert point.output_tokens_per_s == pytest.approx(point.output_tokens / point.duration_s)
            assert (point.user_tokens_per_s or 0) > 0
    result = run_sweep("--plot", *map(str, files), "--out", str(tmp_path / "both"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "both.png"), str(tmp_path / "both.svg")]
    assert png_size(tmp_path / "both.png") >= (1280, 1000)
    assert {"over ipc", "over http", "1", "4"} <= set(texts(tmp_path / "both.svg"))


def test_measuring_needs_no_matplotlib(engine: RunningEngine, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    flags = ["--rate", "20,40", "--num-requests", "4", *SMALL, "--json", str(file)]
    result = run_sweep(*way_to(engine, "ipc"), *flags, without_matplotlib=True)
    assert result.returncode == 0, result.stderr
    assert [(point.load, point.requests) for point in load_sweep(file).points] == [(20, 4), (40, 4)]


@pytest.mark.parametrize("way", ["ipc", "http"])
@pytest.mark.parametrize(
    "loads",
    [
        # Interrupted while it waits to send, and while many requests run.
        ["--rate", "50,0.01", "--num-requests", "4", *SMALL],
        ["--concurrency", "1,40", "--duration", "1.5", *SMALL],
    ],
    ids=["rate", "concurrency"],
)
def test_ctrl_c_leaves_what_was_measured(engine: RunningEngine, way: str, loads: list[str], tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    command = sweep_command(*way_to(engine, way), *loads, "--json", str(file))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    # The next point has begun, as soon as its row is the only thing missing.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"1 of 2 points are in {file}" in errors
    assert "Traceback" not in errors
    assert "never retrieved" not in errors
    assert len(load_sweep(file).points) == 1


@pytest.mark.parametrize("flags", [["--ipc", "ipc:///nowhere/engine.sock"], ["--http", "http://127.0.0.1:9"]])
def test_no_engine_there_is_one_line(flags: list[str], tmp_path: Path) -> None:
    result = run_sweep(*flags, "--concurrency", "1", "--json", str(tmp_path / "a.json"))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
