"""Log-probabilities, echoed prompts and several choices over HTTP, of a core whose numbers the tests know.

What it says of a token is `logprob_of`; its answer is the prompt again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from frontend.tokenizer import Tokenizer
from tests.frontend.conftest import Frontend, make_tokenizer
from tests.frontend.fake_core import logprob_of

TOKENIZER = make_tokenizer()
# Its characters beyond ASCII are several tokens each, or one that is only a part.
TEXT = "Größe 🙃 fox"
IDS = TOKENIZER.encode(TEXT).ids
EOS = TOKENIZER.token_to_id("<|im_end|>")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=frontend.url, timeout=10) as client:
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    # OpenAI's types forget that the first token of an echoed prompt has no log-probability.
    if "echo" not in body:
        (Completion if path == COMPLETIONS else ChatCompletion).model_validate(answer, strict=True)
    return answer


def stream(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = http.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    *parts, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
    for chunk in chunks:
        if path == CHAT:
            ChatCompletionChunk.model_validate(chunk, strict=True)
    return chunks


def joined(columns: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return {name: [entry for each in columns if each for entry in each[name]] for name in names}


def bytes_of(token: int) -> bytes:
    return Tokenizer(TOKENIZER, 640).token_bytes(token)


def written(token: int) -> str:
    """A token as the API writes it."""
    try:
        return bytes_of(token).decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in bytes_of(token))


# --- chats ----------------------------------------------------------------------------------------------------------


def chat_entries(ids: list[int], width: int) -> list[dict[str, Any]]:
    return [
        {
            "token": written(token),
            "logprob": logprob_of(token, 0).logprob,
            "bytes": list(bytes_of(token)),
            "top_logprobs": [
                {"token": written(token + i), "logprob": -i / 4, "bytes": list(bytes_of(token + i))}
                for i in range(width)
            ],
        }
        for token in ids
    ]


@pytest.mark.parametrize("width", [0, 3])
def test_a_chat_has_an_entry_for_each_token_whole_and_streamed(http: httpx.Client, width: int) -> None:
    body = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": width}
    answer = post(http, CHAT, **body, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["logprobs"] == {"content": chat_entries(choice["token_ids"], width), "refusal": None}
    said = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert said.decode() == f"<|im_start|>user\n{TEXT}<|im_end|>"
    chunks = stream(http, CHAT, **body)
    content = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert content == choice["logprobs"]["content"]


def test_tokens_whose_text_is_held_back_come_with_the_text(http: httpx.Client) -> None:
    """Half a character and what may be a stop string are held back."""
    body = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "stop": ["fox!"]}
    text, told = "", b""
    for chunk in stream(http, CHAT, **body):
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content", "")
        if choice["logprobs"]:
            told += b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
            # A chunk never has text whose tokens come later.
        assert told.replace(b"<|im_start|>", b"").startswith(text.encode())
    assert text.endswith(TEXT)


def test_tokens_past_a_stop_string_have_no_entries(http: httpx.Client) -> None:
    answer = post(http, COMPLETIONS, prompt=TEXT, stop=["ß"], logprobs=0, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["text"] == "Grö"
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) < len(IDS)


def test_logprobs_of_thoughts_and_calls_all_come(http: httpx.Client, tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    template = "{{ messages[0].content }}<|im_end|>{# </think> #}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    frontend = Frontend(tmp_path, tool_call_parser="hermes").start()
    try:
        content = '<think>\nHm 🙃.\n</think>\n\nSo: <tool_call>\n{"name": "f", "arguments": {"a": "ß"}}\n</tool_call>'
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        body = {"messages": [{"role": "user", "content": content}], "tools": tools, "logprobs": True}
        with httpx.Client(base_url=frontend.url, timeout=10) as own:
            (choice,) = post(own, CHAT, **body)["choices"]
            chunks = stream(own, CHAT, **body)
    finally:
        frontend.close()
    assert choice["message"]["tool_calls"]
    expected = chat_entries([*TOKENIZER.encode(content).ids, EOS], 0)
    assert choice["logprobs"]["content"] == expected
    found = [each["logprobs"]["content"] for chunk in chunks for each in chunk["choices"] if each["logprobs"]]
    assert [entry for part in found for entry in part] == expected
    assert len(found) > 5


def test_prompt_logprobs_are_vllms(http: httpx.Client) -> None:
    expected: list[Any] = [None]
    for token in IDS[1:]:
        at = {str(token): {"logprob": -token / 8, "rank": 1 + token, "decoded_token": written(token)}}
        at |= {str(token + 1): {"logprob": -0.25, "rank": 2, "decoded_token": written(token + 1)}}
        expected.append(at)
    (choice,) = post(http, COMPLETIONS, prompt=TEXT, prompt_logprobs=2, max_tokens=1)["choices"]
    assert choice["prompt_logprobs"] == expected
    assert choice["logprobs"] is None
    answer = post(http, CHAT, messages=[{"role": "user", "content": TEXT}], prompt_logprobs=0, return_token_ids=True)
    told = [list(at) for at in answer["prompt_logprobs"][1:]]
    assert told == [[str(token)] for token in answer["prompt_token_ids"][1:]]
    assert answer["choices"][0]["logprobs"] is None


# --- completions ----------------------------------------------------------------------------------------------------


def top(token: int, width: int) -> dict[str, float]:
    found = {written(token): -token / 8} | {written(token + i): -i / 4 for i in range(1, width)}
    return found


def text_columns(ids: list[int], width: int) -> dict[str, list[Any]]:
    offsets = [len(b"".join(map(bytes_of, ids[:i])).decode(errors="ignore")) for i in range(len(ids))]
    return {
        "text_offset": offsets,
        "token_logprobs": [-token / 8 for token in ids],
        "tokens": [written(token) for token in ids],
        "top_logprobs": [top(token, width) for token in ids],
    }


@pytest.mark.parametrize("width", [0, 3])
def test_a_completion_has_columns_whole_and_streamed(http: httpx.Client, width: int) -> None:
    body = {"prompt": TEXT, "logprobs": width, "max_tokens": 50}
    (choice,) = post(http, COMPLETIONS, **body)["choices"]
    expected = text_columns([*IDS, EOS], width)
    assert choice["logprobs"] == expected
    assert choice["text"] == TEXT
    assert choice["text"][choice["logprobs"]["text_offset"][-2] :] == TOKENIZER.decode(IDS[-1:])
    chunks = stream(http, COMPLETIONS, **body)
    assert joined([chunk["choices"][0]["logprobs"] for chunk in chunks]) == expected


@pytest.mark.parametrize("prompt", [TEXT, IDS], ids=["text", "ids"])
@pytest.mark.parametrize("streams", [False, True])
def test_an_echoed_prompt_comes_in_front(http: httpx.Client, prompt: Any, streams: bool) -> None:
    body = {"prompt": [prompt, "the"] if prompt == TEXT else [prompt, [5]], "echo": True, "logprobs": 1, "n": 2}
    body |= {"max_tokens": 3}
    texts, columns, reasons = [""] * 4, [[] for _ in range(4)], [""] * 4
    answers = stream(http, COMPLETIONS, **body) if streams else [post(http, COMPLETIONS, **body)]
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
            columns[choice["index"]].append(choice["logprobs"])
            reasons[choice["index"]] = choice["finish_reason"]
    expected = text_columns([*IDS, *IDS[:3]], 1)
    expected["token_logprobs"][0] = expected["top_logprobs"][0] = None
    assert texts[0] == texts[1] == TEXT + TOKENIZER.decode(IDS[:3])
    assert joined(columns[0]) == joined(columns[1]) == expected
    assert joined(columns[2])["tokens"][0] == written(5 if prompt == IDS else TOKENIZER.encode("the").ids[0])
    assert reasons[:2] == ["length", "length"]


@pytest.mark.parametrize("streams", [False, True])
def test_nothing_but_the_prompt_can_be_asked_for(http: httpx.Client, streams: bool) -> None:
    body = {"prompt": TEXT, "echo": True, "logprobs": 2, "max_tokens": 0, "return_token_ids": True}
    if streams:
        *chunks, last = stream(http, COMPLETIONS, **body, stream_options={"include_usage": True})
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        columns = joined([chunk["choices"][0]["logprobs"] for chunk in chunks])
        ids = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        reason, usage = chunks[-1]["choices"][0]["finish_reason"], last["usage"]
    else:
        answer = post(http, COMPLETIONS, **body)
        (choice,) = answer["choices"]
        text, columns, ids, usage = choice["text"], choice["logprobs"], choice["token_ids"], answer["usage"]
        reason = choice["finish_reason"]
    expected = text_columns(IDS, 2)
    expected["token_logprobs"][0] = expected["top_logprobs"][0] = None
    assert (text, columns, ids, reason) == (TEXT, expected, [], "length")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(IDS), 0, len(IDS))


def test_an_echo_without_logprobs_is_text_alone(http: httpx.Client) -> None:
    (choice,) = post(http, COMPLETIONS, prompt="the <|im_start|> fox", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("the <|im_start|> fox", None)
    cut = post(http, COMPLETIONS, prompt=TEXT, echo=True, max_tokens=0, truncate_prompt_tokens=2)["choices"][0]
    assert cut["text"] == TOKENIZER.decode(IDS[-2:])


def test_an_echo_and_prompt_logprobs_have_widths_of_their_own(http: httpx.Client) -> None:
    body = {"prompt": [5, 9], "echo": True, "max_tokens": 0}
    (choice,) = post(http, COMPLETIONS, **body, logprobs=1, prompt_logprobs=4)["choices"]
    assert len(choice["prompt_logprobs"][1]) == 4
    assert choice["logprobs"]["top_logprobs"] == [None, {written(9): -9 / 8}]
    (choice,) = post(http, COMPLETIONS, **body, logprobs=3, prompt_logprobs=0)["choices"]
    assert len(choice["prompt_logprobs"][1]) == 1
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3


def test_tokens_can_be_written_as_ids(http: httpx.Client) -> None:
    body = {"logprobs": 2, "return_tokens_as_token_ids": True}
    (choice,) = post(http, COMPLETIONS, prompt=[5, 9], **body)["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:9", f"token_id:{EOS}"]
    assert list(choice["logprobs"]["top_logprobs"][0]) == ["token_id:5", "token_id:6"]
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "return_tokens_as_token_ids": True}
    (entry, *_) = post(http, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert entry["token"] == f"token_id:{TOKENIZER.token_to_id('<|im_start|>')}"
    assert bytes(entry["bytes"]) == b"<|im_start|>"


def test_without_a_tokenizer_tokens_are_ids(make_frontend: Any, model_directory: Path) -> None:
    frontend = make_frontend(model_directory, skip_tokenizer_init=True).start()
    with httpx.Client(base_url=frontend.url, timeout=10) as http:
        body = {"prompt": [5, 9], "logprobs": 1, "echo": True, "max_tokens": 1, "prompt_logprobs": 0}
        (choice,) = post(http, COMPLETIONS, **body)["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:9", "token_id:5"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]
    assert choice["prompt_logprobs"][1]["9"]["decoded_token"] == "token_id:9"


# --- choices and counts ---------------------------------------------------------------------------------------------


def test_choices_of_a_stream_are_told_apart_by_their_index(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": TEXT}], "n": 3}
    texts, reasons, order = [""] * 3, [[] for _ in range(3)], []
    for chunk in stream(http, CHAT, **body):
        (choice,) = chunk["choices"]
        order.append(choice["index"])
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]].append(choice["finish_reason"])
    assert len(set(texts)) == 1
    assert texts[0].endswith(TEXT)
    assert all(each[-1] == "stop" and set(each[:-1]) == {None} for each in reasons)
    # They run side by side: none waits for another's end.
    assert order != sorted(order)


def test_usage_counts_all_choices_and_each_prompt_once(http: httpx.Client) -> None:
    body = {"prompt": [[5] * 20, [6, 7]], "n": 3, "max_tokens": 4, "ignore_eos": True}
    expected = {"prompt_tokens": 22, "completion_tokens": 24, "total_tokens": 46}
    usage = post(http, COMPLETIONS, **body)["usage"]
    assert usage == expected | {"prompt_tokens_details": {"cached_tokens": 16}}
    *_, last = stream(http, COMPLETIONS, **body, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], usage)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_can_count_as_it_goes(http: httpx.Client, frontend: Frontend, path: str) -> None:
    frontend.core.step_seconds = 0.02  # so that tokens are not merged
    body: dict[str, Any] = (
        {"prompt": [5, 6]} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(http, path, **body, n=2, max_tokens=5, ignore_eos=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 10
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks if chunk["usage"]} == {last["usage"]["prompt_tokens"]}
    assert len(counts) > 2


# --- tokens of vocabularies -----------------------------------------------------------------------------------------


def test_tokens_of_other_vocabularies_keep_their_space_and_bytes() -> None:
    words = {"<unk>": 0, "<0xC3>": 1, "<0x9F>": 2, "▁the": 3, "fox": 4, "▁": 5}
    backend = Backend(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend, 10)
    assert [tokenizer.token_bytes(token) for token in (1, 2, 3, 4, 5, 9)] == [
        b"\xc3",
        b"\x9f",
        b" the",
        b"fox",
        b" ",
        b"",
    ]
