"""The frontend process as Python clients meet it: handshake, streams, errors, heartbeats, start and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    ChatPrompt,
    Failed,
    Finished,
    Generate,
    GetStats,
    Heartbeat,
    Hello,
    Refused,
    Started,
    Stats,
    TextPrompt,
    TokenPrompt,
    Welcome,
    pack_ints,
    unpack_ints,
)
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams
from tests.frontend.conftest import MAX_MODEL_LEN, MODEL_NAME, VOCAB_SIZE, Frontend, make_tokenizer, wait_until
from tests.frontend.ipc_client import ENDLESS, Client

TOKENIZER = make_tokenizer()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


# --- handshake ------------------------------------------------------------------------------------------------------


def test_welcome_says_what_a_client_must_know(client: Client) -> None:
    engine = client.welcome.engine
    assert (engine.model, engine.max_model_len, engine.vocab_size) == (MODEL_NAME, MAX_MODEL_LEN, VOCAB_SIZE)
    assert engine.has_tokenizer
    assert client.welcome.protocol_version == PROTOCOL_VERSION


def test_another_protocol_version_is_refused_in_words(connect: Callable[..., Client]) -> None:
    client = connect(hello=False)
    client.send(Hello(PROTOCOL_VERSION + 1))
    reason = client.receive(Refused).reason
    assert f"version {PROTOCOL_VERSION}" in reason
    assert f"version {PROTOCOL_VERSION + 1}" in reason


@pytest.mark.parametrize("heartbeat_s", [0.0, -1.0, float("nan"), 1e9])
def test_impossible_heartbeats_are_refused(connect: Callable[..., Client], heartbeat_s: float) -> None:
    client = connect(hello=False)
    client.send(Hello(PROTOCOL_VERSION, heartbeat_s))
    assert "heartbeat_s" in client.receive(Refused).reason


def test_a_second_hello_is_welcomed_and_disturbs_nothing(client: Client) -> None:
    client.generate(1, "the fox", SamplingParams(max_tokens=50))
    client.send(Hello(PROTOCOL_VERSION, 60.0))
    client.gather(1)
    assert any(isinstance(message, Welcome) for message in client.others) or client.receive(Welcome)
    assert client.texts[1] == "the fox"


@pytest.mark.parametrize("message", [Generate(1, TextPrompt("a"), ENDLESS), Heartbeat(), Abort([1]), GetStats(1)])
def test_a_client_that_has_not_said_hello_is_told_so(connect: Callable[..., Client], message: msgspec.Struct) -> None:
    client = connect(hello=False)
    client.send(message)
    assert "send Hello first" in client.receive(Refused).reason


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x91\xa5Hello"], [b"a", b"b"], [b"\x92\xa3Foo\x01"]])
def test_bytes_that_are_no_message_are_refused_and_stop_nothing(client: Client, frames: list[bytes]) -> None:
    client.channel.socket.send_multipart(frames)
    assert "not understood" in client.receive(Refused).reason
    client.generate(1, "fox", SamplingParams(max_tokens=50))
    client.gather(1)
    assert client.texts[1] == "fox"


def test_sampling_parameters_that_do_not_exist_are_refused(client: Client) -> None:
    good = msgspec.msgpack.encode(Generate(1, TextPrompt("a"), SamplingParams(temperature=0.25)))
    bad = good.replace(msgspec.msgpack.encode(0.25), msgspec.msgpack.encode(-3.5))
    client.channel.socket.send(bad)
    assert "temperature" in client.receive(Refused).reason


# --- generating -----------------------------------------------------------------------------------------------------


def test_a_text_is_started_streamed_and_finished(frontend: Frontend, client: Client) -> None:
    ids = TOKENIZER.encode("Größe 日本語 🙂").ids
    client.generate(5, "Größe 日本語 🙂", SamplingParams(max_tokens=100))
    started = client.receive(Started)
    assert started.request_id == 5
    assert unpack_ints(started.prompt_token_ids).tolist() == ids
    client.gather(5)
    assert client.texts[5] == "Größe 日本語 🙂"
    assert client.tokens[5] == [*ids, frontend.eos]
    assert client.finished[5] == Finished(5, "stop", None, (len(ids) - 1) // 16 * 16)


def test_token_ids_in_and_out_without_text(client: Client) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False)
    client.send(Generate(1, TokenPrompt(pack_ints([3, 1, 2])), params))
    client.gather(1)
    assert client.tokens[1] == [3, 1, 2, 3, 1, 2]
    assert client.texts == {}
    assert client.others == []


def test_a_conversation_goes_through_the_chat_template(client: Client) -> None:
    prompt = ChatPrompt([{"role": "user", "content": "hi"}], template_options={"add_generation_prompt": False})
    client.send(Generate(1, prompt, SamplingParams(max_tokens=100, skip_special_tokens=False)))
    started = client.receive(Started)
    rendered = "<|im_start|>user\nhi<|im_end|>\n"
    assert unpack_ints(started.prompt_token_ids).tolist() == TOKENIZER.encode(rendered).ids


def test_without_stream_all_comes_in_one_message(client: Client) -> None:
    client.generate(1, "the quick brown fox", SamplingParams(max_tokens=100), stream=False)
    client.receive(Started)
    client.gather(1)
    assert client.num_outputs == 1
    assert client.texts[1] == "the quick brown fox"
    assert client.tokens[1][:-1] == TOKENIZER.encode("the quick brown fox").ids


def test_a_step_is_one_message_for_all_requests_of_a_client(
    frontend: Frontend, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    permits = threading.Semaphore(0)
    monkeypatch.setattr(frontend.core, "permits", permits)  # of a core that other tests use too
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for request_id in range(50):
        client.generate(request_id, "the fox", params)
    wait_until(lambda: frontend.core.num_running == 50)
    for num_steps in range(1, 21):
        # Each step when the one before has been passed on, as several that come together go together.
        permits.release()
        while client.num_outputs < num_steps:
            client.gather_one()
        assert {len(tokens) for tokens in client.tokens.values()} == {num_steps}
    client.gather(*range(50))
    assert client.num_outputs == 20
    assert all(len(tokens) == 20 for tokens in client.tokens.values())


def test_clients_do_not_see_each_other(connect: Callable[..., Client]) -> None:
    one, two = connect(), connect()
    one.generate(1, "one fox", SamplingParams(max_tokens=50))
    two.generate(1, "two dogs", SamplingParams(max_tokens=50))
    one.gather(1)
    two.gather(1)
    assert (one.texts[1], two.texts[1]) == ("one fox", "two dogs")


def test_a_stop_string_ends_the_request_in_the_core_too(frontend: Frontend, client: Client) -> None:
    frontend.core.step_seconds = 0.002
    client.generate(1, "quick brown fox", SamplingParams(max_tokens=400, stop=("own",), ignore_eos=True))
    client.gather(1)
    assert client.texts[1] == "quick br"
    assert client.finished[1] == Finished(1, "stop", "own", 0)
    wait_until(lambda: len(frontend.core.aborted) == 1 and frontend.core.num_running == 0)


def test_max_tokens_beyond_the_context_ends_there(frontend: Frontend, client: Client) -> None:
    client.send(Generate(1, TokenPrompt(pack_ints([1, 2])), SamplingParams(max_tokens=10**6, ignore_eos=True)))
    client.gather(1)
    assert len(client.tokens[1]) == MAX_MODEL_LEN - 2
    assert client.finished[1].reason == "length"
    assert frontend.core.added[0].params.max_tokens == MAX_MODEL_LEN - 2


def test_priority_and_salt_reach_the_core(frontend: Frontend, client: Client) -> None:
    client.generate(1, "fox", SamplingParams(max_tokens=1), priority=-7, cache_salt="tenant")
    client.gather(1)
    assert (frontend.core.added[0].priority, frontend.core.added[0].cache_salt) == (-7, "tenant")


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (TextPrompt(""), "prompt", "empty"),
        (TokenPrompt(pack_ints([1, VOCAB_SIZE])), "prompt", f"holds {VOCAB_SIZE} at position 1"),
        (TokenPrompt(pack_ints([1] * MAX_MODEL_LEN)), "prompt", "no room"),
        (TextPrompt("word " * 10_000), "prompt", "no room"),
        (ChatPrompt([{"role": "user", "content": 1}]), "messages", "messages[0].content"),
        (ChatPrompt([{"role": "user", "content": b"\xff"}]), "messages", "messages[0].content"),
    ],
)
def test_bad_prompts_fail_by_field(client: Client, prompt: Any, param: str, message: str) -> None:
    client.send(Generate(9, prompt, ENDLESS))
    failed = client.receive(Failed)
    assert (failed.request_id, failed.kind, failed.param) == (9, "invalid_request", param)
    assert message in failed.message


def test_an_error_that_only_a_bug_can_cause_is_an_answer_too(client: Client) -> None:
    # JSON knows no bytes, and nobody has looked for some.
    wanted = StructuredOutputsParams(json={"const": b"fox"})
    client.generate(4, "fox", SamplingParams(max_tokens=5, structured_outputs=wanted))
    assert client.receive(Failed) == Failed(4, "failed", "internal error: TypeError")
    client.generate(4, "fox", SamplingParams(max_tokens=50))
    client.gather(4)
    assert client.texts[4] == "fox"


def test_an_id_that_is_running_is_refused_and_the_running_one_goes_on(frontend: Frontend, client: Client) -> None:
    frontend.core.may_step.clear()
    client.generate(1, "fox", SamplingParams(max_tokens=50))
    client.receive(Started)
    client.generate(1, "dog")
    assert "request_id 1 is running already" in client.receive(Refused).reason
    frontend.core.may_step.set()
    client.gather(1)
    assert client.texts[1] == "fox"


def test_ids_beyond_64_bits_are_refused(client: Client) -> None:
    client.generate(2**64 - 1, "fox")
    assert "request_id" in client.receive(Refused).reason


def test_failures_of_the_core_reach_the_client_after_what_came_before(frontend: Frontend, client: Client) -> None:
    frontend.core.failure = Failed(0, "failed", "the logits were not numbers")
    frontend.core.fail_after = 2
    client.generate(3, "the fox trots", ENDLESS)
    client.receive(Started)
    while not client.others:
        client.gather_one()
    assert client.others == [Failed(3, "failed", "the logits were not numbers", None)]
    assert len(client.tokens[3]) == 2


def test_statistics_come_from_the_core(frontend: Frontend, client: Client) -> None:
    frontend.core.may_step.clear()
    client.generate(1, "fox")
    client.receive(Started)
    client.send(GetStats(77))
    stats = client.receive(Stats)
    assert (stats.query_id, stats.num_running) == (77, 1)
    client.send(Abort([1]))


# --- leaving --------------------------------------------------------------------------------------------------------


def test_abort_ends_a_request_and_is_answered(frontend: Frontend, client: Client) -> None:
    frontend.core.step_seconds = 0.002
    client.generate(1, "the fox")
    client.generate(2, "the dog", SamplingParams(max_tokens=60, ignore_eos=True))
    while not client.tokens.get(1):
        client.gather_one()
    client.send(Abort([1, 12345]))
    client.gather(1, 2)
    assert client.finished[1].reason == "abort"
    assert client.finished[2].reason == "length"
    first, second = frontend.core.added[-2:]
    wait_until(lambda: first.request_id in frontend.core.aborted)
    assert second.request_id not in frontend.core.aborted


def test_a_long_prompt_can_be_aborted_while_it_is_encoded(client: Client) -> None:
    client.generate(1, "the quick brown fox " * 100_000)
    client.send(Abort([1]))
    client.gather(1)
    assert client.finished[1].reason == "abort"
    assert client.others == []


def test_the_id_of_an_aborted_prompt_can_be_used_again(frontend: Frontend, client: Client) -> None:
    long, fits = "the quick brown fox " * 100_000, SamplingParams(max_tokens=2)
    # On a busy machine the first may be refused before it can be aborted; then once more.
    for _ in range(20):
        for message in (Generate(1, TextPrompt(long), fits), Abort([1]), Generate(1, TextPrompt(long), fits)):
            client.send(message)
        client.others.clear()
        while len(client.finished) + len(client.others) < 2:
            client.gather_one()
        if client.finished:
            break
    assert client.finished[1].reason == "abort"
    assert [other.kind for other in client.others] == ["invalid_request"]
    client.generate(2, "the fox", fits)
    client.gather(2)
    assert len(frontend.core.added) == 1


def test_a_client_that_closes_has_its_requests_aborted(frontend: Frontend) -> None:
    frontend.core.step_seconds = 0.01
    client = Client(frontend.config.address)
    client.generate(1, "the fox")
    client.receive(Started)
    client.close()
    wait_until(lambda: len(frontend.core.aborted) == 1, 5)


def test_a_client_that_falls_silent_has_its_requests_aborted(
    frontend: Frontend, connect: Callable[..., Client]
) -> None:
    frontend.core.may_step.clear()
    silent, alive = connect(heartbeat_s=0.2), connect(heartbeat_s=0.2)
    silent.generate(1, "the fox")
    alive.generate(1, "the dog", SamplingParams(max_tokens=3, ignore_eos=True))
    silent.receive(Started)
    alive.receive(Started)
    deadline = time.monotonic() + 5
    while not frontend.core.aborted and time.monotonic() < deadline:
        alive.send(Heartbeat())
        time.sleep(0.05)
    assert len(frontend.core.aborted) == 1
    frontend.core.may_step.set()
    alive.gather(1)
    assert alive.finished[1].reason == "length"
    silent.generate(2, "back again")
    assert "send Hello first" in silent.receive(Refused).reason
