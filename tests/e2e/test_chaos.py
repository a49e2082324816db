"""Hundreds of streams while the worker and the core are killed and stopped at random: none of them notices."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import ROOT, RunningEngine

SECONDS = 60


def test_streams_survive_chaos(start_engine: Callable[..., RunningEngine], tmp_path: Path) -> None:
    flags = ("--port", "0", "--give-up-after", "1000000", "--step-timeout", "2")
    engine = start_engine(*flags).wait_until_ready()
    command = [sys.executable, "-m", "benchmarks.chaos", "--ipc", engine.address, "--seconds", str(SECONDS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 200)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = dict(re.findall(r"^\| (.+?) \| ([\d.,]+) \|$", result.stdout, re.MULTILINE))
    faults = {name: int(count) for name, count in figures.items() if "SIG" in name}
    assert sum(faults.values()) >= 6
    assert {name.split(",")[0] for name in faults} == {"worker", "core"}
    assert int(figures["streams that ended"].replace(",", "")) > 200
    assert int(figures["streams that were left or whose client vanished"].replace(",", "")) > 0
    children = engine.children()
    assert len(children) == 3
    assert engine.stop() == 0
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []
