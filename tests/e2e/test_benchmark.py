"""The benchmark client measures the real engine, over both ways in, and does not let a wrong run pass."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak_http import KINDS, HttpRequests
from tests.e2e.conftest import ROOT, RunningEngine

SMALL = ["--num-requests", "12", "--input-len", "5-20", "--output-len", "4-9", "--no-warmup"]


def run_client(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.client", *flags], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize("way", ["ipc", "http"])
def test_table_and_file_are_written(engine: RunningEngine, way: str, tmp_path: Path) -> None:
    target = ["--ipc", engine.address] if way == "ipc" else ["--http", engine.url, "--vocab-size", "2000"]
    result = run_client(*target, *SMALL, "--json", str(tmp_path / "run.json"), "--runs", "2")
    assert result.returncode == 0, result.stderr
    assert "| output tok/s |" in result.stdout
    assert "| time to first token |" in result.stdout
    saved = json.loads((tmp_path / "run.json").read_text())
    assert len(saved["runs"]) == 2
    for run in saved["runs"]:
        for request in run["requests"]:
            assert request["output_len"] == request["wanted_len"] == len(request["token_times"])
            assert request["sent"] < request["token_times"][0]


def test_rate_concurrency_and_shared_prefix(engine: RunningEngine) -> None:
    result = run_client(
        "--ipc", engine.address, *SMALL, "--request-rate", "50", "--concurrency", "3", "--shared-prefix", "40"
    )
    assert result.returncode == 0, result.stderr


def run_suite(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.suite", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)


def test_a_suite_starts_an_engine_for_its_workloads(tmp_path: Path) -> None:
    result = run_suite("--workload", "b8", "--runs", "1", "--out", str(tmp_path), "--", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    (run,) = json.loads((tmp_path / "b8.json").read_text())["runs"]
    assert run["output_tokens"] == 8 * 512
    rate = f"{run['output_rate']:,.0f}"
    assert f"| b8, output tok/s | 8 | {rate} | {rate} to {rate} |" in result.stdout
    assert "| --no-enable-prefix-caching --max-num-seqs 8 |" in result.stdout


@pytest.mark.slow
def test_a_suite_measures_a_server_in_use(tmp_path: Path) -> None:
    flags = ("--workload", "idle,single", "--runs", "1", "--out", str(tmp_path), "--vocab-size", "2000")
    result = run_suite(*flags, "--", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "| idle, ms | values | mean | p50 | p95 | p99 | max |" in result.stdout
    assert "| single, output tok/s | 1 |" in result.stdout
    assert "| default flags |" in result.stdout


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--workload", "b8,fast"], "'fast' is none of nano, seed"),
        (["--runs", "0"], "--runs must be positive, got 0"),
        (["--workload", "b8", "--", "--model", "/nowhere"], "error: --model /nowhere: no such directory"),
        (["--workload", "b8", "--", "--modell", "x"], "unrecognized arguments: --modell x"),
        (["--workload", "idle", "--", "--device", "cpu", "--no-http"], "--workload idle goes over HTTP"),
    ],
    ids=["workload", "runs", "model", "flag", "no-http"],
)
def test_a_suite_says_why_it_cannot_measure(flags: list[str], error: str, tmp_path: Path) -> None:
    result = run_suite("--out", str(tmp_path), *flags)
    assert result.returncode == 2
    assert error in result.stderr


ONLINE = {
    "idle": ["--prompt-lens", "16,8192", "--num-requests", "2", "--streams", "2", "--output-len", "8"],
    "arrival": ["--num-requests", "3", "--streams", "6", "--stream-output-len", "60", "--request-rate", "20"],
    "poisson": ["--num-requests", "20", "--request-rate", "20", "--input-len", "8-16", "--output-len", "4-8"],
}


@pytest.mark.parametrize("way", ["ipc", "http"])
@pytest.mark.parametrize("workload", ONLINE)
def test_online_workloads_run(engine: RunningEngine, way: str, workload: str, tmp_path: Path) -> None:
    target = ["--ipc", engine.address] if way == "ipc" else ["--http", engine.url, "--vocab-size", "2000"]
    flags = [*ONLINE[workload], "--no-warmup", "--json", str(tmp_path / "run.json")]
    result = run_client(*target, "--workload", workload, *flags)
    assert result.returncode == 0, result.stderr
    assert f"| {workload}, ms | values |" in result.stdout
    assert "time to first token" in result.stdout
    assert "inter-token latency" in result.stdout
    assert ("8,192 tokens does not fit" in result.stdout) == (workload == "idle")
    (run,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    for request in run["requests"]:
        assert request["output_len"] == request["wanted_len"] == len(request["token_times"])


def test_a_named_workload_that_does_not_fit_fails_with_the_reason(engine: RunningEngine) -> None:
    result = run_client("--ipc", engine.address, "--workload", "longctx", "--no-warmup")
    assert result.returncode == 1
    assert "maximum context length" in result.stderr


@pytest.mark.parametrize("flags", [["--ipc", "ipc:///nowhere/engine.sock"], ["--http", "http://127.0.0.1:9"]])
def test_no_engine_there_is_one_line(flags: list[str]) -> None:
    result = run_client(*flags, *SMALL)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


async def test_a_server_that_returns_too_few_tokens_is_noticed() -> None:
    """Any OpenAI-compatible server can be measured: here one without token ids, that cuts answers short."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-le" in line), 0
            )
            request = json.loads(await reader.readexactly(length)) if length else {}
            if head.startswith(b"GET"):
                body, status = b'{"data": [{"id": "short"}]}', b"200 OK"
            elif request.get("return_token_ids"):
                body, status = b'{"error": "unknown field"}', b"400 Bad Request"
            else:
                events = [{"choices": [{"text": "a"}]}, {"choices": [], "usage": {"completion_tokens": 1}}]
                body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
                body, status = body + b"data: [DONE]\n\n", b"200 OK"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    flags = ["--http", f"http://127.0.0.1:{port}", "--num-requests", "3", "--output-len", "2", "--no-warmup"]
    result = await asyncio.to_thread(run_client, *flags)
    server.close()
    assert result.returncode == 1
    assert "1 tokens came back, 2 were asked for" in result.stderr


def test_a_short_soak_looks_at_every_process(engine: RunningEngine) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--ipc", engine.address]
    size = ["--num-requests", "20", "--warmup", "20", "--looks", "1", "--concurrency", "20"]
    result = subprocess.run([*command, *size], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    for process in ("client", "launch.py", "frontend.server", "core.engine", "worker.main"):
        assert f" {process} |" in result.stdout
    assert "| 20 | 0 |" in result.stdout
    assert "| 40 | 0 |" in result.stdout


def test_a_soak_for_a_time_sends_over_both_ways_and_compares_idle_with_idle(engine: RunningEngine) -> None:
    """Memory may grow, in so short a time; files may not."""
    command = [sys.executable, "-m", "benchmarks.soak", "--ipc", engine.address, "--http", engine.url]
    flags = ["--seconds", "4", "--warmup-seconds", "2", "--concurrency", "12", "--allow-percent", "100"]
    result = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert "core.engine" in rows[0]
    assert len(rows) > 4 + 5, "too few kinds for a claim"
    assert "| HTTP: " in result.stdout
    assert "| IPC: run |" in result.stdout


async def test_each_kind_of_a_soaks_http_requests_ends_as_it_should(engine: RunningEngine) -> None:
    requests = HttpRequests(engine.url, seed=1)
    await asyncio.gather(*map(requests.send, KINDS))
    await requests.close_connections()


def test_the_core_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.core_step", "--running", "4", "--steps", "50"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "| 4 |" in result.stdout


def test_the_masks_benchmark_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.masks", "--rows", "1", "8", "--vocab-size", "4000", "--steps", "5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "| 1 |" in result.stdout
    assert "| 8 |" in result.stdout
