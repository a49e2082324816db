"""Too much at once: what may wait, how long, and what becomes of clients that do not read what they asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from frontend import AsyncClient, EngineOverloadedError, InvalidRequestError, RequestTimeoutError, SamplingParams
from frontend import Client as PythonClient
from frontend.admission import Admission, AdmissionLimits
from protocol.address import AddressLock
from protocol.messages import Failed, GetStats, Refused, Stats
from tests.frontend.conftest import Frontend, error_of, wait_until
from tests.frontend.ipc_client import Client
from tests.support.metrics import growth, read_metrics

ENDLESS = {"max_tokens": 400, "ignore_eos": True}
BUFFER = 64 * 1024


@pytest.fixture(scope="module")
def loaded(model_directory: Any) -> Iterator[Frontend]:
    """A frontend that lets little wait."""
    frontend = Frontend(
        model_directory,
        max_waiting=4,
        max_waiting_tokens=40,
        max_waiting_bytes="1MiB",
        max_stream_buffer=str(BUFFER),
        request_timeout=30,
        api_key=["key"],
    ).start()
    lock = AddressLock(frontend.config.address)  # the launcher's, by which clients see that an engine is there
    yield frontend
    lock.release()
    frontend.close()


@pytest.fixture
def frontend(loaded: Frontend) -> Iterator[Frontend]:
    core = loaded.core
    core.added.clear()
    core.aborted.clear()
    yield loaded
    core.step_seconds = 0.0
    core.may_step.set()
    wait_until(lambda: core.num_running == 0)


@pytest.fixture
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer key"}
    with httpx.Client(base_url=frontend.url, timeout=10, headers=headers, trust_env=False) as client:
        yield client


@pytest.fixture
def fill(frontend: Frontend, connect: Callable[..., Client]) -> Callable[..., Client]:
    """Makes so many requests wait, each with a prompt of some tokens, and returns their client."""

    def fill(count: int, prompt: str = "fox") -> Client:
        frontend.core.may_step.clear()
        client = connect(frontend)
        for request_id in range(count):
            client.generate(request_id, prompt)
        wait_until(lambda: frontend.core.num_running == count)
        return client

    return fill


# --- admission ------------------------------------------------------------------------------------------------------


def test_more_than_may_wait_are_refused_before_the_core_sees_them(
    frontend: Frontend, http: httpx.Client, fill: Callable[..., Client]
) -> None:
    client = fill(4)
    before = read_metrics(http)
    response = http.post("/v1/completions", json={"prompt": "one more"})
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "5 requests would wait, of which --max-waiting allows 4" in error["message"]
    assert int(response.headers["retry-after"]) >= 1
    client.generate(9, "one more")
    while not any(isinstance(message, Failed) for message in client.others):
        client.gather_one()
    failed = next(message for message in client.others if isinstance(message, Failed))
    assert (failed.request_id, failed.kind) == (9, "overloaded")
    assert failed.retry_after is not None
    assert len(frontend.core.added) == 4
    assert growth(before, read_metrics(http))["mini_vllm:requests_refused_total"] == 2
    error_of(http.post("/tokenize", json={"prompt": "one more"}), 429)
    # Once they have their first tokens they run, and others may wait.
    frontend.core.step_seconds = 0.005
    frontend.core.may_step.set()
    client.gather_one()
    assert http.post("/v1/completions", json={"prompt": "one more", "max_tokens": 2}).status_code == 200


def test_choices_are_taken_all_or_none(frontend: Frontend, http: httpx.Client, fill: Callable[..., Client]) -> None:
    fill(2)
    before = read_metrics(http)
    error_of(http.post("/v1/completions", json={"prompt": "x", "n": 3, **ENDLESS}), 429)
    assert len(frontend.core.added) == 2
    assert growth(before, read_metrics(http))["mini_vllm:requests_refused_total"] == 3


def test_more_tokens_than_may_wait_are_refused(
    frontend: Frontend, http: httpx.Client, fill: Callable[..., Client]
) -> None:
    fill(1)
    before = read_metrics(http)
    error = error_of(http.post("/v1/completions", json={"prompt": [5] * 20, "n": 2}), 429)
    assert "--max-waiting-tokens allows 40" in error["message"]
    assert len(frontend.core.added) == 1
    assert growth(before, read_metrics(http))["mini_vllm:requests_refused_total"] == 2


def half_sent(frontend: Frontend, path: str, num_bytes: int) -> socket.socket:
    """A connection with all of a body of so many bytes but the last one."""
    host, port = frontend.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 10)
    headers = f"Host: x\r\nAuthorization: Bearer key\r\nContent-Length: {num_bytes}"
    connection.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + b" " * (num_bytes - 1))
    return connection


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_bodies_count_from_the_moment_that_they_are_read(frontend: Frontend, http: httpx.Client, path: str) -> None:
    before = read_metrics(http)
    process = psutil.Process(frontend.process.pid)  # type: ignore[union-attr]
    memory = process.memory_info().rss
    # The first finds nothing waiting, and is read whatever its size.
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(half_sent(frontend, path, 8 << 20)) for _ in range(8)]
        for connection in connections[1:]:
            answer = connection.recv(1 << 16).decode()
            assert answer.startswith("HTTP/1.1 429 ")
            assert "bytes would wait, of which --max-waiting-bytes allows 1048576" in answer
        assert process.memory_info().rss - memory < 32 << 20
        assert growth(before, read_metrics(http))["mini_vllm:requests_refused_total"] == 7
        for other in ("/v1/completions", "/tokenize", "/detokenize"):
            error_of(http.post(other, json={"prompt": "x"}), 429)
        connections[0].sendall(b" ")
        assert connections[0].recv(1 << 16).startswith(b"HTTP/1.1 400 "), "blanks are no JSON"
    # And those that are over count no more.
    with half_sent(frontend, path, 512 << 10), half_sent(frontend, path, 256 << 10):
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    wait_until(lambda: http.post("/tokenize", json={"prompt": "x" * 1_000_000}).status_code == 200)


def test_a_body_whose_client_leaves_counts_no_more(frontend: Frontend, http: httpx.Client) -> None:
    with half_sent(frontend, "/v1/completions", 2 << 20):
        wait_until(lambda: http.post("/tokenize", json={"prompt": "x"}).status_code == 429)
    wait_until(lambda: http.post("/tokenize", json={"prompt": "x"}).status_code == 200)


def test_what_finds_nothing_waiting_is_taken_whatever_its_size(frontend: Frontend, http: httpx.Client) -> None:
    body = {"prompt": [5] * 100, "n": 8, "max_tokens": 2, "ignore_eos": True}
    response = http.post("/v1/completions", json=body)
    assert len(response.json()["choices"]) == 8


def test_the_openai_client_sees_a_rate_limit_and_comes_again_when_told(
    frontend: Frontend, fill: Callable[..., Client]
) -> None:
    client = fill(4)
    options = {"base_url": f"{frontend.url}/v1", "api_key": "key"}
    with pytest.raises(openai.RateLimitError) as caught:
        openai.OpenAI(**options, max_retries=0).completions.create(model="tiny", prompt="x")
    assert caught.value.code == "rate_limit_exceeded"
    asyncio.run(_release_soon(frontend, openai.AsyncOpenAI(**options, max_retries=2)))
    client.gather(0, 1, 2, 3)


async def _release_soon(frontend: Frontend, client: openai.AsyncOpenAI) -> None:
    asyncio.get_running_loop().call_later(0.3, frontend.core.may_step.set)
    started = time.monotonic()
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=2)
    assert answer.choices[0].finish_reason
    assert 0.9 < time.monotonic() - started < 5, "Retry-After says 1 s at least, and up to half a second of jitter"


def test_python_clients_raise_what_others_have_filled_and_send_their_own_later(
    frontend: Frontend, fill: Callable[..., Client]
) -> None:
    other = fill(4)
    with PythonClient(frontend.config.address) as client:
        assert client.engine.max_waiting == 4
        for call in (lambda: client.generate("x", use_tqdm=False), lambda: list(client.stream("x"))):
            with pytest.raises(EngineOverloadedError, match="--max-waiting allows 4") as caught:
                call()
            assert caught.value.retry_after >= 1
        frontend.core.may_step.set()
        other.gather(0, 1, 2, 3)
        prompts = [[5 + i] for i in range(50)]
        results = client.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True, n=2), use_tqdm=False)
        assert [result.outputs[1].token_ids for result in results] == [[5 + i] * 3 for i in range(50)]


def test_a_call_whose_requests_are_refused_beside_others_sends_them_again(
    frontend: Frontend, fill: Callable[..., Client]
) -> None:
    fill(2)

    async def run() -> None:
        async with AsyncClient(frontend.config.address) as client:
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            call = asyncio.ensure_future(client.generate([[5 + i] for i in range(12)], params, use_tqdm=False))
            # Two of its four find room, and the others are refused.
            await asyncio.sleep(0.2)
            assert len(frontend.core.added) == 4
            frontend.core.may_step.set()
            results = await call
            assert [result.outputs[0].token_ids for result in results] == [[5 + i] * 3 for i in range(12)]

    asyncio.run(run())


def test_retry_after_follows_the_rate_at_which_requests_stop_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    admission = Admission(AdmissionLimits(requests=10, tokens=0, num_bytes=1000))
    for _ in range(10):
        admission.begin(5)

    def retry_after(count: int) -> float:
        with pytest.raises(EngineOverloadedError) as caught:
            admission.reserve(count)
        return caught.value.retry_after

    assert retry_after(8) == 1, "nothing is known yet"
    for _ in range(20):  # one each two seconds
        now[0] += 2
        admission.end(5, is_answered=True)
        admission.begin(5)
    assert retry_after(8) in (15, 16, 17, 18)
    with admission.reserve(0, 900), pytest.raises(EngineOverloadedError, match="1001 bytes would wait"):
        admission.reserve(0, 101)
    assert admission.reserve(0, 900)


# --- deadlines ------------------------------------------------------------------------------------------------------


def test_a_request_whose_time_is_over_while_it_waits_is_answered_and_aborted(
    frontend: Frontend, http: httpx.Client
) -> None:
    frontend.core.may_step.clear()
    started = time.monotonic()
    for stream in (False, True):
        response = http.post("/v1/completions", json={"prompt": "x", "timeout": 0.2, "stream": stream, "n": 2})
        error = error_of(response, 504)
        assert (error["code"], error["param"]) == ("timeout", "timeout")
        assert "timeout of 0.2 s" in error["message"]
        assert response.headers["x-should-retry"] == "false"
    assert time.monotonic() - started < 2
    wait_until(lambda: len(frontend.core.aborted) == 4 and frontend.core.num_running == 0)


def test_a_stream_whose_time_is_over_ends_with_an_error(frontend: Frontend, http: httpx.Client) -> None:
    frontend.core.step_seconds = 0.01
    body = {"prompt": "x", "timeout": 0.3, "stream": True, **ENDLESS}
    events = [line for line in http.post("/v1/completions", json=body).text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(events) > 5
    wait_until(lambda: len(frontend.core.aborted) == 1)


def test_python_clients_raise_when_the_time_is_over(frontend: Frontend) -> None:
    frontend.core.may_step.clear()
    with PythonClient(frontend.config.address) as client:
        for call in (
            lambda: client.generate(["x", "y"], use_tqdm=False, timeout=0.2),
            lambda: list(client.stream("x", timeout=0.2)),
        ):
            with pytest.raises(RequestTimeoutError, match=r"timeout of 0.2 s"):
                call()
        for timeout in (0, -1, float("nan"), "soon", True):
            with pytest.raises(InvalidRequestError, match="timeout must be a positive number"):
                client.generate("x", timeout=timeout)  # type: ignore[arg-type]
    wait_until(lambda: frontend.core.num_running == 0)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_that_is_no_time_is_refused(timeout: float, http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", json={"prompt": "x", "timeout": timeout}), 400)
    assert error["message"] == f"timeout must be a positive number of seconds, got {float(timeout)}"
    assert error["param"] == "timeout"


def test_the_server_has_a_timeout_for_requests_without_one(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend(request_timeout=0.2).start()
    frontend.core.may_step.clear()
    url = f"{frontend.url}/v1/completions"
    assert httpx.post(url, json={"prompt": "x"}).status_code == 504
    started = time.monotonic()
    assert httpx.post(url, json={"prompt": "x", "timeout": 0.6}).status_code == 504
    assert time.monotonic() - started > 0.5


# --- slow readers ---------------------------------------------------------------------------------------------------


def read_all(reader: socket.socket) -> bytes:
    """What is there until the other end has closed the connection."""
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while part := reader.recv(1 << 16):
            read += part
    return read


def test_a_stream_that_nobody_reads_is_aborted_and_stalls_nobody(
    capfd: pytest.CaptureFixture[str], make_frontend: Callable[..., Frontend]
) -> None:
    frontend = make_frontend(max_stream_buffer=str(BUFFER)).start()
    http = httpx.Client(base_url=frontend.url, timeout=10, trust_env=False)
    # So slowly that the frontend keeps up on a busy machine too: requests that end first cannot be aborted.
    frontend.core.step_seconds = 0.01
    before = read_metrics(http)
    host, port = frontend.url.removeprefix("http://").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((host, int(port)))
    # 40 choices of 400 tokens with 20 log-probabilities each are 32 MB of events, of which sockets hold some 4.
    body = json.dumps({"prompt": "x", "stream": True, "n": 40, "logprobs": 20, **ENDLESS}).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    reader.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
    wait_until(lambda: frontend.core.num_running == 40)
    longest, last = 0.0, time.monotonic()
    wanted = {"prompt": "x", "stream": True, "return_token_ids": True, "max_tokens": 200, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=wanted) as response:
        num_tokens = 0
        for line in response.iter_lines():
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            if line.startswith("data: {"):
                # Several tokens may come in one event.
                num_tokens += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
    assert num_tokens == 200
    assert longest < 2
    wait_until(lambda: len(frontend.core.aborted) == 40)
    assert growth(before, read_metrics(http))["vllm:request_success_total{abort}"] == 40
    # The connection is over, not only the answer.
    reader.settimeout(5)
    assert not read_all(reader).endswith(b"0\r\n\r\n")
    reader.close()
    assert capfd.readouterr().err.count("does not read its stream") == 1


def test_a_stream_that_is_read_slowly_but_read_is_whole(frontend: Frontend, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True, **ENDLESS}) as response:
        time.sleep(0.5)
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert json.loads(lines[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_python_client_that_stops_receiving_is_dropped_and_stalls_nobody(
    capfd: pytest.CaptureFixture[str], make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend(max_stream_buffer=str(BUFFER)).start()
    frontend.core.step_seconds = 0.002
    silent = connect(frontend)
    params = SamplingParams(max_tokens=400, ignore_eos=True, logprobs=20)
    for request_id in range(3):
        silent.generate(request_id, "x", params)
    wait_until(lambda: frontend.core.num_running == 3)
    body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{frontend.url}/v1/completions", json=body, trust_env=False)
    assert answer.status_code == 200
    wait_until(lambda: len(frontend.core.aborted) == 3)
    assert capfd.readouterr().err.count("does not read its answers") == 1
    # When it looks again, it finds what was sent before, and why there is no more.
    while not any(isinstance(message, Refused) for message in silent.others):
        silent.gather_one()
    assert "--max-stream-buffer" in next(m.reason for m in silent.others if isinstance(m, Refused))
    assert silent.num_outputs < 400


def test_a_python_client_that_never_says_what_it_took_gains_nothing_by_requests_that_end(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend(max_stream_buffer=str(BUFFER)).start()
    silent = connect(frontend)
    # Each leaves some 20 kB, less than its share of the buffer: 16 of these do not fill 16 shares, but 100 do.
    params = SamplingParams(max_tokens=100, ignore_eos=True, logprobs=20)
    for request_id in range(200):
        silent.generate(request_id, "x", params, stream=False)
        while request_id not in silent.finished and not any(isinstance(m, Refused) for m in silent.others):
            silent.gather_one()
        if request_id not in silent.finished:
            break
    assert 16 < request_id < 199
    assert "--max-stream-buffer" in silent.others[-1].reason


def test_refusals_that_nobody_takes_count_too(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend(max_stream_buffer=str(BUFFER)).start()
    silent = connect(frontend)
    for _ in range(3000):
        silent.channel.socket.send(b"\xc1")
    reasons = [silent.receive(Refused).reason for _ in range(3000)]
    num_counted = next(i for i, reason in enumerate(reasons) if "--max-stream-buffer" in reason)
    # Those after it have gone to a client that is not known any more.
    assert 300 < num_counted < 2000


def test_a_python_client_that_receives_gets_more_than_the_buffer_holds(frontend: Frontend) -> None:
    with PythonClient(frontend.config.address) as client:
        params = SamplingParams(max_tokens=400, ignore_eos=True, logprobs=20)
        for _ in range(3):
            chunks = list(client.stream([5], params))
            # 20 times 8 bytes a token and more.
            assert sum(len(chunk.token_ids) for chunk in chunks) == 400


def test_nothing_is_left_waiting(frontend: Frontend, connect: Callable[..., Client], http: httpx.Client) -> None:
    """After all that, exactly as much may wait as at first."""
    frontend.core.may_step.clear()
    client = connect(frontend)
    for request_id in range(5):
        client.generate(request_id, "x")
    client.send(GetStats(7))
    while not any(isinstance(message, Stats) for message in client.others):
        client.gather_one()
    assert [m.request_id for m in client.others if isinstance(m, Failed)] == [4]
    frontend.core.may_step.set()
    client.gather(0, 1, 2, 3)
