"""The Python clients against the real engine: every form of request, leaving early, bad input, and engines that die."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from tokenizers import Tokenizer

from bundled import MODEL_DIR
from frontend import AsyncClient, Client, EngineUnavailableError, InvalidRequestError, SamplingParams
from protocol.messages import PROTOCOL_VERSION, FrontendMessage, Generate, Hello, TextPrompt, Welcome
from protocol.transport import MAX_MESSAGE_BYTES, Channel, open_socket
from tests.e2e.conftest import ROOT, RunningEngine
from tests.support.requests import WEATHER, ask, is_idle, wait_until

Start = Callable[..., RunningEngine]

STORY = "Once upon a time"
CAPITAL = "The capital of Italy is"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
# As many tokens as the context holds: about ten seconds of work, which no test waits for.
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@pytest.fixture
def idle_after(client: Client) -> Iterator[None]:
    """The test leaves no request running and no block held."""
    yield
    wait_until(lambda: is_idle(client.stats()), "the engine is idle and all its blocks are free")


pytestmark = pytest.mark.usefixtures("idle_after")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def wait_until_running(client: Client, count: int) -> None:
    wait_until(lambda: client.stats().num_running == count, f"{count} requests are running")


# --- answers --------------------------------------------------------------------------------------------------------


def test_every_form_of_a_prompt_gives_the_same_answer(client: Client, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, STORY)
    (reference,) = client.generate(STORY, GREEDY, use_tqdm=False)
    assert reference.prompt == STORY
    assert reference.prompt_token_ids == ids
    assert len(reference.outputs[0].token_ids) == 12
    assert tokenizer.decode(reference.outputs[0].token_ids) == reference.outputs[0].text
    forms: list[Any] = [[STORY], ids, tuple(ids), np.array(ids), [ids], {"prompt": STORY}, {"prompt_token_ids": ids}]
    for form in forms:
        (result,) = client.generate(form, GREEDY, use_tqdm=False)
        assert (result.outputs, result.prompt_token_ids) == (reference.outputs, ids), form
    results = client.generate([STORY, ids, {"prompt": STORY}], GREEDY, use_tqdm=False)
    assert [result.outputs for result in results] == [reference.outputs] * 3
    assert [result.prompt for result in results] == [STORY, None, STORY]
    assert client.generate([], GREEDY, use_tqdm=False) == []


def test_results_and_parameters_keep_the_order_of_the_prompts(client: Client) -> None:
    # The longest first, so that the order of finishing is another one.
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in range(20, 0, -1)]
    prompts = [f"{number}, {number + 1}," for number in range(20)]
    results = client.generate(prompts, params, use_tqdm=False)
    assert [result.prompt for result in results] == prompts
    assert [len(result.outputs[0].token_ids) for result in results] == list(range(20, 0, -1))
    assert {result.outputs[0].finish_reason for result in results} == {"length"}
    for result in (results[0], results[7]):
        (alone,) = client.generate(result.prompt, SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
        assert result.outputs[0].token_ids[:5] == alone.outputs[0].token_ids


def test_the_default_is_vllms_sixteen_tokens(client: Client) -> None:
    (result,) = client.generate(STORY, use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 16
    assert result.outputs[0].finish_reason == "length"


def test_n_answers_are_drawn_with_seeds_that_follow_from_the_first(client: Client) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=4)
    (result, other) = client.generate([STORY, CAPITAL], params, use_tqdm=False)
    assert [answer.index for answer in result.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in result.outputs}) == 4
    (single,) = client.generate(STORY, SamplingParams(temperature=1.0, seed=5, max_tokens=12), use_tqdm=False)
    assert single.outputs == result.outputs[:1]
    assert client.generate(CAPITAL, params, use_tqdm=False)[0].outputs == other.outputs
    streamed: dict[int, list[int]] = {}
    for chunk in client.stream(STORY, params):
        streamed.setdefault(chunk.index, []).extend(chunk.token_ids)
    assert streamed == {answer.index: answer.token_ids for answer in result.outputs}


def test_log_probabilities_come_with_the_answer_and_the_prompt(client: Client) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, prompt_logprobs=1)
    (result,) = client.generate(CAPITAL, params, use_tqdm=False)
    (answer,) = result.outputs
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        # The most likely token is the one that was taken, and is not named twice.
        assert next(iter(found)) == token
        assert [each.rank for each in found.values()] == [1, 2]
        assert 0 >= found[token].logprob == max(each.logprob for each in found.values())
    assert answer.cumulative_logprob == sum(
        found[token].logprob for token, found in zip(answer.token_ids, answer.logprobs)
    )
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    assert result.prompt_logprobs[0] is None
    for token, found in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
        assert (found[token].rank == 1) == (len(found) == 1)
    # What follows the prompt is as likely when it is part of one.
    (longer,) = client.generate(
        {"prompt_token_ids": [*result.prompt_token_ids, *answer.token_ids]}, params, use_tqdm=False
    )
    for token, found, again in zip(
        answer.token_ids, answer.logprobs, longer.prompt_logprobs[len(result.prompt_token_ids) :], strict=True
    ):
        assert again[token].logprob == pytest.approx(found[token].logprob, abs=1e-4)
    chunks = list(client.stream(CAPITAL, params))
    assert chunks[0].prompt_logprobs == result.prompt_logprobs
    assert [found for chunk in chunks for found in chunk.logprobs] == answer.logprobs


def test_bad_words_allowed_tokens_and_bias_change_the_answer(client: Client, tokenizer: Tokenizer) -> None:
    question, options = ask("What is the capital of France?"), {"temperature": 0.0, "max_tokens": 24}

    def answer(**edits: Any) -> str:
        return client.chat(question, SamplingParams(**options, **edits), use_tqdm=False)[0].outputs[0].text

    assert "Paris" in answer()
    assert "Paris" not in answer(bad_words=["Paris"])
    digits = ids_of(tokenizer, "7")
    assert set(answer(allowed_token_ids=digits)) == {"7"}
    assert set(answer(logit_bias={digits[0]: 100})) == {"7"}
    assert len(set(answer(repetition_penalty=20.0, min_tokens=24).split())) > 5


def test_a_prompt_is_cut_to_its_last_tokens(client: Client, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, STORY * 2)
    for prompt in (STORY * 2, ids):
        (result,) = client.generate(prompt, SamplingParams(max_tokens=2, truncate_prompt_tokens=3), use_tqdm=False)
        assert result.prompt_token_ids == ids[-3:]
    too_long = [5] * (client.engine.max_model_len + 50)
    (result,) = client.generate(too_long, SamplingParams(truncate_prompt_tokens=-1), use_tqdm=False)
    assert len(result.prompt_token_ids) == client.engine.max_model_len - 1
    assert len(result.outputs[0].token_ids) == 1


def test_several_conversations_are_answered_in_order(client: Client) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    france, japan = ask("What is the capital of France?"), ask("What is the capital of Japan?")
    results = client.chat([france, japan], params, use_tqdm=False)
    assert "Paris" in results[0].outputs[0].text
    assert "Tokyo" in results[1].outputs[0].text
    assert [result.outputs[0].finish_reason for result in results] == ["stop", "stop"]
    (single,) = client.chat(france, params, use_tqdm=False)
    assert single.outputs == results[0].outputs
    assert single.prompt is None
    assert single.prompt_token_ids == results[0].prompt_token_ids


def test_tools_and_template_options_reach_the_template(client: Client, tokenizer: Tokenizer) -> None:
    params, question = SamplingParams(temperature=0.0, max_tokens=64), ask("What is the weather in Paris?")
    (plain,) = client.chat(question, params, use_tqdm=False)
    (called,) = client.chat(question, params, use_tqdm=False, tools=[WEATHER])
    assert "<tool_call>" not in plain.outputs[0].text
    assert '"name": "get_weather"' in called.outputs[0].text
    assert "get_weather" in tokenizer.decode(called.prompt_token_ids)
    (hasty,) = client.chat(
        ask("What is 3 plus 4?"), params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False}
    )
    assert tokenizer.decode(hasty.prompt_token_ids).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("prompt", [STORY, ask("Say hello in Japanese."), ask("What is 3 plus 4?")], ids=str)
def test_a_stream_adds_up_to_the_whole_answer(client: Client, prompt: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=48)
    call = client.generate if isinstance(prompt, str) else client.chat
    (whole,) = call(prompt, params, use_tqdm=False)
    chunks = list(client.stream(prompt, params))
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == whole.outputs[0].text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.outputs[0].token_ids
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
    assert chunks[-1].finish_reason == whole.outputs[0].finish_reason
    assert not any("\ufffd" in chunk.text for chunk in chunks)


def test_each_end_has_its_reason(client: Client) -> None:
    (whole,) = client.generate(CAPITAL, SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False)
    text, token_ids = whole.outputs[0].text, whole.outputs[0].token_ids
    assert (whole.outputs[0].finish_reason, whole.outputs[0].stop_reason) == ("stop", None)

    token = token_ids[3]
    ends = [
        ({"max_tokens": 3}, "length", None),
        ({"stop_token_ids": [token]}, "stop", token),
        ({"stop": [text[5:9]]}, "stop", text[5:9]),
        ({"ignore_eos": True, "max_tokens": len(token_ids) + 4}, "length", None),
    ]
    for options, reason, stop_reason in ends:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 200, **options})
        (result,) = client.generate(CAPITAL, params, use_tqdm=False)
        answer = result.outputs[0]
        assert (answer.finish_reason, answer.stop_reason) == (reason, stop_reason), options
        common = min(len(answer.token_ids), len(token_ids))
        assert answer.token_ids[:common] == token_ids[:common], options
        (*_, last) = client.stream(CAPITAL, params)
        assert (last.finish_reason, last.stop_reason) == (reason, stop_reason), options
        if reason == "stop":
            assert text.startswith(answer.text)
            assert str(stop_reason) not in answer.text


def test_without_detokenize_there_are_ids_and_no_text(client: Client) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False)
    (silent,) = client.generate(STORY, params, use_tqdm=False)
    (spoken,) = client.generate(STORY, GREEDY, use_tqdm=False)
    assert silent.outputs[0].text == ""
    assert silent.outputs[0].token_ids == spoken.outputs[0].token_ids
    assert "".join(chunk.text for chunk in client.stream(STORY, params)) == ""


def test_a_repeated_prompt_is_cached_and_a_salt_sets_it_apart(client: Client, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "A prompt that no other test sends, once more with feeling. " * 12)
    block_size = client.engine.block_size
    whole_blocks = (len(ids) - 1) // block_size * block_size
    assert whole_blocks > 4 * block_size
    params = SamplingParams(temperature=0.0, max_tokens=4)

    def ask_again(salt: str | None = None) -> tuple[int, list[int]]:
        (result,) = client.generate(ids, params, use_tqdm=False, cache_salt=salt)
        return result.num_cached_tokens, result.outputs[0].token_ids

    cached, tokens = ask_again()
    assert cached == 0
    for salt, expected in [(None, whole_blocks), ("one", 0), ("one", whole_blocks), ("two", 0), (None, whole_blocks)]:
        assert ask_again(salt) == (expected, tokens), salt


def test_times_are_those_of_the_tokens(client: Client) -> None:
    before = time.perf_counter()
    (result,) = client.generate(STORY, GREEDY, use_tqdm=False)
    metrics = result.metrics
    assert before <= metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time <= time.perf_counter()
    assert len(metrics.token_times) == len(result.outputs[0].token_ids)


# --- leaving early --------------------------------------------------------------------------------------------------


def test_leaving_a_stream_aborts_its_request(client: Client) -> None:
    aborted = client.stats().aborted_requests
    for number, _ in enumerate(client.stream(STORY, ENDLESS)):
        if number == 3:
            break
    wait_until(lambda: client.stats().aborted_requests == aborted + 1, "the request was aborted")
    assert is_idle(client.stats())


def test_closing_the_client_in_the_middle_of_a_stream_ends_it(engine: RunningEngine) -> None:
    leaving = Client(engine.address)
    stream = leaving.stream(STORY, ENDLESS)
    next(stream)
    leaving.close()
    leaving.close()
    with pytest.raises(EngineUnavailableError, match="the client was closed"):
        next(stream)
    for call in (leaving.stats, lambda: leaving.generate(STORY), lambda: next(leaving.stream(STORY))):
        with pytest.raises(EngineUnavailableError, match="the client was closed"):
            call()


def test_closing_the_client_ends_who_waits_in_another_thread(engine: RunningEngine, client: Client) -> None:
    leaving = Client(engine.address)
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(leaving.generate, [STORY] * 3, ENDLESS, use_tqdm=False) for _ in range(2)]
        wait_until_running(client, 6)
        leaving.close()
        for future in waiting:
            with pytest.raises(EngineUnavailableError, match="the client was closed"):
                future.result(5)


def test_a_stream_that_the_collector_finds_in_the_clients_own_thread_is_no_deadlock(client: Client) -> None:
    stream = client.stream(STORY, ENDLESS)
    next(stream)
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    del stream, cycle
    client._loop.call_soon_threadsafe(gc.collect)
    wait_until(lambda: is_idle(client.stats()), "the forgotten stream was aborted")


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
def test_ctrl_c_takes_the_requests_along(client: Client, streaming: bool) -> None:
    main = threading.get_ident()

    def interrupt() -> None:
        wait_until_running(client, 1 if streaming else 3)
        signal.pthread_kill(main, signal.SIGINT)

    def run() -> None:
        if streaming:
            for _ in client.stream(STORY, ENDLESS):
                pass
        else:
            client.generate([STORY] * 3, ENDLESS, use_tqdm=False)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run()
    thread.join()
    wait_until(lambda: is_idle(client.stats()), "the interrupted requests were aborted", seconds=2)
    assert client.generate(STORY, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_threads_share_a_client_without_mixing_answers(client: Client) -> None:
    prompts = [f"The capital of {country} is" for country in ("Italy", "France", "Japan", "Egypt", "Cuba", "Spain")]
    expected = client.generate(prompts, GREEDY, use_tqdm=False)

    def work(index: int) -> None:
        for _ in range(2):
            (result,) = client.generate(prompts[index], GREEDY, use_tqdm=False)
            assert result.outputs == expected[index].outputs
            text = "".join(chunk.text for chunk in client.stream(prompts[index], GREEDY))
            assert text == expected[index].outputs[0].text

    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(work, range(len(prompts))))


async def test_tasks_share_an_async_client_and_a_cancelled_one_is_aborted(engine: RunningEngine) -> None:
    async with AsyncClient(engine.address) as client:
        aborted = (await client.stats()).aborted_requests

        async def read(number: int) -> list[int]:
            async with aclosing(client.stream(f"{number}, {number + 1},", GREEDY)) as stream:
                return [token async for chunk in stream for token in chunk.token_ids]

        endless = asyncio.create_task(client.generate([STORY] * 2, ENDLESS, use_tqdm=False))
        streamed = await asyncio.gather(*(read(number) for number in range(16)))
        whole = await client.generate([f"{number}, {number + 1}," for number in range(16)], GREEDY, use_tqdm=False)
        assert streamed == [result.outputs[0].token_ids for result in whole]
        assert (await client.stats()).num_running == 2
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        # The statistics come behind the abort on the same way.
        stats = await client.stats()
        assert is_idle(stats)
        assert stats.aborted_requests == aborted + 2

        # Leaving a loop without closing the generator is enough too.
        async for _ in client.stream(STORY, ENDLESS):
            break
        async with asyncio.timeout(5):
            while not is_idle(await client.stats()):
                await asyncio.sleep(0.01)


# --- clients that die -----------------------------------------------------------------------------------------------


def test_a_client_that_falls_silent_has_its_requests_aborted(engine: RunningEngine, client: Client) -> None:
    aborted = client.stats().aborted_requests
    context = zmq.Context()
    silent = Channel(open_socket(context, zmq.DEALER, connect=engine.address), FrontendMessage)
    silent.send(Hello(PROTOCOL_VERSION, heartbeat_s=0.2))
    received = silent.receive(10_000)
    assert received is not None
    assert isinstance(received[1], Welcome)
    # Without a stream nothing is sent to it that would show that it is gone.
    silent.send(Generate(1, TextPrompt(STORY), ENDLESS, stream=False))
    wait_until_running(client, 1)
    wait_until(lambda: client.stats().aborted_requests == aborted + 1, "the silent client's request was aborted", 5)
    silent.close()
    context.term()


def test_a_client_process_that_is_killed_in_a_stream_has_its_request_aborted(
    engine: RunningEngine, client: Client
) -> None:
    code = (
        "import sys; from frontend import Client, SamplingParams\n"
        "for chunk in Client(sys.argv[1]).stream('Once', SamplingParams(max_tokens=None, ignore_eos=True)): print(1)"
    )
    aborted = client.stats().aborted_requests
    command = [sys.executable, "-u", "-c", code, engine.address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
    wait_until(lambda: client.stats().aborted_requests == aborted + 1, "the dead client's request was aborted", 5)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ([], "prompt", "empty"),
        ("", "prompt", "empty"),
        ([1, 99_999], "prompt", "99999"),
        ([-1], "prompt", "-1"),
        ([1] * 2048, "prompt", "2048"),
        ("word " * 3000, "prompt", "2048"),
        ("half of a pair: \ud83d", None, "surrogates"),
        (None, "prompt", "None"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_bad_prompt_in_a_batch_raises_and_leaves_nothing_running(
    client: Client, prompt: Any, param: str | None, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        client.generate([STORY, prompt, CAPITAL], ENDLESS, use_tqdm=False)
    assert caught.value.param == param
    wait_until(lambda: is_idle(client.stats()), "the others were aborted", seconds=2)
    with pytest.raises(InvalidRequestError, match=message):
        next(client.stream(prompt, GREEDY))


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"messages": [{"role": "user"}, {"content": "no role"}]}, "messages"),
        ({"messages": [[{"role": "user", "content": "a"}], []]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": ask("word " * 3000)}, "messages"),
        ({"messages": ask("a"), "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": ask("a"), "cache_salt": ""}, "cache_salt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_conversation_raises_and_names_its_field(client: Client, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.chat(**arguments, use_tqdm=False)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 2.0),
        ("max_tokens", 0),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
    ],
)
def test_bad_sampling_parameters_are_refused_where_they_are_made(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_a_prompt_too_large_for_a_message_is_refused_and_the_client_goes_on(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=f"of which {MAX_MESSAGE_BYTES} are allowed"):
        client.generate("a" * MAX_MESSAGE_BYTES, GREEDY, use_tqdm=False)
    assert client.generate(STORY, GREEDY, use_tqdm=False)


# --- engines that die -----------------------------------------------------------------------------------------------


VICTIMS = ["frontend.server", "launcher"]


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningEngine]]:
    """An engine for each process that will be killed, started side by side because starting is what takes long."""
    engines = {}
    for victim in VICTIMS:
        directory = tmp_path_factory.mktemp("doomed")
        directory.chmod(0o700)
        engines[victim] = RunningEngine(directory, "--no-http", "--num-threads", "1")
    yield engines
    for engine in engines.values():
        engine.stop_at_any_cost()


@pytest.mark.parametrize("victim", VICTIMS)
def test_when_the_engine_dies_whoever_waits_is_told_within_seconds(
    doomed: dict[str, RunningEngine], victim: str
) -> None:
    engine = doomed[victim].wait_until_ready()
    client = Client(engine.address)
    with ThreadPoolExecutor() as threads:
        stream = client.stream(STORY, ENDLESS)
        next(stream)
        whole = threads.submit(client.generate, [STORY, CAPITAL], ENDLESS, use_tqdm=False)
        waiting = [whole, threads.submit(list, stream)]
        wait_until_running(client, 3)
        pid = engine.process.pid if victim == "launcher" else engine.child(victim).pid
        os.kill(pid, signal.SIGKILL)
        for future in waiting:
            with pytest.raises(EngineUnavailableError):
                future.result(4)
    start = time.monotonic()
    with pytest.raises(EngineUnavailableError):
        client.generate(STORY, GREEDY, use_tqdm=False)
    assert time.monotonic() - start < 1
    client.close()
    engine.wait()
    with pytest.raises(EngineUnavailableError, match="no engine is running"):
        Client(engine.address)


def test_stopping_the_engine_lets_short_requests_finish_and_ends_long_ones(start_engine: Start, tmp_path: Path) -> None:
    engine = start_engine("--no-http", "--num-threads", "1", "--shutdown-timeout", "1").wait_until_ready()
    client = Client(engine.address)
    short = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with ThreadPoolExecutor() as threads:
        stream = client.stream(STORY, ENDLESS)
        next(stream)
        finishing = threads.submit(client.generate, STORY, short, use_tqdm=False)
        long = [threads.submit(client.generate, STORY, ENDLESS, use_tqdm=False), threads.submit(list, stream)]
        wait_until_running(client, 3)
        engine.process.send_signal(signal.SIGTERM)
        (result,) = finishing.result(5)
        assert result.outputs[0].finish_reason == "length"
        assert len(result.outputs[0].token_ids) == 60
        (aborted,), chunks = long[0].result(5), long[1].result(5)
        assert aborted.outputs[0].finish_reason == "abort"
        assert 0 < len(aborted.outputs[0].token_ids) < 2000
        assert chunks[-1].finish_reason == "abort"
    with pytest.raises(EngineUnavailableError):
        client.generate(STORY, GREEDY, use_tqdm=False)
    assert engine.wait() == 0
    client.close()


def test_a_stopping_engine_takes_no_more_requests_or_clients(start_engine: Start) -> None:
    engine = start_engine("--no-http", "--num-threads", "1", "--shutdown-timeout", "30").wait_until_ready()
    with Client(engine.address) as client:
        stream = client.stream(STORY, ENDLESS)
        next(stream)
        engine.process.send_signal(signal.SIGTERM)

        def refuses() -> bool:
            try:
                client.generate(STORY, SamplingParams(max_tokens=1), use_tqdm=False)
            except EngineUnavailableError as error:
                return "stopping" in str(error)
            return False

        wait_until(refuses, "new requests are refused")
        with pytest.raises(EngineUnavailableError, match="stopping"):
            Client(engine.address)
        assert next(stream).token_ids
        stream.close()
        # The last request has ended: there is nothing to wait for.
        assert engine.wait(5) == 0
