"""What a request may hold, what a connection may do, and that everything beyond it is refused in the OpenAI format."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from frontend.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS
from protocol.limits import MAX_JSON_DEPTH, MAX_JSON_NODES, MAX_MESSAGES, MAX_TEXT_CHARS, MAX_TOOLS
from protocol.messages import ChatPrompt, Failed, Generate, TextPrompt, TokenPrompt
from protocol.sampling import SamplingParams
from tests.frontend.conftest import MAX_MODEL_LEN, VOCAB_SIZE, Frontend, error_of, wait_until
from tests.frontend.ipc_client import Client
from tests.support.mutations import mutations

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "fox"}]


@pytest.fixture
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=frontend.url, timeout=30) as client:
        yield client


def nested(depth: int) -> Any:
    value: Any = "a"
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "x": parameters}}}


# --- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"messages": HELLO * (MAX_MESSAGES + 1)}, "messages", f"at most {MAX_MESSAGES} messages, got 8193"),
        (CHAT, {"messages": HELLO, "tools": [tool("a")] * (MAX_TOOLS + 1)}, "tools", "at most 512 functions, got 513"),
        (TEXT, {"prompt": "a" * 100_000}, "prompt", "has 100000 characters, which leaves no room"),
        (
            TEXT,
            {"prompt": "a" * (MAX_TEXT_CHARS + 1), "truncate_prompt_tokens": 2},
            "prompt",
            "at most 8388608 charact",
        ),
        ("/tokenize", {"prompt": "a" * (MAX_TEXT_CHARS + 1)}, "prompt", "at most 8388608 characters"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages", "has 1000"),
        (TEXT, {"prompt": "a", "stop": ["a"] * 65}, "stop", "at most 64 strings, got 65"),
        (TEXT, {"prompt": "a", "stop": "a" * 1025}, "stop", "1 to 1024 characters"),
        (TEXT, {"prompt": "a", "stop_token_ids": [1] * 257}, "stop_token_ids", "at most 256 ids, got 257"),
        (TEXT, {"prompt": "a", "bad_words": ["a"] * 129}, "bad_words", "at most 128 strings, got 129"),
        (TEXT, {"prompt": "a", "bad_words": ["a" * 1025]}, "bad_words", "1 to 1024 characters"),
        (TEXT, {"prompt": "a", "n": 129}, "n", "1 to 128, got 129"),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "got 21"),
        (TEXT, {"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "got 21"),
        (
            TEXT,
            {"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}},
            "logit_bias",
            "at most 1024 tokens, got 1025",
        ),
        (
            TEXT,
            {"prompt": "a", "allowed_token_ids": [1] * (VOCAB_SIZE + 1)},
            "allowed_token_ids",
            f"at most {VOCAB_SIZE} ids, which are all there are, got {VOCAB_SIZE + 1}",
        ),
        (TEXT, {"prompt": "a", "cache_salt": "a" * 1025}, "cache_salt", "at most 1024 characters, got 1025"),
        (TEXT, {"prompt": ["a"] * 2049}, "prompt", "2049 prompts"),
        (
            TEXT,
            {"prompt": "a", "structured_outputs": {"regex": "a" * 8193}},
            "structured_outputs.regex",
            "got '8193 characters'",
        ),
        (
            TEXT,
            {"prompt": "a", "structured_outputs": {"grammar": "a" * 131_073}},
            "structured_outputs.grammar",
            "got '131073 characters'",
        ),
        (
            TEXT,
            {"prompt": "a", "structured_outputs": {"choice": ["a"] * 1025}},
            "structured_outputs.choice",
            "got '1025 strings'",
        ),
        (
            TEXT,
            {"prompt": "a", "structured_outputs": {"json": {"enum": ["a" * 300_000]}}},
            "structured_outputs",
            "is too large",
        ),
        (RESPONSES, {"input": "a", "metadata": {str(key): "" for key in range(17)}}, "metadata", "16 pairs, got 17"),
        (RESPONSES, {"input": "a", "metadata": {"a": "b" * 513}}, "metadata", "512 characters in a value, got 513"),
        (RESPONSES, {"input": "a", "metadata": {"a" * 65: "b"}}, "metadata", "64 characters in a key, got 65"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_more_than_a_field_may_hold_is_refused_by_name_and_number(
    http: httpx.Client, frontend: Frontend, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    started = time.monotonic()
    error = error_of(http.post(path, json=fields), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 2100
    assert time.monotonic() - started < 5
    assert frontend.core.added == []


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 1, 200, 480, 600, 900, 985, 995, 1005, 1500, 100_000])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, '{"messages": [{"role": "user", "content": @}]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a", "tool_calls": @}]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a"}], "tools": [@]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": @}}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": @}}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a"}], "metadata": @}'),
        (TEXT, '{"prompt": "a", "structured_outputs": {"json": {"a": @}}}'),
        (TEXT, '{"prompt": "a", "best_of": @}'),
        (TEXT, '{"prompt": @}'),
        (RESPONSES, '{"input": [{"role": "user", "content": @}]}'),
        (RESPONSES, '{"input": "a", "text": {"format": @}}'),
        ("/tokenize", '{"messages": [{"role": "user", "content": @}]}'),
    ],
)
def test_deep_bodies_are_refused(http: httpx.Client, path: str, body: str, depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a": ', "}")):
        deep = opening * depth + "1" + closing * depth
        assert error_of(http.post(path, content=body.replace("@", deep)), 400)["message"]


@pytest.mark.parametrize("depth", [200, 900, 1000, 100_000])
def test_deep_json_in_strings_is_refused(http: httpx.Client, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": ' + deep + "}"}}
    messages = [{"role": "assistant", "content": "a", "tool_calls": [call]}]
    assert error_of(http.post(CHAT, json={"messages": messages}), 400)["param"] == "messages"
    error = error_of(http.post(TEXT, json={"prompt": "a", "structured_outputs": {"json": deep}}), 400)
    assert error["param"] == "structured_outputs.json"


def test_a_schema_may_be_as_deep_as_schemas_are(http: httpx.Client, frontend: Frontend) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"json": schema}}
    assert http.post(TEXT, json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": 5} x',
        b'{"prompt": 5, "stop": ',
        b'{"n": "a", "prompt": \xff}',
        b'{"prompt": 5, "a": ' + b"[" * 5000,
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "best_of": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": [' + b"9" * 5000 + b"]}",
        b'{"' + b"x" * 100_000 + b'": 1}',
        b'{"prompt": "a", "model": "' + b"x" * 100_000 + b'"}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_go_wrong_twice_or_at_length_are_refused_in_few_words(http: httpx.Client, body: bytes) -> None:
    response = http.post(TEXT, content=body)
    assert response.status_code in (400, 404)
    assert len(error_of(response, response.status_code)["message"]) <= 2000


def test_a_body_of_very_many_objects_is_refused_before_they_are_made(http: httpx.Client, frontend: Frontend) -> None:
    process = psutil.Process(frontend.process.pid)  # type: ignore[union-attr]
    before = process.memory_info().rss
    for body in (b'{"messages": [' + b"{}," * (MAX_JSON_NODES + 1) + b"{}]}", b"[" * (MAX_JSON_NODES + 1)):
        error = error_of(http.post(CHAT, content=body), 400)
        assert f"of which {MAX_JSON_NODES} are allowed" in error["message"]
    assert process.memory_info().rss - before < 64 * 1024 * 1024


def test_the_longest_body_is_an_option(make_frontend: Callable[..., Frontend]) -> None:
    frontend = make_frontend(max_body_size="1KiB").start()
    with httpx.Client(base_url=frontend.url) as http:
        assert http.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        for path in (TEXT, CHAT, RESPONSES, "/tokenize", "/detokenize"):
            error = error_of(http.post(path, content=b" " * 1025), 413)
            assert "longer than 1024 bytes (--max-body-size)" in error["message"]


# --- the same over IPC ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (TextPrompt("a" * 100_000), "prompt", "has 100000 characters"),
        (TextPrompt("a" * (MAX_TEXT_CHARS + 1)), "prompt", "at most 8388608 characters"),
        (TokenPrompt(bytes(4 * MAX_MODEL_LEN)), "prompt", "no room"),
        (TokenPrompt(bytes(32 * 1024 * 1024)), "prompt", "no room"),
        (ChatPrompt(HELLO * (MAX_MESSAGES + 1)), "messages", "at most 8192 messages"),
        (ChatPrompt(HELLO, [{}] * (MAX_TOOLS + 1)), "tools", "at most 512 functions"),
        (ChatPrompt([{"role": "user", "content": nested(MAX_JSON_DEPTH + 1)}]), "messages", "nested too deeply"),
        (ChatPrompt(HELLO, [{"a": nested(400)}]), "tools", "nested too deeply"),
        (ChatPrompt(HELLO, None, {"a": nested(400)}), "chat_template_kwargs", "nested too deeply"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_python_clients_are_refused_the_same(
    connect: Callable[..., Client], prompt: Any, param: str, message: str
) -> None:
    client = connect()
    client.send(Generate(1, prompt, SamplingParams()))
    failed = client.receive(Failed)
    assert (failed.kind, failed.param) == ("invalid_request", param)
    assert message in failed.message


# --- connections ----------------------------------------------------------------------------------------------------


class Connection:
    """A TCP connection to the server, to send on what no HTTP client would."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), 20)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        self.socket.close()
        return b"".join(parts)


def refusal(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.fixture(scope="module")
def hurried(model_directory: Any) -> Iterator[Frontend]:
    frontend = Frontend(model_directory, receive_timeout=0.4).start()
    yield frontend
    frontend.close()


# Some 240 kB a choice as a stream, and 140 kB as a whole.
LONG_ANSWER = {"prompt": "x", "logprobs": 20, "max_tokens": 400, "ignore_eos": True}


def ask(frontend: Frontend, body: dict[str, Any], receive_buffer: int = 4096) -> socket.socket:
    """Sends a request on a connection that takes little of its answer unless it is read."""
    host, port = frontend.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "half",
    [
        b"P",
        b"POST /v1/comp",
        HEAD,
        HEAD + b"Content-Length: 20\r\n\r\n",
        HEAD + b"Content-Length: 20\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=repr,
)
def test_half_a_request_is_answered_and_closed_in_time(hurried: Frontend, half: bytes) -> None:
    connection = Connection(hurried.url)
    connection.send(half)
    started = time.monotonic()
    assert "within 0.4 s (--receive-timeout)" in refusal(connection.rest(), 408)
    assert 0.2 < time.monotonic() - started < 5


def test_a_connection_that_says_nothing_is_closed_in_time(hurried: Frontend) -> None:
    assert Connection(hurried.url).rest() == b""


def test_a_byte_now_and_then_does_not_keep_a_connection(hurried: Frontend) -> None:
    connection = Connection(hurried.url)
    for byte in HEAD[:6]:
        connection.send(bytes([byte]))
        time.sleep(0.06)
    time.sleep(0.3)
    refusal(connection.rest(), 408)


def test_the_second_request_of_a_connection_is_timed_too(hurried: Frontend) -> None:
    connection = Connection(hurried.url)
    connection.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = b""
    while not answer.endswith(b'"ready"}'):
        answer += connection.socket.recv(65536)
    time.sleep(0.6)
    connection.send(b"GET /hea")
    refusal(connection.rest(), 408)


def test_an_answer_may_take_longer_than_its_request(hurried: Frontend) -> None:
    hurried.core.step_seconds = 0.05
    with httpx.Client(base_url=hurried.url, timeout=20) as http:
        answer = http.post(TEXT, json={"prompt": "a", "max_tokens": 20, "ignore_eos": True})
    hurried.core.step_seconds = 0.0
    assert answer.elapsed.total_seconds() > 0.8
    assert answer.json()["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_answer_that_nobody_reads_is_given_up_in_time(hurried: Frontend, stream: bool) -> None:
    process = psutil.Process(hurried.process.pid)  # type: ignore[union-attr]

    def no_connection_is_left() -> bool:
        return not [one for one in process.net_connections("tcp") if one.status != psutil.CONN_LISTEN]

    wait_until(no_connection_is_left)
    num_aborted = len(hurried.core.aborted)
    # As a stream: more than the kernel takes, and less than --max-stream-buffer beyond that.
    with ask(hurried, {**LONG_ANSWER, "stream": stream, "n": 22 if stream else 60}) as connection:
        connection.recv(1, socket.MSG_PEEK)
        wait_until(lambda: hurried.core.num_running == 0)
        assert not hurried.core.aborted[num_aborted:], "the requests have ended, and their answers are there"
        wait_until(no_connection_is_left)
        read = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                read += part
        assert read.startswith(b"HTTP/1.1 200 ")
        assert not read.endswith((b"}", b"0\r\n\r\n"))


def test_a_finished_answer_that_is_read_slowly_is_whole(hurried: Frontend) -> None:
    with ask(hurried, {**LONG_ANSWER, "n": 60}, 256 << 10) as connection:
        head, _, read = connection.recv(4096).partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split()[0])
        started = time.monotonic()
        while len(read) < size:
            part = connection.recv(min(512 << 10, size - len(read)), socket.MSG_WAITALL)
            assert part
            read += part
            time.sleep(0.1)
    assert time.monotonic() - started > 1
    assert len(json.loads(read)["choices"]) == 60


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", f"longer than {MAX_HEADER_BYTES} bytes"),
        (HEAD + b"A: " + b"b" * 70_000 + b"\r\n\r\n", f"longer than {MAX_HEADER_BYTES} bytes"),
        (HEAD + b"A: " + b"b" * 4_000_000, f"longer than {MAX_HEADER_BYTES} bytes"),
        (HEAD + b"".join(b"A%d: b\r\n" % i for i in range(MAX_HEADERS + 1)) + b"\r\n", f"more than {MAX_HEADERS}"),
    ],
    ids=["url", "header", "endless header", "number"],
)
def test_headers_have_a_size_and_a_number(frontend: Frontend, request_: bytes, message: str) -> None:
    connection = Connection(frontend.url)
    try:
        connection.send(request_)
    except (ConnectionResetError, BrokenPipeError):
        return  # closed while it was still being sent: the answer is lost with what was not read
    answer = connection.rest()
    if answer:
        assert message in refusal(answer, 431)


def test_headers_below_the_bounds_are_served(http: httpx.Client) -> None:
    assert http.get("/health", headers={"a": "b" * 60_000}).status_code == 200


def test_what_is_no_http_is_refused_in_the_openai_format(frontend: Frontend) -> None:
    connection = Connection(frontend.url)
    connection.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert refusal(connection.rest(), 400) == "this is no HTTP request"


def test_damaged_requests_leave_no_connection_and_stop_nothing(frontend: Frontend, http: httpx.Client) -> None:
    body = b'{"prompt": "fox", "max_tokens": 3}'
    valid = [
        HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.0\r\nExpect: 100-continue\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\n\r\n",
        b"DELETE /v1/responses/%00%ff?a=b#c HTTP/1.1\r\nX-Request-Id: a\r\n\r\n",
    ]
    process = psutil.Process(frontend.process.pid)  # type: ignore[union-attr]
    http.get("/health")
    before = process.num_fds()
    for data in mutations(valid, 400, seed=6):
        connection = Connection(frontend.url)
        connection.send(data)
        connection.socket.shutdown(socket.SHUT_WR)
        connection.socket.settimeout(0.02)
        try:
            while connection.socket.recv(65536):
                pass
        except OSError:
            pass
        connection.socket.close()
    assert http.get("/health").status_code == 200
    wait_until(lambda: process.num_fds() <= before, 30)
