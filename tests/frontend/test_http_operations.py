"""What operators and tools use besides completions: metrics, tokenization, versions, keys, origins, request ids."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from frontend.metrics import RequestMetrics
from protocol import __version__
from protocol.messages import Failed
from protocol.sampling import SamplingParams
from tests.frontend.conftest import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    VOCAB_SIZE,
    Frontend,
    error_of,
    make_tokenizer,
    wait_until,
)
from tests.frontend.ipc_client import Client
from tests.support.metrics import growth, read_metrics

TOKENIZER = make_tokenizer()
HELLO = [{"role": "user", "content": "Größe 🙂"}]
RENDERED = "<|im_start|>user\nGröße 🙂<|im_end|>\n"
KEYS = ["sk-first", "sk-second"]


@pytest.fixture
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=frontend.url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def closed(model_directory: Any) -> Iterator[Frontend]:
    """A frontend that asks for a key and answers the pages of one origin."""
    frontend = Frontend(model_directory, api_key=KEYS, allowed_origins=["https://chat.example"]).start()
    yield frontend
    frontend.close()


# --- metrics --------------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_how_they_end_and_timed_by_token(http: httpx.Client, frontend: Frontend) -> None:
    before = read_metrics(http)
    http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True})
    http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True, "stream": True})
    http.post("/v1/completions", json={"prompt": "quick brown fox", "stop": ["own"]})
    frontend.core.failure = Failed(0, "failed", "this is why", None)
    http.post("/v1/completions", json={"prompt": [1]})
    after = read_metrics(http)
    grown = growth(before, after)
    ended = {name: count for name, count in grown.items() if name.startswith("vllm:request_success_total")}
    assert ended == {
        "vllm:request_success_total{length}": 2,
        "vllm:request_success_total{stop}": 1,
        "vllm:request_success_total{error}": 1,
    }
    num_tokens = grown["vllm:request_generation_tokens_sum"]
    assert grown["vllm:request_generation_tokens_count"] == 3
    assert grown["vllm:request_prompt_tokens_sum"] == 5 + len(TOKENIZER.encode("quick brown fox").ids)
    assert grown["vllm:time_to_first_token_seconds_count"] == grown["vllm:e2e_request_latency_seconds_count"] == 3
    # Between n tokens are n - 1 times.
    assert grown["vllm:inter_token_latency_seconds_count"] == num_tokens - 3
    assert grown["vllm:time_per_output_token_seconds_count"] == num_tokens - 3
    # First token and the times between tokens make up the time of the whole, but for how it is ended.
    parts = grown["vllm:time_to_first_token_seconds_sum"] + grown["vllm:inter_token_latency_seconds_sum"]
    assert parts <= grown["vllm:e2e_request_latency_seconds_sum"] < parts + 0.1


def test_times_between_tokens_are_those_of_the_steps(http: httpx.Client, frontend: Frontend) -> None:
    frontend.core.step_seconds = 0.03
    before = read_metrics(http)
    body = {"prompt": [[1], [2]], "max_tokens": 6, "ignore_eos": True, "stream": True}
    http.post("/v1/completions", json=body)
    grown = growth(before, read_metrics(http))
    assert grown["vllm:inter_token_latency_seconds_count"] == 10
    assert grown["vllm:inter_token_latency_seconds_sum"] >= 10 * 0.03
    assert "vllm:inter_token_latency_seconds_bucket{0.025}" not in grown
    assert grown["vllm:inter_token_latency_seconds_bucket{+Inf}"] == 10


def test_python_clients_requests_count_too(
    http: httpx.Client, frontend: Frontend, connect: Callable[..., Client]
) -> None:
    before = read_metrics(http)
    client = connect()
    client.generate(1, "the fox", SamplingParams(max_tokens=3, ignore_eos=True))
    client.gather(1)
    grown = growth(before, read_metrics(http))
    assert grown["vllm:request_success_total{length}"] == 1
    assert grown["vllm:request_generation_tokens_sum"] == 3


def test_requests_that_are_left_count_as_aborted_and_not_as_answers(http: httpx.Client, frontend: Frontend) -> None:
    before = read_metrics(http)
    frontend.core.step_seconds = 0.01
    body = {"prompt": [1], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    wait_until(lambda: frontend.core.num_running == 0)
    grown = growth(before, read_metrics(http))
    assert grown["vllm:request_success_total{abort}"] == 1
    assert "vllm:e2e_request_latency_seconds_count" not in grown
    assert grown["vllm:time_to_first_token_seconds_count"] == 1


def test_metrics_come_in_the_format_that_is_asked_for(http: httpx.Client) -> None:
    plain = http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f'vllm:num_requests_running{{model_name="{MODEL_NAME}"}} 0.0' in plain.text
    assert re.search(r"^process_resident_memory_bytes \d", plain.text, re.MULTILINE)
    assert re.search(r"^process_open_fds \d", plain.text, re.MULTILINE)
    open_metrics = http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


def test_metrics_are_there_while_the_engine_starts_and_after_it_failed(make_frontend: Callable[..., Frontend]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    frontend = make_frontend(port=port)
    frontend.core.may_be_ready.clear()
    frontend.start(wait=False)
    transport = httpx.HTTPTransport(retries=8)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport) as http:

        def has_engine() -> bool:
            metrics = read_metrics(http)
            assert metrics["vllm:request_success_total{stop}"] == 0
            assert metrics["process_resident_memory_bytes"] > 1e6
            return "vllm:num_requests_running" in metrics

        assert not has_engine()
        frontend.core.may_be_ready.set()
        frontend.report()
        assert has_engine()
        frontend.core.stop()
        wait_until(lambda: http.get("/health").json()["status"] == "recovering")
        assert not has_engine()


@pytest.mark.parametrize(
    ("most", "bounds"), [(1, [1]), (7, [1, 2, 5]), (512, [1, 2, 5, 10, 20, 50, 100, 200, 500]), (10, [1, 2, 5, 10])]
)
def test_token_counts_are_told_apart_up_to_the_context(most: int, bounds: list[float]) -> None:
    assert RequestMetrics(most).prompt_tokens.counts().bounds == bounds


TOOL = {"type": "function", "function": {"name": "look"}}


# --- tokenization ---------------------------------------------------------------------------------------------------


def test_a_text_is_tokenized_and_back(http: httpx.Client) -> None:
    ids = TOKENIZER.encode("Größe 日本語 🙂").ids
    answer = http.post("/tokenize", json={"prompt": "Größe 日本語 🙂"}).json()
    assert answer == {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Größe 日本語 🙂"}
    answer = http.post("/tokenize", json={"prompt": "Größe", "return_token_strs": True, "model": MODEL_NAME}).json()
    assert answer["token_strs"] == TOKENIZER.encode("Größe").tokens


def test_special_tokens_are_tokenized_as_such_and_kept_on_the_way_back(http: httpx.Client) -> None:
    text = "<|im_start|>user<|im_end|>"
    ids = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids[0] == TOKENIZER.token_to_id("<|im_start|>")
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, RENDERED + "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, RENDERED),
        ({"chat_template_kwargs": {"thinking": False}}, RENDERED + "<|im_start|>assistant\n<think></think>"),
        ({"continue_final_message": True, "add_generation_prompt": False}, RENDERED.removesuffix("<|im_end|>\n")),
        ({"tools": [TOOL]}, f"<|im_start|>tools\n{json.dumps(TOOL)}\n<|im_end|>\n{RENDERED}<|im_start|>assistant\n"),
    ],
)
def test_a_chat_is_tokenized_as_it_would_be_answered(
    http: httpx.Client, frontend: Frontend, fields: dict[str, Any], rendered: str
) -> None:
    answer = http.post("/tokenize", json={"messages": HELLO} | fields).json()
    assert answer["tokens"] == TOKENIZER.encode(rendered).ids
    if "add_generation_prompt" not in fields:
        served = http.post("/v1/chat/completions", json={"messages": HELLO, "return_token_ids": True} | fields).json()
        assert served["prompt_token_ids"] == answer["tokens"]


def test_what_is_too_long_to_be_served_is_tokenized_all_the_same(http: httpx.Client) -> None:
    text = "the fox " * 20_000
    answer = http.post("/tokenize", json={"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"]) > 16 * MAX_MODEL_LEN
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == text
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/detokenize", json={"tokens": []}).json()["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "not both"),
        ("/tokenize", {"prompt": 5}, "prompt", "got `int`"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools", "goes with messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "goes with messages"),
        ("/tokenize", {"messages": []}, "messages", "at least one"),
        ("/tokenize", {"messages": [{"role": "forbidden"}]}, "messages", "no such role here"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message", "goes with"),
        ("/tokenize", {"prompt": "a", "max_tokens": 1}, "max_tokens", "not a field"),
        ("/detokenize", {}, "tokens", "tokens is missing"),
        ("/detokenize", {"tokens": "a"}, "tokens", "expected `array`"),
        ("/detokenize", {"tokens": [1, VOCAB_SIZE]}, "tokens", f"holds {VOCAB_SIZE} at position 1"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "holds -1 at position 0"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]", "expected `int`"),
    ],
)
def test_what_cannot_be_tokenized_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post(path, json=body), 400)
    assert error["param"] == param.split("[")[0]
    assert message in error["message"]


def test_tokenization_needs_the_model_and_a_tokenizer(
    http: httpx.Client, make_frontend: Callable[..., Frontend], tmp_path: Any
) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert error_of(http.post(path, json={"model": "gpt-5"} | body), 404)["code"] == "model_not_found"
    without = make_frontend(tmp_path, skip_tokenizer_init=True).start()
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert "--skip-tokenizer-init" in error_of(httpx.post(without.url + path, json=body), 400)["message"]


# --- version, ping, request ids -------------------------------------------------------------------------------------


def test_version_and_ping(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/ping").json() == http.post("/ping").json() == {"status": "ready"}
    assert error_of(http.post("/version"), 405)


@pytest.mark.parametrize(
    ("path", "body", "prefix"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, "chatcmpl-"),
        ("/v1/completions", {"prompt": "fox"}, "cmpl-"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_request_id_comes_back_in_header_and_answer(
    http: httpx.Client, path: str, body: dict[str, Any], prefix: str, stream: bool
) -> None:
    given = "trace-7:a/b.c_d~e,f=1@x"
    response = http.post(path, json={**body, "stream": stream}, headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    assert f'"id":"{prefix}{given}"' in response.text


def test_without_one_each_response_gets_an_id_of_its_own(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "fox"})
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
    responses = [answer, http.get("/health"), http.get("/nowhere"), http.post("/v1/completions", content=b"{")]
    assert [response.status_code for response in responses] == [200, 200, 404, 400]
    assert len({response.headers["x-request-id"] for response in responses}) == 4


@pytest.mark.parametrize("bad", [b"", b"a b", b"x" * 201, "größe".encode(), b'"quoted"', b"a\tb", b"%0a<script>"])
def test_a_request_id_that_could_break_a_log_is_refused(http: httpx.Client, bad: bytes) -> None:
    response = http.get("/health", headers={b"X-Request-Id": bad})
    error = error_of(response, 400)
    assert error["param"] == "X-Request-Id"
    assert len(error["message"]) < 250
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


# --- keys and origins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_each_of_the_keys_opens_the_api(closed: Frontend, key: str) -> None:
    with openai.OpenAI(base_url=f"{closed.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model=MODEL_NAME, prompt="the fox").choices[0].text == "the fox"
        assert [model.id for model in client.models.list()] == [MODEL_NAME]


def test_another_key_is_an_authentication_error(closed: Frontend) -> None:
    for key in ("sk-firs", "sk-first2", "SK-FIRST", "x"):
        with openai.OpenAI(base_url=f"{closed.url}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.completions.create(model=MODEL_NAME, prompt="the fox")
            assert caught.value.code == "invalid_api_key"
            assert key not in caught.value.message


@pytest.mark.parametrize("header", [None, "", "sk-first", "Basic sk-first", "Bearer", "Bearersk-first"])
def test_a_request_without_a_key_is_refused_before_it_is_read(closed: Frontend, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/no/such/path"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    ):
        response = httpx.request(method, closed.url + path, headers=headers, content=b"not JSON")
        assert "Authorization: Bearer KEY" in error_of(response, 401)["message"]
        assert response.headers["www-authenticate"] == "Bearer"
        assert "x-request-id" in response.headers


def test_state_and_metrics_need_no_key(closed: Frontend) -> None:
    for path in ("/health", "/ping", "/version", "/metrics"):
        assert httpx.get(closed.url + path).status_code == 200


def test_a_path_written_otherwise_does_not_get_round_the_key(closed: Frontend) -> None:
    for path in ("//v1/models", "/v1//models", "/./v1/models", "/%761/models", "/v1%2fmodels", "/V1/models", "/v1"):
        host, port = closed.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert connection.recv(100).split()[1] in (b"401", b"404"), path


def test_pages_of_an_allowed_origin_may_read_answers(closed: Frontend) -> None:
    def ask(origin: str, **headers: str) -> httpx.Response:
        headers = {"Origin": origin, **headers}
        return httpx.options(f"{closed.url}/v1/chat/completions", headers=headers)

    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = ask("https://chat.example", **preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    refused = ask("https://other.example", **preflight)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    answer = httpx.get(f"{closed.url}/health", headers={"Origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id"
    assert "access-control-allow-origin" not in httpx.get(f"{closed.url}/health").headers


def test_origins_are_vllms_by_default_and_can_be_none(
    http: httpx.Client, make_frontend: Callable[..., Frontend]
) -> None:
    headers = {"Origin": "https://anything.example"}
    assert http.get("/health", headers=headers).headers["access-control-allow-origin"] == "*"
    without = make_frontend(allowed_origins=[]).start()
    assert "access-control-allow-origin" not in httpx.get(f"{without.url}/health", headers=headers).headers


def test_methods_headers_and_credentials_can_be_limited(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend(
        allowed_origins=["https://a.example"],
        allowed_methods=["GET"],
        allowed_headers=["X-Mine"],
        allow_credentials=True,
    ).start()
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    answer = httpx.options(f"{frontend.url}/health", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-allow-methods"] == "GET"
    assert "X-Mine" in answer.headers["access-control-allow-headers"]
    for name, value in (("Method", "POST"), ("Headers", "X-Yours")):
        refused = httpx.options(f"{frontend.url}/health", headers=headers | {f"Access-Control-Request-{name}": value})
        assert refused.status_code == 400
