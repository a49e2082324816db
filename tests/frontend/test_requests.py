"""The table of running requests against a core on a real socket: ids, text, stop strings, ends, aborts, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from frontend.admission import Admission, AdmissionLimits
from frontend.collector import Collector, Output
from frontend.metrics import RequestMetrics
from frontend.requests import RequestTable, RunningRequest
from frontend.service import Service
from frontend.tokenizer import Tokenizer
from protocol.errors import EngineUnavailableError, InvalidRequestError
from protocol.launcher_messages import EngineFailed, ProcessLost
from protocol.messages import (
    AddRequest,
    ChatPrompt,
    Failed,
    Finished,
    StepOutputs,
    TextPrompt,
    TokenPrompt,
    pack_ints,
    unpack_ints,
)
from protocol.sampling import SamplingParams
from tests.frontend.conftest import MAX_MODEL_LEN, VOCAB_SIZE, make_config, make_core
from tests.frontend.fake_core import FakeCore, logprob_of

ENDLESS = SamplingParams(max_tokens=100, ignore_eos=True)


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, list[str]] = {}
        self.finished: dict[int, Finished] = {}
        self.failed: dict[int, Failed] = {}
        self.flushes = 0
        self._changed = asyncio.Event()

    def add(self, request: RunningRequest, token_id: int, text: str) -> None:
        self.tokens.setdefault(request.tag, []).append(token_id)
        self.texts.setdefault(request.tag, []).append(text)

    def finish(self, request: RunningRequest, text: str, finished: Finished) -> None:
        self.texts.setdefault(request.tag, []).append(text)
        self.finished[request.tag] = finished

    def fail(self, request: RunningRequest, failed: Failed) -> None:
        self.failed[request.tag] = failed

    def flush(self) -> None:
        self.flushes += 1
        self._changed.set()

    async def wait(self, num_ended: int) -> None:
        async with asyncio.timeout(10):
            while len(self.finished) + len(self.failed) < num_ended:
                self._changed.clear()
                await self._changed.wait()

    def text(self, tag: int = 0) -> str:
        return "".join(self.texts[tag])


class Setup:
    def __init__(self, service: Service, core: FakeCore) -> None:
        self.service = service
        self.core = core
        self.sink = Recorder()
        assert service.tokenizer is not None
        self.tokenizer: Tokenizer = service.tokenizer

    def submit(self, text: str, params: SamplingParams, tag: int = 0, stream: bool = True) -> RunningRequest:
        ids = self.tokenizer.encode(text)
        return self.service.requests.submit(ids, params, self.sink, tag, stream=stream)

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)


@pytest.fixture
async def setup(model_directory: Path, tmp_path: Path) -> AsyncIterator[Setup]:
    config = make_config(model_directory, tmp_path)
    core = make_core(config)
    core.start()
    context = zmq.Context()
    service = Service(context, config)
    await service.start()
    yield Setup(service, core)
    service.close()
    context.term()
    if core.is_alive():
        core.stop()


async def test_streamed_text_is_what_the_core_said(setup: Setup) -> None:
    request = setup.submit("Größe 日本語 🙂", SamplingParams(max_tokens=100))
    await setup.sink.wait(1)
    assert setup.sink.text() == "Größe 日本語 🙂"
    assert setup.sink.tokens[0] == request.token_ids == [*request.prompt_token_ids, setup.core._eos]
    assert setup.sink.finished[0] == Finished(0, "stop", None, 0)
    assert len(setup.service.requests) == 0


async def test_text_of_a_request_that_does_not_stream_comes_at_the_end(setup: Setup) -> None:
    request = setup.submit("naïve café", SamplingParams(max_tokens=100), stream=False)
    assert request.text is None
    await setup.sink.wait(1)
    assert setup.sink.texts[0] == ["naïve café"]
    assert setup.sink.tokens == {}
    assert request.token_ids[-1] == setup.core._eos


async def test_the_stop_token_is_a_token_and_not_text(setup: Setup) -> None:
    x = setup.tokenizer.encode("x")[0]
    params = SamplingParams(max_tokens=100, stop_token_ids=(x,), skip_special_tokens=False)
    for tag, stream in enumerate((True, False)):
        request = setup.submit("fox trot", params, tag, stream)
        await setup.sink.wait(tag + 1)
        assert setup.sink.text(tag) == "fo"
        assert request.token_ids[-1] == x
        assert setup.sink.finished[tag] == Finished(tag, "stop", x, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_text_the_tokens_and_the_work(setup: Setup, stream: bool) -> None:
    params = SamplingParams(max_tokens=100, stop=("wn f", "zzz"), ignore_eos=True)
    request = setup.submit("quick brown fox jumps", params, stream=stream)
    await setup.sink.wait(1)
    assert setup.sink.text() == "quick bro"
    assert setup.sink.finished[0].reason == "stop"
    assert setup.sink.finished[0].stop_reason == "wn f"
    # The token that completed the stop string is the last.
    assert "wn f" in setup.tokenizer.decode(request.token_ids)
    assert "wn f" not in setup.tokenizer.decode(request.token_ids[:-1])
    await setup.until(lambda: setup.core.aborted == [request.core_id])
    assert setup.core.num_running == 0
    # The core is not told of stop strings, which are text.
    assert setup.core.added[0].params.stop == ()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_ended_the_answer_may_stay_in_the_text(setup: Setup, stream: bool) -> None:
    options = {"max_tokens": 100, "include_stop_str_in_output": True, "skip_special_tokens": False}
    setup.submit("quick brown fox jumps", SamplingParams(stop="wn f", **options), 0, stream)
    x = setup.tokenizer.encode("x")[0]
    setup.submit("fox trot", SamplingParams(stop_token_ids=[x], **options), 1, stream)
    setup.submit("fox", SamplingParams(**options), 2, stream)
    await setup.sink.wait(3)
    assert [setup.sink.text(tag) for tag in range(3)] == ["quick brown f", "fox", "fox<|im_end|>"]


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_strings_are_not_looked_for_within_min_tokens(setup: Setup, stream: bool) -> None:
    text = "a fox, a fox, a fox"
    first_fox = len(setup.tokenizer.encode("a fox"))
    setup.submit(text, SamplingParams(max_tokens=100, stop="fox", min_tokens=first_fox), 0, stream)
    setup.submit(text, SamplingParams(max_tokens=100, stop="fox", min_tokens=first_fox - 1), 1, stream)
    await setup.sink.wait(2)
    assert setup.sink.text(0) == "a fox, a "
    assert setup.sink.text(1) in ("a ", "a fox, a ")  # a token may hold the word's end alone
    assert setup.core.added[0].params.min_tokens == first_fox


async def test_bad_words_go_to_the_core_as_tokens(setup: Setup) -> None:
    setup.submit("fox", SamplingParams(bad_words=["fox", " jumps"]))
    await setup.sink.wait(1)
    [added] = setup.core.added
    expected = [setup.tokenizer.encode(text) for text in ("fox", " fox", "jumps", " jumps")]
    assert [unpack_ints(ids).tolist() for ids in added.bad_words] == expected
    assert added.params.bad_words == ()


@pytest.mark.parametrize(
    ("param", "value", "names"),
    [
        ("bad_words", ["日本語のテキスト、そして漢字。 Привет, мир! 🙂🙃 0x00ff00ff00ff00ff"], "at most 16 tokens"),
        ("logit_bias", {VOCAB_SIZE: 1.0}, f"got {VOCAB_SIZE}"),
        ("allowed_token_ids", [1, VOCAB_SIZE + 5], f"got {VOCAB_SIZE + 5}"),
        ("stop_token_ids", [VOCAB_SIZE], f"got {VOCAB_SIZE}"),
        ("n", 2, "got 2"),
    ],
)
async def test_what_the_vocabulary_does_not_have_is_refused(
    setup: Setup, param: str, value: object, names: str
) -> None:
    with pytest.raises(InvalidRequestError, match=names) as caught:
        setup.submit("fox", SamplingParams(**{param: value}))
    assert caught.value.param == param
    assert setup.core.added == []


async def test_log_probabilities_of_more_than_a_message_holds_are_refused(setup: Setup) -> None:
    for param in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidRequestError, match="too large") as caught:
            setup.service.requests.submit(
                [5] * 8000, SamplingParams(max_tokens=8000, **{param: -1}), setup.sink, stream=True
            )
        assert caught.value.param == param


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_stay_with_their_tokens(setup: Setup, stream: bool) -> None:
    requests = [
        setup.submit(
            "the quick fox", SamplingParams(max_tokens=100, logprobs=logprobs, prompt_logprobs=prompt), tag, stream
        )
        for tag, (logprobs, prompt) in enumerate([(2, None), (None, 3), (0, 0), (None, None)])
    ]
    await setup.sink.wait(4)
    for request in requests:
        params = request.params
        expected = (
            [] if params.logprobs is None else [logprob_of(token, params.logprobs) for token in request.token_ids]
        )
        assert request.logprobs == expected
        assert request.prompt_is_measured == (params.prompt_logprobs is not None)
        if request.prompt_is_measured:
            tail = [logprob_of(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
            assert request.measured_prompt() == [None, *tail]


async def test_held_back_text_is_given_out_at_the_end(setup: Setup) -> None:
    setup.submit("say EN", SamplingParams(max_tokens=100, stop=("END",)))
    await setup.sink.wait(1)
    assert setup.sink.text() == "say EN"
    assert setup.sink.finished[0].reason == "stop"
    assert setup.sink.finished[0].stop_reason is None


async def test_half_a_character_at_the_end_is_replaced(setup: Setup) -> None:
    half = setup.tokenizer.encode("🙂")[0]
    for tag, stream in enumerate((True, False)):
        request = setup.service.requests.submit([half], SamplingParams(max_tokens=1), setup.sink, tag, stream=stream)
        await setup.sink.wait(tag + 1)
        assert setup.sink.text(tag) == setup.tokenizer.decode(request.token_ids)
        assert setup.sink.finished[tag].reason == "length"


async def test_requests_that_want_no_text_get_tokens_only(setup: Setup) -> None:
    request = setup.submit("the fox trots", SamplingParams(max_tokens=4, detokenize=False))
    assert request.text is None
    await setup.sink.wait(1)
    assert setup.sink.tokens[0] == request.prompt_token_ids[:4]
    assert setup.sink.text() == ""


async def test_what_a_step_gives_one_sink_is_flushed_once(setup: Setup) -> None:
    setup.core.permits = threading.Semaphore(0)
    for tag in range(20):
        setup.submit("fox", SamplingParams(max_tokens=3, ignore_eos=True), tag)
    await setup.until(lambda: setup.core.num_running == 20)
    for num_steps in range(1, 4):
        # Each step when the one before has been flushed, as several that come together are flushed together.
        setup.core.permits.release()
        await setup.until(lambda num_steps=num_steps: setup.sink.flushes >= num_steps)
    await setup.sink.wait(20)
    assert setup.sink.flushes == 3
    assert len({request.request_id for request in setup.core.added}) == 20


async def test_abort_tells_the_core_and_forgets(setup: Setup) -> None:
    setup.core.step_seconds = 0.002
    first, second = setup.submit("the fox", ENDLESS, 0), setup.submit("the dog", ENDLESS, 1)
    await setup.until(lambda: len(first.token_ids) > 2)
    setup.service.requests.abort([first])
    setup.service.requests.abort([first])
    count = len(first.token_ids)
    await setup.until(lambda: setup.core.aborted == [first.core_id])
    await setup.sink.wait(1)
    assert len(first.token_ids) == count
    assert list(setup.sink.finished) == [second.tag]


async def test_failures_of_the_core_reach_the_request(setup: Setup) -> None:
    setup.core.failure = Failed(0, "invalid_request", "longer than the pool", "prompt")
    request = setup.submit("the fox", ENDLESS, 7)
    await setup.sink.wait(1)
    assert setup.sink.failed[7] == Failed(7, "invalid_request", "longer than the pool", "prompt")
    assert request.token_ids == []
    assert len(setup.service.requests) == 0


async def test_messages_of_an_older_epoch_are_dropped(setup: Setup) -> None:
    setup.core.may_step.clear()
    request = setup.submit("the fox", ENDLESS)
    await setup.until(lambda: setup.core.num_running == 1)
    setup.core.epoch = -1
    setup.core.may_step.set()
    await setup.until(lambda: setup.core._num_steps > 10)
    assert request.token_ids == []
    setup.core.epoch = 0
    await setup.until(lambda: len(request.token_ids) > 0)


async def test_an_engine_that_gives_up_fails_what_runs_and_what_comes(setup: Setup) -> None:
    setup.core.step_seconds = 0.01
    setup.submit("the fox", ENDLESS, 0)
    setup.submit("the dog", ENDLESS, 1, stream=False)
    await setup.until(lambda: setup.core._num_steps > 3)
    setup.service.on_launcher(b"", EngineFailed("the core is gone for good"))
    await setup.sink.wait(2)
    assert {failed.kind for failed in setup.sink.failed.values()} == {"unavailable"}
    assert "core is gone" in setup.sink.failed[0].message
    assert setup.service.state == "failed"
    with pytest.raises(EngineUnavailableError, match="core is gone"):
        setup.service.require_ready()


async def test_another_core_goes_on_where_the_last_one_ended(setup: Setup, model_directory: Path) -> None:
    setup.core.step_seconds = 0.005
    running = setup.submit("Größe 日本語 🙂 the quick brown fox", SamplingParams(max_tokens=100), 0)
    quiet = setup.submit("the dog and the fox", SamplingParams(max_tokens=50, ignore_eos=True), 1, stream=False)
    await setup.until(lambda: len(running.token_ids) > 2)
    setup.core.stop()
    await setup.until(lambda: setup.service.state == "recovering")
    setup.service.require_ready()
    waiting = setup.submit("the lazy dog", SamplingParams(max_tokens=100), 2)
    setup.service.requests.abort([left := setup.submit("the fox", ENDLESS, 3)])
    before = list(running.token_ids)
    core = make_core(setup.service.config, epoch=1)
    setup.service.on_launcher(b"", ProcessLost("core", 1, "the core was stopped", True))
    core.start()
    await setup.sink.wait(3)
    assert setup.service.state == "ready"
    assert setup.sink.text(0) == "Größe 日本語 🙂 the quick brown fox"
    assert setup.sink.text(2) == "the lazy dog"
    prompt = quiet.prompt_token_ids
    assert quiet.token_ids == [prompt[i % len(prompt)] for i in range(50)]
    assert running.token_ids[: len(before)] == before
    replayed = {message.request_id: message for message in core.added}
    assert set(replayed) == {running.core_id, quiet.core_id, waiting.core_id}
    assert left.core_id not in replayed
    assert unpack_ints(replayed[running.core_id].generated_token_ids).tolist() == before
    assert replayed[running.core_id].params == setup.core.added[0].params
    assert setup.core.added[0].params.seed is not None
    core.stop()


async def test_what_was_measured_of_a_prompt_is_not_measured_again(setup: Setup) -> None:
    setup.core.step_seconds = 0.005
    running = setup.submit("the quick brown fox", SamplingParams(max_tokens=60, ignore_eos=True, prompt_logprobs=1))
    await setup.until(lambda: len(running.token_ids) > 2)
    assert running.prompt_is_measured
    setup.core.stop()
    core = make_core(setup.service.config, epoch=1)
    core.start()
    setup.service.on_launcher(b"", ProcessLost("core", 1, "the core was stopped", True))
    await setup.sink.wait(1)
    assert core.added[0].params.prompt_logprobs is None
    assert len(running.token_ids) == 60
    assert running.prompt_is_measured
    core.stop()


async def test_a_lost_worker_is_told_of_until_there_is_another(setup: Setup) -> None:
    request = setup.submit("the fox", ENDLESS)
    setup.service.on_launcher(b"", ProcessLost("worker", 1, "the worker was killed", True))
    assert setup.service.state == "recovering"
    assert setup.service.unavailable_reason == "the worker was killed"
    # What another loss than this one brings back does not end it.
    setup.service.on_core_ready(0, is_new=False)
    assert setup.service.state == "recovering"
    setup.service.on_core_ready(1, is_new=False)
    assert setup.service.state == "ready"
    assert setup.service.unavailable_reason is None
    # The core may be heard before the launcher.
    setup.service.on_core_ready(2, is_new=False)
    setup.service.on_launcher(b"", ProcessLost("worker", 2, "the worker was killed", True))
    assert setup.service.state == "ready"
    await setup.until(lambda: len(request.token_ids) > 0)
    assert len(setup.core.added) == 1
    setup.service.requests.abort([request])


async def test_draining_lets_requests_finish(setup: Setup) -> None:
    setup.core.step_seconds = 0.005
    setup.submit("the fox", SamplingParams(max_tokens=10, ignore_eos=True))
    await setup.service.drain(10)
    assert setup.sink.finished[0].reason == "length"
    with pytest.raises(EngineUnavailableError, match="stopping"):
        setup.service.require_ready()


async def test_draining_ends_what_takes_too_long_with_what_it_has(setup: Setup) -> None:
    setup.core.step_seconds = 0.005
    request = setup.submit("the fox", ENDLESS, stream=False)
    await setup.service.drain(0.1)
    assert setup.sink.finished[0].reason == "abort"
    assert setup.sink.text() == setup.tokenizer.decode(request.token_ids)
    assert 0 < len(request.token_ids) < 100
    await setup.until(lambda: setup.core.aborted == [request.core_id])


@pytest.mark.parametrize("value", [-1, VOCAB_SIZE])
async def test_ids_outside_of_the_vocabulary_are_named_with_their_position(setup: Setup, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"holds {value} at position 2") as caught:
        await setup.service.prompts.token_ids([1, 2, value, 3])
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (TokenPrompt(b""), "prompt", "empty"),
        (TextPrompt(""), "prompt", "empty"),
        (TokenPrompt(pack_ints([1] * MAX_MODEL_LEN)), "prompt", "no room for an answer"),
        (TextPrompt("🙂" * 20_000), "prompt", "no room for an answer"),
        (ChatPrompt([{"role": "user", "content": "x" * 600}]), "messages", "no room for an answer"),
        (ChatPrompt([]), "messages", "at least one"),
    ],
)
async def test_prompts_that_cannot_be_served(setup: Setup, prompt, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await setup.service.prompts.token_ids(prompt)
    assert caught.value.param == param


async def test_a_long_text_is_encoded_beside_the_event_loop(setup: Setup) -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    started = time.monotonic()
    with pytest.raises(InvalidRequestError):
        await setup.service.prompts.token_ids(TextPrompt("the quick brown fox " * 50_000))
    took = time.monotonic() - started
    watching.cancel()
    assert longest < max(0.3 * took, 0.1)


@pytest.mark.parametrize(("asked", "fits"), [(None, MAX_MODEL_LEN - 3), (5, 5), (MAX_MODEL_LEN, MAX_MODEL_LEN - 3)])
async def test_max_tokens_is_capped_to_the_context(setup: Setup, asked: int | None, fits: int) -> None:
    params = setup.service.prompts.fit_max_tokens(SamplingParams(max_tokens=asked), [1, 2, 3])
    assert params.max_tokens == fits


@pytest.mark.parametrize(
    ("options", "param"),
    [({"priority": 2**31}, "priority"), ({"cache_salt": ""}, "cache_salt")],
)
async def test_fields_that_are_checked_last(setup: Setup, options, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        setup.service.requests.submit([1], ENDLESS, setup.sink, stream=True, **options)
    assert caught.value.param == param
    assert len(setup.service.requests) == 0


class _NoLink:
    def send(self, message: object) -> bool:
        assert isinstance(message, AddRequest)
        return True


class _Counter:
    """A sink that does as little as an IPC client's does for a token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def add(self, request: RunningRequest, token_id: int, text: str) -> None:
        self.tokens.append(token_id)

    def finish(self, request: RunningRequest, text: str, finished: Finished) -> None: ...

    def fail(self, request: RunningRequest, failed: Failed) -> None: ...

    def flush(self) -> None: ...


async def test_a_first_token_is_sent_before_other_streams_next_ones() -> None:
    table = RequestTable(_NoLink(), None, 640, RequestMetrics(MAX_MODEL_LEN), Admission(AdmissionLimits(0, 0, 0)))  # type: ignore[arg-type]
    collectors = [Collector(1) for _ in range(20)]
    params = SamplingParams(max_tokens=1000, detokenize=False)
    ids = [table.submit([1], params, collector, stream=True).core_id for collector in collectors]
    order: list[int] = []

    async def respond(index: int, collector: Collector) -> None:
        def pass_on(outputs: list[Output]) -> bool:
            order.append(index)
            return True

        await collector.take()
        order.append(index)
        while True:
            await collector.take(pass_on)

    tasks = [asyncio.create_task(respond(index, collector)) for index, collector in enumerate(collectors)]
    for streams in (ids[:-1], ids[:-1], ids):
        order.clear()
        table.on_step(StepOutputs(0, pack_ints(streams, "<i8"), pack_ints(streams)))
        table.flush_steps()
        async with asyncio.timeout(10):
            while len(order) < len(streams):
                await asyncio.sleep(0)
        assert sorted(order) == list(range(len(streams)))
    assert order[0] == len(ids) - 1
    for task in tasks:
        task.cancel()


async def test_nothing_waits_to_be_flushed_when_the_table_is_empty() -> None:
    table = RequestTable(_NoLink(), None, 640, RequestMetrics(MAX_MODEL_LEN), Admission(AdmissionLimits(0, 0, 0)))  # type: ignore[arg-type]
    params, recorders = SamplingParams(max_tokens=1000, detokenize=False), [Recorder() for _ in range(3)]
    ids = [table.submit([1], params, recorder, stream=True).core_id for recorder in recorders]
    table.on_step(StepOutputs(0, pack_ints(ids[:2], "<i8"), pack_ints([5, 5])))
    table.flush_steps()
    # The last one begins in the step in which all end, after which a server may stop.
    ended = [Finished(core_id, "length") for core_id in ids]
    table.on_step(StepOutputs(0, pack_ints(ids, "<i8"), pack_ints([6, 6, 6]), finished=ended))
    table.flush_steps()
    assert len(table) == 0
    assert [recorder.flushes for recorder in recorders] == [2, 2, 1]


async def test_tokens_of_steps_that_came_together_go_together() -> None:
    table = RequestTable(_NoLink(), None, 640, RequestMetrics(MAX_MODEL_LEN), Admission(AdmissionLimits(0, 0, 0)))  # type: ignore[arg-type]
    collector = Collector(1)
    core_id = table.submit([1], SamplingParams(max_tokens=1000, detokenize=False), collector, stream=True).core_id
    taken: list[list[int]] = []

    def pass_on(outputs: list[Output]) -> bool:
        taken.extend(token_ids for _, _, token_ids in outputs)
        return True

    task = asyncio.create_task(collector.take(pass_on))
    await asyncio.sleep(0)
    for token_id in (5, 6, 7):
        table.on_step(StepOutputs(0, pack_ints([core_id], "<i8"), pack_ints([token_id])))
    assert not taken
    table.flush_steps()
    table.flush_steps()
    assert taken == [[5, 6, 7]]
    task.cancel()


async def test_rows_without_text_cost_about_a_microsecond() -> None:
    table = RequestTable(_NoLink(), None, 640, RequestMetrics(MAX_MODEL_LEN), Admission(AdmissionLimits(0, 0, 0)))  # type: ignore[arg-type]
    sink = _Counter()
    params = SamplingParams(max_tokens=1000, detokenize=False)
    ids = [table.submit([1], params, sink, tag, stream=True).core_id for tag in range(512)]
    step = StepOutputs(0, pack_ints(ids, "<i8"), pack_ints(np.arange(512)))
    best = min(_timed(table, step) for _ in range(50))
    assert len(sink.tokens) == 50 * 512
    assert unpack_ints(step.token_ids).tolist() == sink.tokens[:512]
    # Three times what it takes on a slow machine.
    assert best / 512 < 3e-6


def _timed(table: RequestTable, step: StepOutputs) -> float:
    started = time.perf_counter()
    table.on_step(step)
    return time.perf_counter() - started
