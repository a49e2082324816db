"""How the frontend process starts and ends: whoever waits gets an answer, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from protocol.address import socket_path
from protocol.launcher_messages import EngineFailed, ProcessFailed, ProcessReady
from protocol.messages import (
    PROTOCOL_VERSION,
    Failed,
    Generate,
    GetStats,
    Hello,
    Refused,
    Started,
    TokenPrompt,
    Welcome,
    pack_ints,
)
from protocol.sampling import SamplingParams
from tests.frontend.conftest import Frontend, error_of, wait_until
from tests.frontend.ipc_client import Client


def test_clients_that_come_early_wait_for_the_engine(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend()
    frontend.core.may_be_ready.clear()
    frontend.start(wait=False)
    client = connect(frontend, hello=False)
    client.send(Hello(PROTOCOL_VERSION))
    assert client.channel.receive(700) is None
    client.generate(1, "too early")
    assert client.receive(Failed).message == "the engine is starting"
    frontend.core.may_be_ready.set()
    client.receive(Welcome)
    assert isinstance(frontend.report(), ProcessReady)


def test_sigterm_lets_requests_finish_and_refuses_new_ones(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend(shutdown_timeout=10).start()
    frontend.core.step_seconds = 0.01
    client, late = connect(frontend), connect(frontend, hello=False)
    client.generate(1, "the fox", SamplingParams(max_tokens=60, ignore_eos=True))
    client.receive(Started)
    assert frontend.process is not None
    frontend.process.terminate()
    wait_until(lambda: httpx.get(f"{frontend.url}/health").json()["status"] == "stopping", 5)
    client.generate(2, "too late")
    late.send(Hello(PROTOCOL_VERSION))
    assert "stopping" in late.receive(Refused).reason
    client.gather(1)
    assert client.finished[1].reason == "length"
    assert len(client.tokens[1]) == 60
    assert [(m.request_id, m.kind) for m in client.others] == [(2, "unavailable")]
    assert frontend.process.wait(10) == 0


def test_sigterm_ends_what_takes_too_long(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend(shutdown_timeout=0.2).start()
    frontend.core.step_seconds = 0.01
    client = connect(frontend)
    client.generate(1, "the fox")
    client.generate(2, "the dog", stream=False)
    assert client.receive(Started)
    assert frontend.terminate() == 0
    client.gather(1, 2)
    assert {finished.reason for finished in client.finished.values()} == {"abort"}
    assert client.tokens[2]


def test_sigterm_during_the_start_ends_at_once(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend()
    frontend.core.may_be_ready.clear()
    frontend.start(wait=False)
    wait_until(lambda: socket_path(frontend.config.address).exists(), 10)
    time.sleep(0.2)
    assert frontend.terminate() == 0


def test_an_engine_that_gives_up_tells_its_clients_why(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client]
) -> None:
    frontend = make_frontend().start()
    frontend.core.step_seconds = 0.01
    client = connect(frontend)
    client.generate(1, "the fox")
    client.receive(Started)
    frontend.core.stop()
    frontend.tell(EngineFailed("the core is gone for good"))
    while not client.others:
        client.gather_one()
    assert client.others == [Failed(1, "unavailable", "the core is gone for good", None)]
    client.send(GetStats(1))
    assert "does not answer" in client.receive(Failed).message
    assert httpx.get(f"{frontend.url}/health").json() == {"status": "failed", "reason": "the core is gone for good"}
    assert frontend.terminate() == 0


def test_a_launcher_that_goes_away_takes_the_frontend_with_it(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend().start()
    assert frontend.process is not None
    assert frontend.process.stdin is not None
    frontend.process.stdin.close()
    assert frontend.process.wait(10) is not None


def test_a_core_of_another_version_is_an_error_of_the_start(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend()
    frontend.core.protocol_version = PROTOCOL_VERSION + 1
    report = frontend.start(wait=False).report()
    assert isinstance(report, ProcessFailed)
    assert f"protocol {PROTOCOL_VERSION + 1}" in report.message
    assert frontend.process is not None
    assert frontend.process.wait(10) == 1


def test_a_port_in_use_is_an_error_that_names_the_flag(make_frontend: Callable[..., Frontend]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = make_frontend(port=port).start(wait=False).report()
    assert isinstance(report, ProcessFailed)
    assert report.message == f"port {port} of 127.0.0.1 is in use; choose another with --port"


def test_a_model_without_a_tokenizer_is_an_error_that_names_the_flag(
    make_frontend: Callable[..., Frontend], tmp_path: Path
) -> None:
    report = make_frontend(tmp_path).start(wait=False).report()
    assert isinstance(report, ProcessFailed)
    assert "--skip-tokenizer-init" in report.message


def test_without_http_only_ipc_is_served(
    make_frontend: Callable[..., Frontend], connect: Callable[..., Client], tmp_path: Path
) -> None:
    frontend = make_frontend(tmp_path, http=False, skip_tokenizer_init=True).start()
    assert frontend.ready is not None
    assert frontend.ready.details == {"ipc": frontend.config.address}
    client = connect(frontend)
    assert not client.welcome.engine.has_tokenizer
    client.send(Generate(1, TokenPrompt(pack_ints([4, 5])), SamplingParams(max_tokens=3, ignore_eos=True)))
    client.gather(1)
    assert client.tokens[1] == [4, 5, 4]
    client.generate(2, "text")
    assert "--skip-tokenizer-init" in client.receive(Failed).message
    client.send(Generate(3, TokenPrompt(pack_ints([4])), SamplingParams(stop=("x",))))
    assert client.receive(Failed).param == "stop"
    assert frontend.terminate() == 0


def test_until_the_engine_is_ready_everything_is_unavailable(make_frontend: Callable[..., Frontend]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    frontend = make_frontend(port=port)
    frontend.core.may_be_ready.clear()
    frontend.start(wait=False)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=8)) as http:
        health = http.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "starting", "reason": "the engine is starting"}
        error = error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)
        assert (error["message"], error["code"]) == ("the engine is starting", "engine_unavailable")
        assert error_of(http.get("/v1/models"), 503)
        frontend.core.may_be_ready.set()
        report = frontend.report()
        assert isinstance(report, ProcessReady)
        assert report.details["http"] == url
        assert http.get("/health").status_code == 200


def test_sigterm_answers_every_request(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend(shutdown_timeout=0.3).start()
    frontend.core.step_seconds = 0.01
    assert frontend.process is not None
    body = {"prompt": [1, 2], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=frontend.url) as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        frontend.process.terminate()
        wait_until(lambda: http.get("/health").json()["status"] == "stopping")
        assert error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)["message"] == "the engine is stopping"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert frontend.process.wait(10) == 0


def test_an_engine_that_gives_up_ends_streams_with_an_error(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend().start()
    frontend.core.step_seconds = 0.01
    body = {"prompt": [1, 2], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=frontend.url) as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        frontend.core.stop()
        frontend.tell(EngineFailed("the core is gone for good"))
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["message"] == "the core is gone for good"
        refused = error_of(http.post("/v1/completions", json={"prompt": "a"}), 503)
        assert refused["message"] == "the core is gone for good"


def test_streams_go_on_with_another_core(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend().start()
    frontend.core.step_seconds = 0.01
    prompt = [1, 2, 3, 4, 5]
    body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True, "stream": True, "return_token_ids": True}
    with httpx.Client(base_url=frontend.url) as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        events = [next(line for line in lines if line)]
        frontend.core.stop()
        wait_until(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json()["status"] == "recovering"
        frontend.replace_core()
        events += [line for line in lines if line]
        assert http.get("/health").status_code == 200
    assert events.pop() == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [token for choice in choices for token in choice["token_ids"]] == [prompt[i % 5] for i in range(60)]


def test_a_generation_config_that_is_wrong_is_an_error_of_the_start(
    make_frontend: Callable[..., Frontend], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    report = make_frontend(tmp_path, skip_tokenizer_init=True).start(wait=False).report()
    assert "generation_config.json cannot be used: temperature" in report.message
