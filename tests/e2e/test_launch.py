"""Starting, failing to start, and stopping, as a user sees it on the terminal."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import ROOT, RunningEngine
from tests.support.terminal import CTRL_C, TerminalProgram

Start = Callable[..., RunningEngine]


def test_ready_within_15_seconds_and_says_how_to_reach_it(start_engine: Start) -> None:
    start = time.monotonic()
    engine = start_engine("--port", "0").wait_until_ready()
    assert time.monotonic() - start < 15
    assert engine.address in engine.output
    for phase in ("weights", "kernels"):
        assert re.search(rf"^loading {phase}: \d+ done in \d+\.\d s$", engine.output, re.MULTILINE)
    command = engine.output[engine.output.index("curl") :]
    answer = subprocess.run(["bash", "-c", f"curl -s {command[4:]}"], capture_output=True, text=True, timeout=30)
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_a_terminal_shows_bars_instead_of_lines(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "--no-http",
        "--device",
        "cpu",
        "--ipc",
        f"ipc://{tmp_path}/e.sock",
    ]
    terminal = TerminalProgram(command, {})
    try:
        terminal.wait_for("ready in")
        for phase in ("weights", "kernels"):
            assert re.search(rf"loading {phase}: 100%.*\d+/\d+", terminal.text)
        assert "done in" not in terminal.text
        terminal.type(CTRL_C)
        assert terminal.wait() == 0
    finally:
        terminal.close()


def test_health_is_503_until_ready(start_engine: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = start_engine("--port", str(port))
    seen = set()
    deadline = time.monotonic() + 60
    while 200 not in seen and time.monotonic() < deadline:
        try:
            seen.add(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
        except httpx.TransportError:
            time.sleep(0.01)
    assert seen == {503, 200}
    assert engine.stop() == 0


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_process_socket_or_file(start_engine: Start, signal_number: int, tmp_path: Path) -> None:
    engine = start_engine("--port", "0").wait_until_ready()
    children = engine.children()
    assert len(children) == 3
    engine.process.send_signal(signal_number)
    assert engine.wait() == 0
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_to_any_thread_of_the_core_stops_it(start_engine: Start) -> None:
    """The kernel may choose one, and the main thread, which waits, is then not woken by it."""
    engine = start_engine("--port", "0").wait_until_ready()
    core = engine.child("core.engine")
    others = [
        thread.id
        for thread in core.threads()
        if thread.id != core.pid
        # ZeroMQ's threads take no signals.
        and "SigBlk:\t0000000000000000" in Path(f"/proc/{core.pid}/task/{thread.id}/status").read_text()
    ]
    assert ctypes.CDLL(None, use_errno=True).tgkill(core.pid, others[0], signal.SIGTERM) == 0
    core.wait(5)
    engine.wait_for("recovered after")
    assert engine.stop() == 0


def test_stopping_while_starting_leaves_nothing(start_engine: Start, tmp_path: Path) -> None:
    for delay in (0.3, 0.8, 1.5):
        engine = start_engine("--port", "0")
        time.sleep(delay)
        engine.process.send_signal(signal.SIGTERM)
        engine.wait()
        assert list(tmp_path.iterdir()) == []


def test_a_hangup_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "launch.py", "--no-http", "--device", "cpu", "--ipc", f"ipc://{tmp_path}/e.sock"]
    tmp_path.chmod(0o700)
    with subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert any("IPC" in line for line in process.stdout)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.terminate()
        assert process.wait(20) == 0


def test_a_killed_launcher_takes_its_processes_along(start_engine: Start) -> None:
    engine = start_engine("--port", "0").wait_until_ready()
    children = engine.children()
    engine.process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    # The next engine on the address is not disturbed by what the killed one left.
    start_engine("--port", "0").wait_until_ready()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/model"], "no such directory"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--block-size", "24"], "power of two"),
        (["--attention-backend", "triton"], "needs a GPU"),
        (["--max-model-len", "999999"], "--max-model-len"),
        (["--max-model-len", "2048", "--num-gpu-blocks-override", "4"], "does not fit in the KV cache"),
        (["--kv-cache-memory", "1KiB"], "does not hold one block"),
        (["--max-model-len", "1"], "--max-model-len"),
        (["--port", "99999"], "--port"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_start_says_why_in_one_line(start_engine: Start, flags: list[str], message: str) -> None:
    engine = start_engine("--port", "0", *flags) if "--port" not in flags else start_engine(*flags)
    assert engine.wait() in (1, 2)
    errors = [line for line in engine.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, engine.output
    assert message in errors[0]
    assert "Traceback" not in engine.output


def test_a_directory_that_cannot_be_served_is_named(start_engine: Start, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    engine = start_engine("--model", str(tmp_path / "m"))
    assert engine.wait() == 2
    assert "not a model directory" in engine.output
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["BertModel"]}')
    engine = start_engine("--model", str(tmp_path / "m"))
    assert engine.wait() == 2
    assert "BertModel" in engine.output


def test_a_hub_id_without_a_network_names_the_command_to_run(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--model", "Qwen/Qwen3-0.6B", "--ipc", f"ipc://{tmp_path}/x/engine.sock"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "hf download Qwen/Qwen3-0.6B" in result.stderr


def test_an_address_with_a_long_path_is_refused_by_name(start_engine: Start, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * (90 - len(str(tmp_path))))
    directory.mkdir(mode=0o700)
    engine = start_engine("--port", "0", directory=directory)
    assert engine.wait() == 2
    assert f"error: the paths of sockets in {directory}" in engine.output
    assert list(directory.iterdir()) == []


def test_a_port_in_use_is_named(start_engine: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        engine = start_engine("--port", str(port))
        assert engine.wait() == 1
    assert f"error: port {port}" in engine.output
    assert "--port" in engine.output


def test_a_second_engine_on_an_address_is_refused(engine: RunningEngine, start_engine: Start) -> None:
    second = start_engine("--port", "0", directory=engine.directory)
    assert second.wait() == 2
    assert f"process {engine.process.pid}" in second.output
    assert engine.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "module", ["protocol.process", "frontend", "frontend.server", "frontend.chat.__main__", "core.engine", "launch"]
)
def test_only_the_worker_imports_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
