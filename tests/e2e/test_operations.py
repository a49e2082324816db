"""The engine as those who run it see it: its metrics under load, its log, and what never gets into the log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from frontend import LLM, Client, SamplingParams
from protocol.errors import ConfigError
from tests.e2e.conftest import RunningEngine
from tests.support.metrics import growth, read_metrics
from tests.support.requests import is_idle, wait_until

Start = Callable[..., RunningEngine]
STORY = "Once upon a time"
ENDLESS = {"max_tokens": 2000, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def idle(engine: RunningEngine, client: Client) -> Iterator[None]:
    wait_until(lambda: is_idle(client.stats()), "the engine is idle")
    yield
    wait_until(lambda: is_idle(client.stats()), "the engine is idle again")


def records(engine: RunningEngine) -> list[dict[str, Any]]:
    return [json.loads(line) for line in engine.output.splitlines()]


@pytest.mark.usefixtures("idle")
def test_counters_of_core_and_frontend_agree_with_what_was_asked(engine: RunningEngine, client: Client) -> None:
    prompt = list(range(100, 165))
    before = read_metrics(engine.http)
    for _ in range(2):
        body = {"prompt": prompt, "max_tokens": 20, "ignore_eos": True, "cache_salt": "counted"}
        assert engine.http.post("/v1/completions", json=body).status_code == 200
    client.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False, cache_salt="counted")
    grown = growth(before, read_metrics(engine.http))
    assert grown["vllm:prompt_tokens_total"] == grown["vllm:request_prompt_tokens_sum"] == 3 * 65
    assert grown["vllm:generation_tokens_total"] == grown["vllm:request_generation_tokens_sum"] == 52
    assert grown["vllm:prefix_cache_queries_total"] == 3 * 65
    # Four blocks of 16 tokens, found by the second and the third.
    assert grown["vllm:prefix_cache_hits_total"] == 2 * 64
    for name in ("request_queue_time_seconds", "time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert grown[f"vllm:{name}_count"] == 3
    assert grown["vllm:inter_token_latency_seconds_count"] == 52 - 3
    assert grown["vllm:request_queue_time_seconds_sum"] < grown["vllm:time_to_first_token_seconds_sum"]


@pytest.mark.usefixtures("idle")
def test_gauges_show_what_runs_now(engine: RunningEngine) -> None:
    def gauges() -> tuple[float, float, float]:
        now = read_metrics(engine.http)
        return tuple(
            now[f"vllm:{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    assert gauges() == (0, 0, 0)
    with engine.http.stream(
        "POST", "/v1/completions", json={"prompt": [STORY] * 3, "stream": True, **ENDLESS}
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        with httpx.Client(base_url=engine.url) as other:
            now = read_metrics(other)
        assert now["vllm:num_requests_running"] == 3
        assert 0 < now["vllm:kv_cache_usage_perc"] < 1


def test_requests_beyond_the_slots_wait_and_their_queue_time_shows(start_engine: Start) -> None:
    engine = start_engine("--port", "0", "--max-num-seqs", "1").wait_until_ready()
    body = {"prompt": STORY, "stream": True, **ENDLESS}
    with (
        Client(engine.address) as client,
        ThreadPoolExecutor(1) as thread,
        httpx.Client(base_url=engine.url) as http,
        engine.http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        second = thread.submit(client.generate, [STORY], SamplingParams(max_tokens=2), use_tqdm=False)
        wait_until(lambda: read_metrics(http)["vllm:num_requests_waiting"] == 1, "a request waits")
        seen_waiting = time.monotonic()
        time.sleep(0.3)
        waited = time.monotonic() - seen_waiting
        stream.close()
        second.result(30)
        metrics = read_metrics(http)
    assert metrics["vllm:request_queue_time_seconds_count"] == 2
    assert metrics["vllm:request_queue_time_seconds_sum"] > waited
    assert metrics["vllm:num_requests_waiting"] == 0


def test_a_json_log_is_json_throughout_and_tells_each_request(
    start_engine: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_VLLM_API_KEY", "sk-hush")
    engine = start_engine("--port", "0", "--log-format", "json", "--log-level", "debug", "--access-log")
    url = engine.wait_for(r'"http": "(http://[^"]+)"')
    headers = {"Authorization": "Bearer sk-hush", "X-Request-Id": "trace-7"}
    with httpx.Client(base_url=url, timeout=60) as http:
        body = {"prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True}
        assert http.post("/v1/completions", json=body | {"n": 3}, headers=headers).status_code == 200
        body["prompt"] = "unmentionable words"
        assert http.post("/v1/completions?key=unmentionable", json=body, headers=headers).status_code == 200
        assert http.post("/v1/completions", json=body, headers={"Authorization": "Bearer sk-tried"}).status_code == 401
        bad = {"prompt": "unmentionable words", "temperature": "unmentionable"}
        assert http.post("/v1/completions", json=bad, headers=headers).status_code == 400
        http.get("/no%0Aplace")
        with http.stream(
            "POST", "/v1/completions", json={**body, "stream": True, **ENDLESS}, headers=headers
        ) as stream:
            next(stream.iter_lines())
    # Bytes that are no message, to the frontend and to the core, which both say so in their logs.
    (core_socket,) = engine.directory.glob("run-*/core-0")
    with zmq.Context() as context:
        for address in (engine.address, f"ipc://{core_socket}"):
            with context.socket(zmq.DEALER) as peer:
                peer.connect(address)
                peer.send(b"unmentionable")
                assert peer.poll(5000)
    engine.wait_for('"process": "core"')
    assert engine.stop() == 0

    log = records(engine)
    assert all({"time", "level", "process", "logger", "message"} <= record.keys() for record in log)
    assert {record["process"] for record in log} == {"launcher", "frontend", "core"}
    accesses = [record for record in log if record["message"] == "access"]
    told = [(record["method"], record["path"], record["status"]) for record in accesses]
    path = "/v1/completions"
    assert told == [
        ("POST", path, 200),
        ("POST", path, 200),
        ("POST", path, 401),
        ("POST", path, 400),
        ("GET", "/no%0Aplace", 404),
        ("POST", path, 200),
    ]
    several = accesses.pop(0)
    assert (several["prompt_tokens"], several["completion_tokens"]) == (3, 15)
    assert accesses[0]["request_id"] == "trace-7"
    assert accesses[0]["completion_tokens"] == 5
    assert accesses[0]["prompt_tokens"] > 1
    assert 0 < accesses[0]["duration_ms"] < 60_000
    assert "completion_tokens" not in accesses[1]
    assert 0 < accesses[-1]["completion_tokens"] < 2000
    assert "unmentionable" not in engine.output
    assert "sk-" not in engine.output


def test_a_text_log_tells_each_request_whatever_the_level(start_engine: Start) -> None:
    engine = start_engine("--port", "0", "--log-level", "error", "--access-log").wait_until_ready()
    engine.http.get("/ping", headers={"X-Request-Id": "trace-8"})
    line = engine.wait_for(".* access .*")
    assert re.search(
        r"frontend INFO access method=GET path=/ping status=200 duration_ms=[\d.]+ request_id=trace-8$", line
    )


def test_without_the_flag_requests_are_not_logged(engine: RunningEngine) -> None:
    engine.http.get("/ping", headers={"X-Request-Id": "trace-9"})
    assert "trace-9" not in engine.output
    assert " access " not in engine.output


def test_what_cannot_start_says_so_in_json(start_engine: Start) -> None:
    for flags, code in ((["--model", "/no/such/model"], 2), (["--kv-cache-memory", "1KiB"], 1)):
        engine = start_engine("--port", "0", "--log-format", "json", *flags)
        assert engine.wait() == code
        (error,) = [record for record in records(engine) if record["level"] == "error"]
        assert error["process"] == "launcher"
        assert flags[1].removesuffix("KiB") in error["message"] or "does not hold one block" in error["message"]


def test_an_llm_says_why_it_cannot_start_with_a_json_log_too() -> None:
    with pytest.raises(ConfigError, match="does not hold one block"):
        LLM(device="cpu", kv_cache_memory="1KiB", log_format="json")


def test_the_keys_of_an_llm_are_on_no_command_line(tmp_path: Path) -> None:
    with LLM(device="cpu", http=True, port=0, api_key=["sk-hush", "sk-other"]) as llm:
        launcher = psutil.Process(llm._process.pid)
        processes = [launcher, *launcher.children(recursive=True)]
        assert len(processes) == 4
        assert not any("sk-" in " ".join(process.cmdline()) for process in processes)
        connection = next(c for process in processes for c in process.net_connections("tcp") if c.status == "LISTEN")
        url = f"http://127.0.0.1:{connection.laddr.port}/v1/models"
        statuses = [httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code for key in ("sk-other", "x")]
        assert statuses == [200, 401]
