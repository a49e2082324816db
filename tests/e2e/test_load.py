"""Under load, with the real engine: what is out of time or never read frees its blocks, and SIGTERM drains."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from frontend import AsyncClient, Client, SamplingParams
from tests.e2e.conftest import ROOT, RunningEngine
from tests.frontend.conftest import wait_until

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}
STREAMS, CALLS = 60, 40
SHUTDOWN_SECONDS = 3.0


def is_idle(client: Client) -> bool:
    stats = client.stats()
    return not (stats.num_running or stats.num_waiting) and stats.num_free_blocks == stats.num_blocks


def check_time_that_is_over(engine: RunningEngine, client: Client) -> None:
    response = engine.http.post("/v1/completions", json={**ENDLESS, "timeout": 0.3, "n": 4})
    assert response.status_code == 504, response.text
    assert response.json()["error"]["code"] == "timeout"
    wait_until(lambda: is_idle(client), 5)


def check_stream_that_nobody_reads(engine: RunningEngine, client: Client) -> None:
    aborted = client.stats().aborted_requests
    host, port = engine.url.removeprefix("http://").split(":")
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        body = json.dumps({**ENDLESS, "stream": True, "n": 16, "logprobs": 20}).encode()
        headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        reader.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
        wait_until(lambda: client.stats().aborted_requests == aborted + 16, 30)
        wait_until(lambda: is_idle(client), 5)
    engine.wait_for("does not read its stream")


def test_a_request_is_read_while_streams_keep_the_frontend_busy(
    start_engine: Callable[..., RunningEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steps come faster than the frontend can pass each of them on to 128 streams."""
    monkeypatch.setenv("STEP_MS", "1")
    engine = start_engine("--port", "0", launcher=("-m", "tests.support.timed_worker", "launch")).wait_until_ready()
    command = [
        sys.executable, "-m", "benchmarks.client", "--workload", "arrival", "--http", engine.url, "--streams", "128",
        "--num-requests", "8", "--vocab-size", "2000", "--json", str(tmp_path / "arrival.json"),
        # Long enough that a request arrives while all run, also where other tests' work takes most of the CPUs.
        "--stream-output-len", "1500",
    ]  # fmt: skip
    client = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert client.returncode == 0, client.stderr
    run = json.loads((tmp_path / "arrival.json").read_text())["runs"][0]
    waited = sorted(request["token_times"][0] - request["sent"] for request in run["requests"])
    # Some 10 ms on two CPUs; several hundred where the frontend takes up everything that has come before it reads.
    assert waited[len(waited) // 2] < 0.1
    assert engine.stop() == 0


async def stream(http: httpx.AsyncClient, begun: asyncio.Semaphore) -> str | None:
    """How a stream ended."""
    reason = None
    async with http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as response:
        begun.release()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                reason = json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"]
    return reason


async def drain(engine: RunningEngine) -> tuple[list[str | None], list[str | None], list[int]]:
    """How HTTP streams and the answers to a Python client ended when the engine was stopped, and the status that
    requests got which came after that."""
    begun = asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=STREAMS + 1)
    async with (
        httpx.AsyncClient(base_url=engine.url, timeout=30, limits=limits, trust_env=False) as http,
        AsyncClient(engine.address) as client,
    ):
        params = SamplingParams(max_tokens=1900, ignore_eos=True)
        call = asyncio.ensure_future(client.generate(["Once upon a time"] * CALLS, params, use_tqdm=False))
        streams = [asyncio.ensure_future(stream(http, begun)) for _ in range(STREAMS)]
        # Most wait for a slot: their responses have not begun.
        while (stats := await client.stats()).num_running + stats.num_waiting < STREAMS + CALLS:
            await asyncio.sleep(0.05)
        engine.process.send_signal(signal.SIGTERM)
        statuses: list[int] = []
        while (await http.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        for _ in range(3):
            started = time.monotonic()
            statuses.append((await http.post("/v1/completions", json={"prompt": "too late"})).status_code)
            assert time.monotonic() - started < 1
        answers = await call
        return await asyncio.gather(*streams), [answer.outputs[0].finish_reason for answer in answers], statuses


def test_an_engine_under_load_frees_what_is_given_up_and_stops_in_time(
    start_engine: Callable[..., RunningEngine],
) -> None:
    flags = ("--max-stream-buffer", "64KiB", "--max-num-seqs", "16", "--shutdown-timeout", str(SHUTDOWN_SECONDS))
    engine = start_engine("--port", "0", *flags).wait_until_ready()
    with Client(engine.address) as client:
        check_time_that_is_over(engine, client)
        check_stream_that_nobody_reads(engine, client)
    processes = engine.children()
    started = time.monotonic()
    streams, calls, statuses = asyncio.run(drain(engine))
    assert engine.wait(30) == 0
    assert time.monotonic() - started < SHUTDOWN_SECONDS + 15
    assert statuses == [503] * 3
    assert len(streams) == STREAMS
    assert set(streams + calls) <= {"abort", "length"}
    assert streams.count("abort") > STREAMS / 2
    assert not any(process.is_running() for process in processes)
    assert not [path for path in engine.directory.iterdir() if path.is_socket() or path.is_dir()]
