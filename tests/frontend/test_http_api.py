"""The OpenAI API of the frontend process: answers, streams, refusals, with the OpenAI client and by hand."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from protocol.messages import Failed, unpack_ints
from tests.frontend.conftest import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    VOCAB_SIZE,
    Frontend,
    error_of,
    make_tokenizer,
    wait_until,
)

TOKENIZER = make_tokenizer()
HELLO = [{"role": "user", "content": "Größe 🙂"}]
TOOL = {"type": "function", "function": {"name": "f"}}
# What the fake core answers to it: the rendered prompt without its special tokens.
ECHO = "user\nGröße 🙂"


@pytest.fixture
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=frontend.url, timeout=10) as client:
        yield client


@pytest.fixture
def client(frontend: Frontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


def token_ids(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


def events(text: str) -> list[dict[str, Any]]:
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# --- answers --------------------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL_NAME, messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL_NAME
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", ECHO)
    assert answer.usage is not None
    prompt = TOKENIZER.encode("<|im_start|>user\nGröße 🙂<|im_end|>\n<|im_start|>assistant\n").ids
    # The echo ends at the <|im_end|> of the prompt.
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == prompt.index(TOKENIZER.token_to_id("<|im_end|>")) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ECHO
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_asynchronous_client(frontend: Frontend) -> None:
    async with openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model=MODEL_NAME, messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ECHO


def test_chat_fields_reach_the_template(client: openai.OpenAI, frontend: Frontend) -> None:
    tools: Any = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    options = {"chat_template_kwargs": {"thinking": False}, "return_token_ids": True}
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, tools=tools, tool_choice="auto", max_tokens=1, extra_body=options
    )
    rendered = (
        f"<|im_start|>tools\n{json.dumps(tools[0], ensure_ascii=False)}\n<|im_end|>\n"
        "<|im_start|>user\nGröße 🙂<|im_end|>\n<|im_start|>assistant\n<think></think>"
    )
    prompt = TOKENIZER.encode(rendered).ids
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == prompt
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == prompt[:1]
    assert unpack_ints(frontend.core.added[0].prompt_token_ids).tolist() == prompt


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("the fox", ["the fox"]),
        (["the fox", "日本"], ["the fox", "日本"]),
        (TOKENIZER.encode("the fox").ids, ["the fox"]),
        ([TOKENIZER.encode("the").ids, TOKENIZER.encode("日本").ids], ["the", "日本"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completions(client: openai.OpenAI, prompt: Any, texts: list[str], stream: bool) -> None:
    if not stream:
        answer = client.completions.create(model=MODEL_NAME, prompt=prompt)
        assert answer.id.startswith("cmpl-")
        assert answer.object == "text_completion"
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        return
    received = [""] * len(texts)
    reasons = {}
    for chunk in client.completions.create(model=MODEL_NAME, prompt=prompt, stream=True):
        for choice in chunk.choices:
            received[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert received == texts
    assert reasons == dict.fromkeys(range(len(texts)), "stop")


def test_token_ids_of_a_stream_are_those_of_the_core(http: httpx.Client, frontend: Frontend) -> None:
    ids = TOKENIZER.encode("Größe 日本語").ids
    body = {"prompt": ids, "max_tokens": 40, "stream": True, "return_token_ids": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == ids
    assert token_ids(chunks) == [*ids, frontend.eos]
    assert "".join(choice["text"] for choice in choices) == "Größe 日本語"


def test_tokens_that_share_an_event_keep_their_order(frontend: Frontend, http: httpx.Client) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "stream": True, "return_token_ids": True}
    chunks = events(http.post("/v1/completions", json=body).text)
    assert token_ids(chunks) == ([1, 2, 3] * 200)[:500]


def test_stop_strings_and_reasons(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt="quick brown fox", stop=["own", "zzz"])
    assert answer.choices[0].text == "quick br"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["stop_reason"] == "own"
    answer = client.completions.create(model=MODEL_NAME, prompt="quick", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


# Fields of a request as they are sent, and of the parameters that the core is given.
SAMPLING_FIELDS: list[tuple[str, Any, Any]] = [
    ("temperature", 0.3, 0.3),
    ("top_p", 0.5, 0.5),
    ("top_k", 7, 7),
    ("min_p", 0.1, 0.1),
    ("seed", -3, -3),
    ("max_tokens", 2, 2),
    ("min_tokens", 1, 1),
    ("stop_token_ids", [9], (9,)),
    ("ignore_eos", True, True),
    ("skip_special_tokens", False, False),
    ("include_stop_str_in_output", True, True),
    ("presence_penalty", 0.5, 0.5),
    ("frequency_penalty", -0.5, -0.5),
    ("repetition_penalty", 1.5, 1.5),
    ("logit_bias", {"5": -3, "6": 1.5}, ((5, -3.0), (6, 1.5))),
    ("allowed_token_ids", [3, 4], (3, 4)),
    ("prompt_logprobs", 2, 2),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(("name", "sent", "arrives"), SAMPLING_FIELDS, ids=[field[0] for field in SAMPLING_FIELDS])
def test_a_sampling_field_reaches_the_core(
    http: httpx.Client, frontend: Frontend, path: str, name: str, sent: Any, arrives: Any
) -> None:
    prompt = {"/v1/completions": {"prompt": "fox"}, "/v1/responses": {"input": "fox"}}.get(path, {"messages": HELLO})
    if path == "/v1/responses" and name == "prompt_logprobs":
        pytest.skip("these are not for log-probabilities")
    own_name = "max_output_tokens" if path == "/v1/responses" and name == "max_tokens" else name
    assert http.post(path, json=prompt | {own_name: sent}).status_code == 200
    assert getattr(frontend.core.added[0].params, name) == arrives


def test_priority_salt_and_bad_words_reach_the_core(http: httpx.Client, frontend: Frontend) -> None:
    body = {"prompt": [1], "priority": 4, "cache_salt": "tenant", "bad_words": ["fox", " fox"]}
    assert http.post("/v1/completions", json=body).status_code == 200
    added = frontend.core.added[0]
    assert (added.priority, added.cache_salt) == (4, "tenant")
    words = [unpack_ints(word).tolist() for word in added.bad_words]
    assert words == [TOKENIZER.encode(text).ids for text in ("fox", " fox")]


def test_numbers_of_logprobs_reach_the_core(http: httpx.Client, frontend: Frontend) -> None:
    chat, text = ("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "fox"})
    cases: list[tuple[tuple[str, dict[str, Any]], dict[str, Any], tuple[int | None, int | None]]] = [
        (chat, {"logprobs": False}, (None, None)),
        (chat, {"logprobs": True}, (0, None)),
        (chat, {"logprobs": True, "top_logprobs": 4, "prompt_logprobs": 3}, (4, 3)),
        (text, {"logprobs": 2}, (2, None)),
        (text, {"logprobs": 2, "echo": True}, (2, 2)),
        (text, {"logprobs": 2, "echo": True, "prompt_logprobs": 4}, (2, 4)),
        (text, {"echo": True}, (None, None)),
    ]
    for (path, body), fields, expected in cases:
        frontend.core.added.clear()
        assert http.post(path, json=body | fields).status_code == 200
        params = frontend.core.added[0].params
        assert (params.logprobs, params.prompt_logprobs) == expected, fields


def test_choices_are_requests_with_seeds_of_their_own(http: httpx.Client, frontend: Frontend) -> None:
    body = {"prompt": ["the fox", "日本"], "n": 3, "seed": 7}
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["the fox"] * 3 + ["日本"] * 3
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    params = [added.params for added in frontend.core.added]
    assert {each.n for each in params} == {1}
    seeds = [each.seed for each in params]
    assert seeds[0] == 7
    assert len(set(seeds[:3])) == 3
    assert seeds[3:] == seeds[:3]


def test_only_the_last_tokens_of_a_prompt_are_used(http: httpx.Client, frontend: Frontend) -> None:
    ids = TOKENIZER.encode("the quick brown fox").ids
    chat = {"messages": [{"role": "user", "content": "x" * 600}], "truncate_prompt_tokens": -1}
    for body in ({"prompt": "the quick brown fox"}, {"prompt": ids}):
        assert http.post("/v1/completions", json=body | {"truncate_prompt_tokens": 3}).status_code == 200
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    prompts = [unpack_ints(added.prompt_token_ids).tolist() for added in frontend.core.added]
    assert prompts[:2] == [ids[-3:]] * 2
    assert len(prompts[2]) == MAX_MODEL_LEN - 1


def test_default_lengths(http: httpx.Client, frontend: Frontend) -> None:
    http.post("/v1/completions", json={"prompt": [1, 2]})
    http.post("/v1/completions", json={"prompt": [1] * (MAX_MODEL_LEN - 3)})
    http.post("/v1/chat/completions", json={"messages": HELLO})
    http.post("/v1/chat/completions", json={"messages": HELLO, "max_completion_tokens": 3, "max_tokens": 9})
    chat_prompt = len(unpack_ints(frontend.core.added[2].prompt_token_ids))
    lengths = [added.params.max_tokens for added in frontend.core.added]
    assert lengths == [16, 3, MAX_MODEL_LEN - chat_prompt, 3]


def test_the_models_own_sampling_values_hold_unless_the_request_says(
    make_frontend: Callable[..., Frontend], model_directory: Path, tmp_path: Path
) -> None:
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recommended = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": 1,
        "max_new_tokens": 7,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    frontend = make_frontend(tmp_path).start()
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    for body in ({}, neutral):
        assert httpx.post(f"{frontend.url}/v1/completions", json={"prompt": [1], **body}).status_code == 200
    params = [added.params for added in frontend.core.added]
    got = [(p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) for p in params]
    assert got == [(0.6, 0.95, 20, 0.05, 1.1), (1.0, 1.0, 0, 0.0, 1.0)]
    for body in ({}, {"max_tokens": 9}):
        chat = {"messages": HELLO, "temperature": 0.5, **body}
        assert httpx.post(f"{frontend.url}/v1/chat/completions", json=chat).status_code == 200
    # A plain completion that does not say has 16 tokens, as in the OpenAI API.
    assert [added.params.max_tokens for added in frontend.core.added] == [16, 16, 7, 9]


def test_the_first_token_of_an_echo_has_no_logprob_and_the_client_takes_that(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt="brown fox", echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    first, *others = logprobs.token_logprobs
    assert first is None
    assert others
    assert all(isinstance(logprob, float) for logprob in others)


def test_models_and_health(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    model = client.models.retrieve(MODEL_NAME)
    assert model.object == "model"
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == MAX_MODEL_LEN
    assert http.get("/health").json() == {"status": "ready"}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 0}, "n", "1 to 128, got 0"),
        ({"n": 129}, "n", "1 to 128, got 129"),
        ({"best_of": 2}, "best_of", "best_of is not supported: it can only be 1 or null, got 2"),
        ({"logprobs": 0}, "logprobs", "expected `bool | null`, got `int` (got 0)"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20, or -1 (all tokens), got 21"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs", "got -2"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs to be true, got 3"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "got 21"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream must be false"),
        ({"presence_penalty": 2.5}, "presence_penalty", "between -2 and 2, got 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "between -2 and 2, got -2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0, got 0"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100, got 101"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "got 'five'"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", f"got {VOCAB_SIZE}"),
        ({"logit_bias": [5]}, "logit_bias", "expected `object | null`"),
        ({"bad_words": [""]}, "bad_words", "1 to"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", f"got {VOCAB_SIZE}"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens", "at most max_tokens, which is 3, got 4"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"echo": True}, "echo", "echo is not supported: it can only be false or null, got True"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "continuous_usage_stats needs include_usage to be true",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "'auto' or 'none' with this model"),
        ({"tool_choice": "any"}, "tool_choice", '"any"'),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type must be 'function', got 'web_search'"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "both be true"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "text part, got 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "got 'input_audio'"),
        ({"response_format": {"type": "json"}}, "response_format.type", "got 'json'"),
        ({"min_p": 1.1}, "min_p", "between 0 and 1, got 1.1"),
        ({"best_off": 1}, "best_off", "best_off is not a field of this request"),
        ({"stream_options": {"include": True}}, "stream_options.include", "not a field"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"temperature": "hot"}, "temperature", 'expected `float | null`, got `str` (got "hot")'),
        ({"temperature": -1}, "temperature", "between 0 and 100, got -1"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "got -2"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "expected `int | null`"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1, got 0"),
        ({"max_completion_tokens": 511}, "max_completion_tokens", "maximum context length of 512"),
        ({"max_tokens": 10**12}, "max_tokens", "got 1000000000000"),
        ({"stop": ["a", 1]}, "stop", "stop[1]"),
        ({"stop": [""]}, "stop", "1 to"),
        ({"stop": ["a"] * 100}, "stop", "at most"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "got -1"),
        ({"priority": 2**31}, "priority", "2147483647"),
        ({"cache_salt": ""}, "cache_salt", "empty"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "expected `array`, got `str`"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "no room"),
        ({"messages": [{"role": "forbidden", "content": ""}]}, "messages", "no such role here"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"chat_template_kwargs": {"self": 1}}, "messages", "refused"),
    ],
)
def test_chat_fields_that_cannot_be_served_are_named(
    http: httpx.Client, frontend: Frontend, fields: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post("/v1/chat/completions", json={"messages": HELLO} | fields), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert frontend.core.added == []


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "mixes"),
        (
            {"prompt": "a", "echo": True, "max_tokens": 0, "min_tokens": 1},
            "min_tokens",
            "max_tokens, which is 0, got 1",
        ),
        ({"prompt": 5}, "prompt", "got `int`"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt", f"holds {VOCAB_SIZE} at position 1"),
        ({"prompt": [1, 10**30]}, "prompt", "at position 1"),
        ({"prompt": [1, -1]}, "prompt", "holds -1 at position 1"),
        ({"prompt": [1] * MAX_MODEL_LEN}, "prompt", "no room"),
        ({"prompt": [1], "max_tokens": MAX_MODEL_LEN}, "max_tokens", "max_tokens is too large"),
        ({"prompt": ["fine", ""]}, "prompt", "empty"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "got 21"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "got `bool`"),
        ({"prompt": "a", "top_logprobs": 1}, "top_logprobs", "not a field"),
        ({"prompt": "a", "echo": 1}, "echo", "got `int`"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"prompt": ["a"] * 20, "n": 128}, "n", "make 2560 answers"),
        ({"prompt": "a", "n": 128, "logprobs": -1, "max_tokens": 400}, "logprobs", "too large for so many answers"),
        ({"prompt": [[1] * 200] * 80, "prompt_logprobs": -1}, "prompt_logprobs", "of which 8388608 are allowed"),
        ({"prompt": ["a"] * 2049}, "prompt", "2049 prompts"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "got 'b'"),
        ({"prompt": "a", "messages": HELLO}, "messages", "not a field"),
        ({}, "prompt", "prompt is missing"),
    ],
)
def test_completion_fields_that_cannot_be_served_are_named(
    http: httpx.Client, frontend: Frontend, fields: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post("/v1/completions", json=fields), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert frontend.core.added == []


NO_OPS = {
    "n": 1,
    "logprobs": None,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "user": "someone",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": None,
    "stream_options": None,
    "temperature": None,
}


def test_fields_that_ask_for_nothing_are_accepted(http: httpx.Client) -> None:
    chat = {"parallel_tool_calls": True, "tool_choice": "none", "tools": [], "logprobs": False, "modalities": ["text"]}
    body = {"model": MODEL_NAME, "messages": HELLO, **NO_OPS, **chat}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    body = {"prompt": "fox", **NO_OPS, "suffix": None, "echo": False, "best_of": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"messages": [{"role": "\xff"}]}', b'{"a": ' * 10_000, b"\x00"]
)
def test_bodies_that_are_no_object_are_refused(http: httpx.Client, body: bytes) -> None:
    assert error_of(http.post("/v1/chat/completions", content=body), 400)["message"]


def test_half_a_surrogate_pair_is_refused(http: httpx.Client) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud800 b"}]}'
    assert error_of(http.post("/v1/chat/completions", content=content), 400)


def test_an_unknown_model_is_not_found(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert "'gpt-4'" in caught.value.message
    assert error_of(http.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_paths_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/chat"), 404)["message"] == "GET /v1/chat is not served here"
    response = http.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(http.post("/v1/models", json={}), 405)


def test_a_body_that_is_too_long_is_refused(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", content=b" " * (32 * 1024 * 1024 + 1)), 413)
    assert "33554432" in error["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(34):
            yield b" " * 1024 * 1024

    assert error_of(http.post("/v1/completions", content=chunks()), 413)


# --- leaving and failing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_a_client_that_disconnects_has_its_request_aborted(frontend: Frontend, stream: bool, running: bool) -> None:
    frontend.core.step_seconds = 0.01
    if not running:
        frontend.core.may_step.clear()
    body = json.dumps({"prompt": [[1, 2], [3]], "max_tokens": 400, "ignore_eos": True, "stream": stream}).encode()
    host, port = frontend.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: frontend.core.num_running == 2)
        if stream and running:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: frontend.core.num_running == 0)
    assert len(frontend.core.aborted) == 2


@pytest.mark.parametrize(
    ("kind", "status", "type_"),
    [
        ("invalid_request", 400, "invalid_request_error"),
        ("unavailable", 503, "server_error"),
        ("failed", 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_the_core_fails_get_a_status(
    http: httpx.Client, frontend: Frontend, kind: Any, status: int, type_: str, stream: bool
) -> None:
    frontend.core.failure = Failed(0, kind, "this is why", None)
    body = {"prompt": [[1], [2]], "stream": stream}
    error = error_of(http.post("/v1/completions", json=body), status)
    assert (error["message"], error["type"]) == ("this is why", type_)


def test_a_stream_that_fails_ends_with_the_error(client: openai.OpenAI, frontend: Frontend) -> None:
    frontend.core.failure = Failed(0, "failed", "this is why", None)
    frontend.core.fail_after = 3
    texts: list[str] = []
    stream = client.completions.create(model=MODEL_NAME, prompt="abcdef", stream=True)
    with pytest.raises(openai.APIError, match="this is why"):
        texts.extend(chunk.choices[0].text for chunk in stream)
    assert "abcdef".startswith("".join(texts))


def test_without_a_tokenizer_ids_go_in_and_out(make_frontend: Callable[..., Frontend], tmp_path: Path) -> None:
    frontend = make_frontend(tmp_path, skip_tokenizer_init=True).start()
    with httpx.Client(base_url=frontend.url) as http:
        answer = http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}).json()
        assert answer["choices"][0]["token_ids"] == [5, 6, 5]
        assert answer["choices"][0]["text"] == ""
        body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True, "stream": True}
        chunks = events(http.post("/v1/completions", json=body).text)
        assert token_ids(chunks) == [5, 6, 5]
        error = error_of(http.post("/v1/chat/completions", json={"messages": HELLO}), 400)
        assert error["param"] == "messages"
        assert "--skip-tokenizer-init" in error["message"]
        assert error_of(http.post("/v1/completions", json={"prompt": "text"}), 400)["param"] == "prompt"
        assert error_of(http.post("/v1/completions", json={"prompt": [1], "stop": "x"}), 400)["param"] == "stop"
