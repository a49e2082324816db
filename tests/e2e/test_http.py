"""The HTTP API of the real engine, as OpenAI's client and as raw bodies: answers, refusals, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from tokenizers import Tokenizer

from bundled import MODEL_DIR
from frontend import Client, SamplingParams
from tests.e2e.conftest import RunningEngine
from tests.support.requests import ask, is_idle, wait_until

MODEL = "tiny-qwen3"
STORY = "Once upon a time"
CAPITAL = "The capital of Italy is"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NOT_OPENAIS = ("top_k", "min_p", "stop_token_ids", "ignore_eos", "return_token_ids")
# What asks for as many tokens as the context holds: about ten seconds of work, which no test waits for.
ENDLESS = {"max_tokens": 2000, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def idle_after(client: Client) -> Iterator[None]:
    """Every test leaves no request running and no block held."""
    yield
    wait_until(lambda: is_idle(client.stats()), "the engine is idle and all its blocks are free")


@pytest.fixture(scope="module")
def ai(engine: RunningEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def complete(ai: OpenAI, prompt: Any = STORY, **options: Any) -> Completion:
    """A completion, greedy unless told otherwise; fields that are not OpenAI's go along as they are."""
    extra = {name: options.pop(name) for name in NOT_OPENAIS if name in options}
    return ai.completions.create(
        **{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 40, **options}, extra_body=extra
    )


def streamed_text(ai: OpenAI, **options: Any) -> list[str]:
    return [chunk.choices[0].text for chunk in complete(ai, stream=True, **options) if chunk.choices]


# --- answers --------------------------------------------------------------------------------------------------------


def test_models_and_health(engine: RunningEngine, ai: OpenAI) -> None:
    (card,) = ai.models.list().data
    assert (card.id, card.object, card.max_model_len) == (MODEL, "model", 2048)
    assert ai.models.retrieve(MODEL).id == MODEL
    assert engine.http.get("/health").json() == {"status": "ready"}
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        ai.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("What is the capital of France?", {}),
        ("Say hello in Japanese.", {}),
        ("Tell me a story about a fox.", {"max_tokens": 24}),
    ],
    ids=["plain", "multi-byte", "cut off"],
)
def test_a_chat_is_the_same_whole_streamed_and_over_ipc(
    ai: OpenAI, client: Client, question: str, options: dict[str, Any]
) -> None:
    arguments = {"model": MODEL, "messages": ask(question), "temperature": 0, "max_tokens": 64, **options}
    whole = ai.chat.completions.create(**arguments)
    choice = whole.choices[0]
    chunks = list(ai.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    *events, last = chunks
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    assert not any("\ufffd" in (event.choices[0].delta.content or "") for event in events)
    assert len(events) > 3
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices[0].finish_reason == choice.finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert {event.usage for event in events} == {None}

    params = SamplingParams(temperature=0.0, max_tokens=arguments["max_tokens"])
    (over_ipc,) = client.chat(ask(question), params, use_tqdm=False)
    answer = over_ipc.outputs[0]
    assert (choice.message.content, choice.finish_reason) == (answer.text, answer.finish_reason)
    assert whole.usage.prompt_tokens == len(over_ipc.prompt_token_ids)
    assert whole.usage.completion_tokens == len(answer.token_ids)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert choice.finish_reason == ("length" if "max_tokens" in options else "stop")


def test_the_bundled_model_answers_as_its_card_says(ai: OpenAI) -> None:
    def answer(question: str, **options: Any) -> str:
        arguments = {"model": MODEL, "messages": ask(question), "temperature": 0}
        return ai.chat.completions.create(**arguments, **options).choices[0].message.content or ""

    assert "Paris" in answer("What is the capital of France?")
    assert "こんにちは" in answer("Say hello in Japanese.")
    assert "7" in answer("What is 3 plus 4?")


@pytest.mark.parametrize("prompt", [STORY, CAPITAL, "こんにち"])
def test_a_completion_is_the_same_whole_streamed_and_over_ipc(ai: OpenAI, client: Client, prompt: str) -> None:
    whole = complete(ai, prompt, return_token_ids=True)
    pieces = streamed_text(ai, prompt=prompt)
    (over_ipc,) = client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)
    assert whole.choices[0].text == "".join(pieces) == over_ipc.outputs[0].text
    assert whole.choices[0].token_ids == over_ipc.outputs[0].token_ids
    assert whole.choices[0].prompt_token_ids == over_ipc.prompt_token_ids
    assert whole.choices[0].finish_reason == over_ipc.outputs[0].finish_reason
    assert whole.usage.completion_tokens == len(over_ipc.outputs[0].token_ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_every_form_of_a_prompt_gives_the_same_answer(ai: OpenAI, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (STORY, CAPITAL)]
    texts = [complete(ai, prompt).choices[0].text for prompt in (STORY, CAPITAL)]
    for prompt, expected in [(ids[0], texts[:1]), ([STORY, CAPITAL], texts), (ids, texts)]:
        whole = complete(ai, prompt)
        assert [choice.text for choice in whole.choices] == expected
        assert [choice.index for choice in whole.choices] == list(range(len(expected)))
        assert whole.usage.prompt_tokens == sum(map(len, ids[: len(expected)]))
        streamed = [""] * len(expected)
        for chunk in complete(ai, prompt, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == expected


def test_usage_comes_last_in_a_stream_and_only_when_asked_for(ai: OpenAI) -> None:
    whole = complete(ai, [STORY, CAPITAL])
    assert all(chunk.usage is None and chunk.choices for chunk in complete(ai, [STORY, CAPITAL], stream=True))
    *events, last = complete(ai, [STORY, CAPITAL], stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(event.choices and event.usage is None for event in events)


def test_usage_counts_cached_tokens(ai: OpenAI, client: Client) -> None:
    prompt = "A prompt for the usage test alone, which is long enough to fill some blocks. " * 6
    first, second = (complete(ai, prompt, max_tokens=2).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    block_size = client.engine.block_size
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // block_size * block_size > 0


def test_a_stop_string_across_tokens_ends_the_answer_and_no_part_of_it_is_sent(
    ai: OpenAI, tokenizer: Tokenizer
) -> None:
    whole = complete(ai, max_tokens=40, return_token_ids=True).choices[0]
    boundary = len(tokenizer.decode(whole.token_ids[:9]))
    stop = whole.text[boundary - 2 : boundary + 3]
    assert len(stop) == 5
    kept = whole.text[: whole.text.index(stop)]
    result = complete(ai, stop=["not in there", stop])
    choice = result.choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (kept, "stop", stop)
    assert result.usage.completion_tokens <= 12
    pieces = streamed_text(ai, stop=stop)
    assert "".join(pieces) == kept
    # One that is never completed is held back for a while, not lost.
    assert "".join(streamed_text(ai, stop=[stop + "never", whole.text[-3:] + "never"])) == whole.text


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(ai: OpenAI, tokenizer: Tokenizer) -> None:
    whole = complete(ai, return_token_ids=True).choices[0]
    token = whole.token_ids[7]
    position = whole.token_ids.index(token)
    choice = complete(ai, stop_token_ids=[token], return_token_ids=True).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    assert choice.token_ids == whole.token_ids[: position + 1]
    assert choice.text == tokenizer.decode(whole.token_ids[:position])


def test_max_tokens_is_exact_and_ignore_eos_goes_past_the_end(ai: OpenAI) -> None:
    for count in (1, 2, 7):
        result = complete(ai, max_tokens=count)
        assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (count, "length")
    ended = complete(ai, CAPITAL, max_tokens=200)
    assert ended.choices[0].finish_reason == "stop"
    count = ended.usage.completion_tokens
    further = complete(ai, CAPITAL, max_tokens=count + 5, ignore_eos=True)
    assert (further.usage.completion_tokens, further.choices[0].finish_reason) == (count + 5, "length")
    assert further.choices[0].text.startswith(ended.choices[0].text)


def test_a_seed_makes_a_draw_reproducible_and_without_one_draws_differ(ai: OpenAI) -> None:
    def draw(**options: Any) -> str:
        options = {"temperature": 1, "top_p": 1, "top_k": -1, "max_tokens": 24, **options}
        return complete(ai, **options).choices[0].text

    assert draw(seed=7) == draw(seed=7)
    assert len({draw(seed=seed) for seed in range(4)}) > 1
    assert len({draw() for _ in range(4)}) > 1
    assert draw(top_k=1) == draw(min_p=1) == draw(temperature=0)


async def test_streams_side_by_side_are_not_mixed_up(engine: RunningEngine, client: Client) -> None:
    prompts = [f"{number}, {number + 1}," if number % 2 else f"Once there were {number}" for number in range(64)]
    expected = client.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    assert len({result.outputs[0].text for result in expected}) > 32

    async with AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as ai:

        async def read(prompt: str) -> str:
            arguments = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 24}
            stream = await ai.completions.create(**arguments, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(read(prompt) for prompt in prompts))
    assert texts == [result.outputs[0].text for result in expected]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        (CHAT, {"model": "gpt-5"}, 404, "model", "'gpt-5'"),
        (TEXT, {"model": "gpt-5"}, 404, "model", "'gpt-5'"),
        (TEXT, {"prompt": "word " * 3000}, 400, "prompt", "2048"),
        (CHAT, {"messages": ask("word " * 3000)}, 400, "messages", "2048"),
        (TEXT, {"prompt": [1] * 2048}, 400, "prompt", "2048"),
        (TEXT, {"max_tokens": 2048}, 400, "max_tokens", "2048"),
        (TEXT, {"prompt": [1, 2, 99_999]}, 400, "prompt", "99999"),
        (TEXT, {"prompt": [[1], [2048]]}, 400, "prompt", "2048"),
        (TEXT, {"prompt": [1, -5]}, 400, "prompt", "-5"),
        (TEXT, {"prompt": []}, 400, "prompt", "empty"),
        (TEXT, {"prompt": ""}, 400, "prompt", "empty"),
        (TEXT, {"prompt": ["a", 1]}, 400, "prompt", "mixes"),
        (TEXT, {"prompt": None}, 400, "prompt", "null"),
        (CHAT, {"messages": []}, 400, "messages", "at least one"),
        (CHAT, {"messages": "hello"}, 400, "messages", "array"),
        (CHAT, {"messages": [{"content": "no role"}]}, 400, "messages", "role"),
        (TEXT, {"max_tokens": 0}, 400, "max_tokens", "0"),
        (CHAT, {"max_tokens": -1}, 400, "max_tokens", "-1"),
        (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens", "0"),
        (TEXT, {"temperature": 3000}, 400, "temperature", "3000"),
        (CHAT, {"temperature": -1}, 400, "temperature", "-1"),
        (TEXT, {"temperature": "hot"}, 400, "temperature", "str"),
        (TEXT, {"top_p": 0}, 400, "top_p", "0"),
        (TEXT, {"top_p": 1.5}, 400, "top_p", "1.5"),
        (TEXT, {"top_k": -7}, 400, "top_k", "-7"),
        (CHAT, {"min_p": 2}, 400, "min_p", "2"),
        (TEXT, {"seed": 2**63}, 400, "seed", str(2**63)),
        (TEXT, {"stop": [""]}, 400, "stop", "''"),
        (TEXT, {"stop_token_ids": [-1]}, 400, "stop_token_ids", "-1"),
        (TEXT, {"n": 129}, 400, "n", "129"),
        (CHAT, {"n": 0}, 400, "n", "0"),
        (TEXT, {"n": 128, "prompt": ["a"] * 17}, 400, "n", "2176"),
        (CHAT, {"logit_bias": {"2048": 1}}, 400, "logit_bias", "2048"),
        (TEXT, {"logprobs": 21}, 400, "logprobs", "21"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "21"),
        (CHAT, {"echo": True}, 400, "echo", "True"),
        (TEXT, {"best_of": 3, "n": 4}, 400, "best_of", "from n, which is 4, to 128, got 3"),
        (TEXT, {"best_of": 129}, 400, "best_of", "129"),
        (TEXT, {"best_of": 2, "echo": True, "max_tokens": 0}, 400, "best_of", "got 2"),
        (TEXT, {"best_of": 128, "prompt": ["a"] * 17, "stream": False}, 400, "best_of", "2176"),
        (CHAT, {"best_of": 3}, 400, "best_of", "it can only be 1 or null, got 3"),
        (CHAT, {"response_format": {"type": "json"}}, 400, "response_format.type", "'json'"),
        (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "required"),
        (TEXT, {"temprature": 0.5}, 400, "temprature", "temprature"),
        (TEXT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        (TEXT, {"cache_salt": ""}, 400, "cache_salt", "empty"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_value_is_refused_by_name(
    engine: RunningEngine, path: str, fields: dict[str, Any], status: int, param: str, message: str, stream: bool
) -> None:
    body: dict[str, Any] = {"messages": ask("hello")} if path == CHAT else {"prompt": STORY}
    if stream and not {"stream", "stream_options"} & fields.keys():
        body["stream"] = True
    response = engine.http.post(path, json=body | fields)
    assert_error(response, status, param)
    error = response.json()["error"]
    assert param in error["message"] or param == "model"
    assert message in error["message"]


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1, 2]", b'"text"', b"null", b"\x00\x01", b"{} x", b"{'a': 1}"],
    ids=repr,
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_that_is_no_json_object_is_refused(engine: RunningEngine, path: str, body: bytes) -> None:
    response = engine.http.post(path, content=body)
    # Where it begins as an object, its missing field may be noticed first.
    assert_error(response, 400, response.json()["error"]["param"] if body == b"{} x" else None)


@pytest.mark.parametrize("body", [b'{"prompt": "a"} x', b'{"prompt": "a",}', b'{"prompt": NaN}', b'{"prompt": "\xff"}'])
def test_json_that_goes_wrong_later_is_refused(engine: RunningEngine, body: bytes) -> None:
    response = engine.http.post(TEXT, content=body)
    assert_error(response, 400)
    assert "not valid JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", TEXT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions/", 404),
    ],
)
def test_a_wrong_method_or_route_is_refused(engine: RunningEngine, method: str, path: str, status: int) -> None:
    response = engine.http.request(method, path, json={"prompt": "a"} if method == "POST" else None)
    assert_error(response, status)
    assert f"{method} {path}" in response.json()["error"]["message"]


def test_a_missing_field_is_named(engine: RunningEngine) -> None:
    assert_error(engine.http.post(CHAT, json={}), 400, "messages")
    assert_error(engine.http.post(TEXT, json={"model": MODEL}), 400, "prompt")


def test_openais_client_raises_its_own_errors(ai: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        complete(ai, temperature=3000)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        complete(ai, model="gpt-5")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


def test_after_all_this_the_engine_serves(ai: OpenAI, client: Client) -> None:
    assert complete(ai, CAPITAL).choices[0].text.startswith(" Rome")
    assert is_idle(client.stats())


# --- clients that leave ---------------------------------------------------------------------------------------------


def connect(engine: RunningEngine) -> socket.socket:
    return socket.create_connection((engine.http.base_url.host, engine.http.base_url.port))


def post(engine: RunningEngine, body: dict[str, Any]) -> socket.socket:
    """Sends a completion request on a connection of its own, and leaves the answer to the caller."""
    connection = connect(engine)
    content = json.dumps({"prompt": STORY, **body}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("count", [1, 3], ids=["one prompt", "three prompts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_has_its_requests_aborted(
    engine: RunningEngine, client: Client, stream: bool, count: int
) -> None:
    aborted = client.stats().aborted_requests
    connection = post(engine, {"prompt": [STORY] * count, "stream": stream, **ENDLESS})
    wait_until(lambda: client.stats().num_running == count, "the requests are running")
    if stream:
        assert b"200 OK" in connection.recv(4096)
    assert client.stats().aborted_requests == aborted
    connection.close()
    wait_until(lambda: client.stats().aborted_requests == aborted + count, "the requests were aborted", seconds=3)
    assert is_idle(client.stats())


def test_a_client_that_leaves_before_its_request_is_complete_is_no_trouble(
    engine: RunningEngine, client: Client
) -> None:
    connection = connect(engine)
    connection.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: engine\r\nContent-Length: 1000\r\n\r\n{{".encode())
    connection.close()
    assert engine.http.get("/health").status_code == 200
    assert is_idle(client.stats())


def test_leaving_the_loop_over_openais_stream_aborts(ai: OpenAI, client: Client) -> None:
    aborted = client.stats().aborted_requests
    with complete(ai, stream=True, **ENDLESS) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
    wait_until(lambda: client.stats().aborted_requests == aborted + 1, "the request was aborted", seconds=3)
