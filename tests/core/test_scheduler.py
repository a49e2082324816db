"""What the scheduler promises: who goes first, what is computed, and that nothing is lost or leaked."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bundled import MODEL_DIR
from core.engine import step_time_model
from core.prefill_budget import PrefillBudget
from core.request import Phase
from core.scheduler import Scheduler, SchedulerConfig
from core.step_time import (
    MIN_CHUNK,
    MOST_STEPS_OF_QUEUE,
    PREFILL_PER_DECODE,
    UNMEASURED_CHUNK,
    RelativeCosts,
    StepTimeModel,
    StepWork,
)
from protocol.config import EngineConfig, make_options
from protocol.logprobs import TokenLogprob, unpack_logprobs
from protocol.messages import AddRequest, Failed, Step, StepOutputs, pack_ints, unpack_ints
from protocol.resolve import resolve
from protocol.sampling import SamplingParams
from tests.support.null_worker import NullWorker, measured
from tests.support.step_times import gpu_seconds

EOS = 1
BLOCK_SIZE = 4


def pseudo_token(seed: int, position: int, total: int) -> int:
    """A token that depends on everything before it; now and then the end-of-sequence token."""
    mixed = (seed * 1_000_003 + position * 7919 + total * 104_729) % 1_000_000_007
    return EOS if mixed % 23 == 0 else 2 + mixed % 97


def make_scheduler(step_time: StepTimeModel | None = None, **changes: Any) -> Scheduler:
    config = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "block_size": BLOCK_SIZE,
        "num_blocks": 129,
        "enable_prefix_caching": True,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(SchedulerConfig(**(config | changes)), step_time=step_time)


class RecordingStepTimeModel(StepTimeModel):
    """Notes what the scheduler said was queued."""

    queue = StepWork(0)

    def prefill_budget(
        self, tokens: int, block_size: int, num_decodes: int, context: int, queue: StepWork
    ) -> PrefillBudget:
        self.queue = queue
        return super().prefill_budget(tokens, block_size, num_decodes, context, queue)


def assert_bounded(scheduler: Scheduler, step: Step) -> None:
    """The step just made holds no more prefill beside decodes than the model of step times allows."""
    model, work = scheduler.step_time, scheduler._in_flight[-1].work
    if model is None or not work.context or work.tokens <= max(model.min_chunk, scheduler.config.block_size):
        return
    prefill = model.prefill_seconds(work.tokens, work.pairs, work.is_layered)
    if prefill:
        assert isinstance(model, RecordingStepTimeModel)
        decode, queue = model.decode_seconds(work.context), model.prefill_seconds(model.queue.tokens, 0)
        bound = max(model.max_seconds - decode, PREFILL_PER_DECODE * decode, queue / MOST_STEPS_OF_QUEUE)
        # A little more, where that saves a step, and a layer at least.
        slack = 1.101 if work.is_layered else 1.051
        assert prefill <= bound * slack or step.prefill_num_layers == 1
    else:
        assert work.tokens <= UNMEASURED_CHUNK


class Engine:
    """Scheduler and null worker, with the outputs that the frontend would collect.

    With `step_seconds`, each step is said to have taken that long, and `seconds` is the sum.
    """

    step_seconds: Callable[[StepWork], float] | None = None
    seconds = 0.0

    def __init__(self, scheduler: Scheduler, depth: int = 2, rule: Any = pseudo_token) -> None:
        self.scheduler = scheduler
        self.worker = self.new_worker(scheduler, rule)
        self.depth = depth
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.aborted: set[int] = set()
        self.failed: dict[int, str] = {}
        self.prompts: dict[int, list[int]] = {}
        self.measured: dict[int, dict[int, TokenLogprob]] = {}  # tokens of prompts, by position
        self.wants_logprobs: set[int] = set()
        self.messages: dict[int, AddRequest] = {}

    @staticmethod
    def new_worker(scheduler: Scheduler, rule: Any) -> NullWorker:
        num_layers = scheduler.step_time.costs.num_layers if scheduler.step_time is not None else 1
        return NullWorker(scheduler.config.block_size, rule, num_layers)

    def add(self, request_id: int, prompt: list[int], **params: Any) -> None:
        options = {"temperature": 0.0, "seed": request_id, **params}
        salt = options.pop("cache_salt", None)
        priority = options.pop("priority", 0)
        self.tokens[request_id] = []
        self.prompts[request_id] = prompt
        if options.get("prompt_logprobs") is not None:
            self.measured[request_id] = {}
        if options.get("logprobs") is not None:
            self.wants_logprobs.add(request_id)
        client = options.pop("client", 0)
        message = AddRequest(request_id, pack_ints(prompt), SamplingParams(**options), priority, salt, client=client)
        self.messages[request_id] = message
        self.scheduler.add(0, message)

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(0, [request_id])
        if request_id not in self.ends:
            self.aborted.add(request_id)

    def send(self) -> bool:
        if self.scheduler.num_in_flight >= self.depth:
            return False
        step = self.scheduler.schedule()
        if step is not None:
            self.worker.execute(step)
            assert_bounded(self.scheduler, step)
            assert step.prefill_lens or not self.scheduler._prefilling, "a prompt stands still"
        return step is not None

    def receive(self) -> None:
        seconds = None
        if self.step_seconds is not None:
            seconds = self.step_seconds(self.scheduler._in_flight[0].work)
            self.seconds += seconds
        for _, message in self.scheduler.apply(self.worker.answer(), seconds).messages(0):
            if isinstance(message, Failed):
                assert message.request_id not in self.ends
                self.failed[message.request_id] = message.message
                continue
            assert isinstance(message, StepOutputs)
            ids, tokens = unpack_ints(message.request_ids, "<i8").tolist(), unpack_ints(message.token_ids).tolist()
            self.check_logprobs(message, ids, tokens)
            for request_id, token in zip(ids, tokens, strict=True):
                assert request_id not in self.ends, "a token after the end"
                assert request_id not in self.aborted, "a token of an aborted request"
                self.tokens[request_id].append(token)
            for finished in message.finished:
                self.ends[finished.request_id] = finished.reason

    def lose_worker(self) -> None:
        """The worker dies with all that is in flight, and another one comes, which knows nothing."""
        self.worker = self.new_worker(self.scheduler, self.worker.rule)
        self.scheduler.restart(self.scheduler.epoch + 1)

    def lose_core(self) -> None:
        """Core and worker know nothing any more, and the frontend says again what it has not seen the end of."""
        scheduler = self.scheduler
        self.scheduler = Scheduler(scheduler.config, scheduler.epoch + 1, scheduler.step_time)
        self.worker = self.new_worker(scheduler, self.worker.rule)
        for request_id, message in self.messages.items():
            if request_id in self.aborted or request_id in self.ends or request_id in self.failed:
                continue
            if generated := self.tokens[request_id]:
                params = msgspec.structs.replace(message.params, prompt_logprobs=None)
                message = msgspec.structs.replace(message, params=params, generated_token_ids=pack_ints(generated))
            self.scheduler.add(0, message)

    def check_logprobs(self, message: StepOutputs, ids: list[int], tokens: list[int]) -> None:
        """Log-probabilities belong to their tokens, and those of a prompt are there before its first token is."""
        found = dict(entry for table in message.logprobs for entry in unpack_logprobs(table))
        assert found == {row: measured(tokens[row]) for row, each in enumerate(ids) if each in self.wants_logprobs}
        for stretch in message.prompt_logprobs:
            assert stretch.request_id not in self.aborted | set(self.ends)
            self.measured[stretch.request_id].update(unpack_logprobs(stretch.tokens))
        for request_id in self.measured.keys() & set(ids):
            prompt = self.prompts[request_id]
            assert self.measured[request_id] == {i: measured(prompt[i]) for i in range(1, len(prompt))}

    def run(self) -> None:
        while True:
            while self.send():
                pass
            if not self.scheduler.num_in_flight:
                return
            self.receive()


def expected_tokens(request_id: int, prompt: list[int], max_tokens: int, max_model_len: int = 64) -> list[int]:
    tokens, answer = list(prompt), []
    while len(answer) < max_tokens and len(tokens) < max_model_len:
        token = pseudo_token(request_id, len(tokens), sum(tokens))
        answer.append(token)
        tokens.append(token)
        if token == EOS:
            break
    return answer


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, 99), k=length)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks", [17, 129])
@pytest.mark.parametrize("budget", [8, 64])
def test_tokens_do_not_depend_on_how_the_work_was_cut(depth: int, caching: bool, num_blocks: int, budget: int) -> None:
    engine = Engine(
        make_scheduler(num_blocks=num_blocks, enable_prefix_caching=caching, max_num_batched_tokens=budget), depth
    )
    prompts = {i: prompt_of(i % 5, 1 + (i * 7) % 30) for i in range(40)}
    for request_id, prompt in prompts.items():
        engine.add(request_id, prompt, max_tokens=1 + request_id % 20)
    engine.run()
    for request_id, prompt in prompts.items():
        assert engine.tokens[request_id] == expected_tokens(request_id, prompt, 1 + request_id % 20), request_id
    stats = engine.scheduler.stats()
    assert stats.finished_requests == 40
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_preemptions > 0) == (num_blocks == 17)


def test_a_request_ends_at_eos_or_a_stop_token_or_its_limit() -> None:
    engine = Engine(make_scheduler(), rule=lambda seed, position, total: [EOS, 50, 60][seed])
    engine.add(0, [2, 3], max_tokens=5)
    engine.add(1, [2, 3], max_tokens=5, stop_token_ids=[50])
    engine.add(2, [2, 3], max_tokens=5)
    engine.run()
    assert engine.tokens == {0: [EOS], 1: [50], 2: [60] * 5}
    assert engine.ends == {0: "stop", 1: "stop", 2: "length"}


def test_ignore_eos_runs_to_the_limit_and_costs_no_extra_step() -> None:
    engine = Engine(make_scheduler(), rule=lambda seed, position, total: EOS)
    engine.add(0, [2, 3], max_tokens=6, ignore_eos=True)
    engine.run()
    assert engine.tokens[0] == [EOS] * 6
    assert engine.worker.num_computed_tokens == 2 + 5


def test_an_answer_ends_at_the_context_length() -> None:
    engine = Engine(make_scheduler(max_model_len=16), rule=lambda *_: 9)
    engine.add(0, list(range(2, 12)), max_tokens=None)
    engine.run()
    assert len(engine.tokens[0]) == 6
    assert engine.ends[0] == "length"


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_cannot_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 63 tokens, got {length}"):
        make_scheduler().add(0, AddRequest(1, pack_ints([5] * length), SamplingParams()))


def test_an_id_in_use_is_refused() -> None:
    engine = Engine(make_scheduler())
    engine.add(1, [5, 6])
    with pytest.raises(ValueError, match="already in use"):
        engine.add(1, [5, 6])


def test_decodes_go_first_and_prefill_fills_the_rest_of_the_budget() -> None:
    engine = Engine(make_scheduler(max_num_batched_tokens=16), rule=lambda *_: 9)
    engine.add(0, [2] * 4, max_tokens=20)
    engine.send()
    engine.add(1, [3] * 40, max_tokens=4)
    step = engine.scheduler.schedule()
    assert step is not None
    assert step.decode_slots is not None
    assert unpack_ints(step.decode_slots).tolist() == [engine.scheduler._running[0].slot]
    assert unpack_ints(step.prefill_lens).tolist() == [15]
    assert step.prefill_samples == b"\x00"


def test_a_step_in_which_nothing_changed_carries_nothing() -> None:
    engine = Engine(make_scheduler(), rule=lambda *_: 9)
    engine.add(0, [2] * 8, max_tokens=20)
    engine.send()
    engine.send()
    engine.receive()
    steady = engine.scheduler.schedule()
    assert steady is not None
    assert steady.decode_slots is None
    assert not steady.admitted
    assert steady.prefill_slots + steady.new_block_ids + steady.released_slots == b""


def test_lower_priority_values_and_earlier_arrivals_go_first() -> None:
    engine = Engine(make_scheduler(max_num_seqs=1), rule=lambda *_: 9)
    order: list[int] = []
    for request_id, priority in ((0, 5), (1, 0), (2, 5), (3, -1)):
        engine.add(request_id, [2, 3], max_tokens=1, priority=priority)
    while engine.send() or engine.scheduler.num_in_flight:
        engine.receive()
        order += [i for i in engine.ends if i not in order]
    assert order == [3, 1, 0, 2]


def test_the_last_in_order_is_preempted() -> None:
    engine = Engine(make_scheduler(num_blocks=10, max_model_len=36), rule=lambda *_: 9)
    for request_id, priority in ((0, 1), (1, 0)):
        engine.add(request_id, prompt_of(request_id, 12), max_tokens=20, priority=priority)
    while engine.scheduler.stats().num_preemptions == 0:
        engine.send() or engine.receive()
    assert [request.request_id for request in engine.scheduler._running] == [1]
    engine.run()
    assert {len(tokens) for tokens in engine.tokens.values()} == {20}


def test_a_warm_prefix_is_not_computed_again() -> None:
    engine = Engine(make_scheduler())
    shared = prompt_of(1, 20)
    engine.add(0, [*shared, 7], max_tokens=1)
    engine.run()
    assert engine.worker.num_computed_tokens == 21
    engine.add(1, [*shared, 8], max_tokens=1)
    engine.run()
    assert engine.worker.num_computed_tokens == 21 + 1
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (42, 20)


def test_a_prompt_that_is_cached_whole_computes_its_last_block_again() -> None:
    engine = Engine(make_scheduler())
    for request_id in range(2):
        engine.add(request_id, prompt_of(3, 16), max_tokens=1)
        engine.run()
    assert engine.worker.num_computed_tokens == 16 + BLOCK_SIZE
    assert engine.tokens[0] == [pseudo_token(0, 16, sum(prompt_of(3, 16)))]


def test_generated_tokens_are_cached_too() -> None:
    engine = Engine(make_scheduler(), rule=lambda *_: 9)
    engine.add(0, prompt_of(1, 6), max_tokens=10)
    engine.run()
    before = engine.worker.num_computed_tokens
    engine.add(1, [*prompt_of(1, 6), *[9] * 10, 5], max_tokens=1)
    engine.run()
    # 15 tokens were computed (the last one never is), of which 12 fill three blocks.
    assert engine.worker.num_computed_tokens - before == 17 - 12


def test_salts_do_not_share() -> None:
    engine = Engine(make_scheduler())
    for request_id, salt in enumerate(("a", "b", None, "a")):
        engine.add(request_id, prompt_of(1, 21), max_tokens=1, cache_salt=salt)
        engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == 20


def test_requests_of_one_step_share_what_the_step_computes() -> None:
    engine = Engine(make_scheduler())
    for request_id in range(2):
        engine.add(request_id, prompt_of(1, 21), max_tokens=1)
    engine.run()
    assert engine.worker.num_computed_tokens == 21 + 1


def test_least_recently_used_prefix_is_forgotten_first() -> None:
    engine = Engine(make_scheduler(num_blocks=13, max_model_len=24), rule=lambda *_: 9)
    for request_id, seed in enumerate((1, 2, 1)):
        engine.add(request_id, prompt_of(seed, 17), max_tokens=1)
        engine.run()
    engine.add(3, prompt_of(3, 17), max_tokens=1)
    engine.run()
    hits = engine.scheduler.cache.num_hits
    engine.add(4, prompt_of(1, 17), max_tokens=1)
    engine.run()
    assert engine.scheduler.cache.num_hits - hits == 16


def test_output_that_is_no_number_fails_the_request_and_is_not_cached() -> None:
    engine = Engine(make_scheduler(), rule=lambda seed, position, total: -1 if seed == 0 and position == 10 else 9)
    engine.add(0, prompt_of(1, 8), max_tokens=10)
    engine.add(1, prompt_of(2, 8), max_tokens=10)
    engine.run()
    assert "NaN" in engine.failed[0]
    assert len(engine.tokens[1]) == 10
    hits = engine.scheduler.cache.num_hits
    engine.add(2, prompt_of(1, 9), max_tokens=1)
    engine.run()
    assert engine.scheduler.cache.num_hits == hits
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_preempted_request_that_fails_leaves_nothing_in_the_cache() -> None:
    engine = Engine(make_scheduler(), rule=lambda seed, position, total: -1 if position == 13 else 9)
    engine.add(0, prompt_of(1, 12), max_tokens=10)
    while engine.scheduler.table.num_computed.max() < 13:
        engine.send() or engine.receive()
    engine.scheduler._preempt(engine.scheduler._running[0])
    assert len(engine.scheduler.cache) == 3
    engine.run()
    assert "NaN" in engine.failed[0]
    assert len(engine.scheduler.cache) == 0


def test_requests_of_a_frontend_that_is_gone_are_ended() -> None:
    scheduler = make_scheduler()
    engine = Engine(scheduler, rule=lambda *_: 9)
    engine.add(0, [2, 3], max_tokens=20)
    scheduler.add(1, AddRequest(0, pack_ints([4, 5]), SamplingParams(max_tokens=20)))
    engine.send()
    scheduler.abort_frontend(1)
    engine.run()
    assert len(engine.tokens[0]) == 20
    assert scheduler.stats().aborted_requests == 1


# Qwen3-0.6B's, about, of a model that is not computed layer by layer, and of one that is.
COSTS = RelativeCosts(pair=2.6e-4, cached_token=4.8e-5)
LAYERED = RelativeCosts(pair=2.6e-4, cached_token=4.8e-5, num_layers=28)


def streaming_engine(
    max_seconds: float = 8e-3, num_streams: int = 64, costs: RelativeCosts = COSTS, **changes: Any
) -> Engine:
    """An engine on a GPU on which streams run and have taught it what a step costs."""
    config = {"max_num_seqs": 128, "max_num_batched_tokens": 8192, "max_model_len": 16384, "block_size": 16}
    config |= {"num_blocks": 8192, "enable_prefix_caching": True} | changes
    model = RecordingStepTimeModel(max_seconds, costs) if max_seconds else None
    engine = Engine(make_scheduler(model, **config), rule=lambda *_: 9)
    engine.step_seconds = gpu_seconds
    for request_id in range(num_streams):
        engine.add(request_id, prompt_of(request_id, 128), max_tokens=1000)
    turn(engine, 200)
    return engine


def turn(engine: Engine, times: int = 1) -> list[StepWork]:
    """What the steps computed that came back."""
    works = []
    for _ in range(times):
        while engine.send():
            pass
        if not engine.scheduler.num_in_flight:
            break
        works.append(engine.scheduler._in_flight[0].work)
        engine.receive()
    return works


def test_long_prompt_is_chunked_while_streams_run() -> None:
    engine = streaming_engine()
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    started, works = engine.seconds, []
    while 100 not in engine.ends:
        works += turn(engine)
    prefills = [work for work in works if work.tokens]
    assert sum(work.tokens for work in prefills) == 8192
    assert all(work.tokens % 16 == 0 for work in prefills)
    assert 5 <= len(prefills) <= 8
    assert max(map(gpu_seconds, works)) < 8.5e-3
    assert engine.seconds - started < 50e-3
    assert all(work.context for work in works), "the streams went on"


def prefills_until(engine: Engine, request_id: int) -> list[StepWork]:
    """The steps with prefill until a request has ended."""
    works = []
    while request_id not in engine.ends:
        works += turn(engine)
    return [work for work in works if work.tokens]


@pytest.mark.parametrize("length", [4096, 8192, 12_000])
def test_a_long_prompt_is_computed_layer_by_layer_while_streams_run(length: int) -> None:
    engine = streaming_engine(costs=LAYERED)
    engine.add(100, prompt_of(100, length), max_tokens=1)
    works = prefills_until(engine, 100)
    layered = [work for work in works if work.is_layered]
    assert sum(work.tokens for work in works) == length
    assert sum(work.tokens for work in layered) == min(length, 8192)
    assert engine.worker.num_layered_steps == len(layered) > 1
    # As few steps as it must be, and equal ones.
    decode = gpu_seconds(StepWork(layered[0].context))
    seconds = [gpu_seconds(work) - decode for work in layered]
    assert max(map(gpu_seconds, works)) < 8.8e-3
    assert len(layered) <= sum(seconds) / (8e-3 - decode) + 2
    assert min(seconds[:-1]) > 0.6 * max(seconds)
    engine.add(101, prompt_of(101, 500), max_tokens=3)
    prefills_until(engine, 101)
    assert engine.tokens[101] == [9] * 3


def test_the_rest_of_the_layers_is_one_step_where_no_stream_waits() -> None:
    engine = streaming_engine(num_streams=2, costs=LAYERED)
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    turn(engine, 2)
    engine.abort(0)
    engine.abort(1)
    layers = [work.tokens for work in prefills_until(engine, 100)]
    assert layers[-1] > 2 * layers[0]
    assert engine.tokens[100] == [9]


def test_an_urgent_prompt_goes_between_the_layers_of_a_long_one() -> None:
    engine = streaming_engine(costs=LAYERED)
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    turn(engine)
    engine.add(101, prompt_of(101, 16), max_tokens=1, priority=-1)
    engine.add(102, prompt_of(102, 6000), max_tokens=1, priority=-1)
    engine.add(103, prompt_of(103, 16), max_tokens=1)
    works = prefills_until(engine, 102)
    assert 101 in engine.ends
    assert engine.ends.keys().isdisjoint({100, 103})
    # One prompt is computed layer by layer at a time: the other is cut.
    assert any(not work.is_layered and work.tokens > 256 for work in works)
    prefills_until(engine, 103)
    assert 100 in engine.ends


def test_a_stream_of_urgent_prompts_does_not_keep_a_prompt_between_its_layers() -> None:
    engine = streaming_engine(num_streams=8, costs=LAYERED)
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    turn(engine)
    for request_id in range(1000, 1040):
        engine.add(request_id, prompt_of(request_id, 16), max_tokens=1, priority=-1)
        turn(engine)
        if 100 in engine.ends:
            break
    assert 100 in engine.ends
    assert engine.ends.keys() >= set(range(1000, request_id - 3))


@pytest.mark.parametrize("how", ["abort", "worker", "core"])
def test_a_prompt_that_is_lost_between_its_layers_leaves_nothing_behind(how: str) -> None:
    engine = streaming_engine(num_streams=3, costs=LAYERED)
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    turn(engine, 3)
    assert engine.scheduler._layered is not None
    if how == "abort":
        engine.abort(100)
        engine.add(101, prompt_of(100, 8192), max_tokens=2)
    elif how == "worker":
        engine.lose_worker()
    else:
        engine.lose_core()
    engine.run()
    assert engine.tokens[101 if how == "abort" else 100] == [9] * (2 if how == "abort" else 1)
    assert engine.scheduler._layered is None
    stats = engine.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_a_prompt_that_is_measured_is_not_computed_layer_by_layer() -> None:
    engine = streaming_engine(costs=LAYERED)
    engine.add(100, prompt_of(100, 8192), max_tokens=1, prompt_logprobs=0)
    assert not any(work.is_layered for work in prefills_until(engine, 100))


def test_no_streams_no_bound() -> None:
    engine = streaming_engine(num_streams=1)
    engine.abort(0)
    for request_id in (100, 101):
        engine.add(request_id, prompt_of(request_id, 8192), max_tokens=1)
    works = turn(engine, 5)
    assert [work.tokens for work in works if work.tokens] == [8192, 8192]


def config_with_bound(max_step_ms: float) -> EngineConfig:
    options = make_options({"model": str(MODEL_DIR), "device": "cpu", "max_step_ms": max_step_ms})
    return resolve(options, Path("/nonexistent"))


def test_no_bound_no_chunks() -> None:
    assert step_time_model(config_with_bound(0)) is None
    engine = streaming_engine(max_seconds=0)
    engine.add(100, prompt_of(100, 8000), max_tokens=1)
    assert 8000 in [work.tokens for work in turn(engine, 4)]


def test_the_flag_is_the_bound_in_milliseconds() -> None:
    model = step_time_model(config_with_bound(20))
    assert model is not None
    assert model.max_seconds == 20e-3


def test_short_prompts_join_the_next_step_while_streams_run() -> None:
    engine = streaming_engine()
    for request_id in range(100, 108):
        engine.add(request_id, prompt_of(request_id, 128), max_tokens=1)
    engine.send()
    assert engine.scheduler._in_flight[-1].work.tokens == 8 * 128
    turn(engine, 2)
    assert all(len(engine.tokens[request_id]) == 1 for request_id in range(100, 108))


def test_an_urgent_prompt_goes_before_a_long_one_that_is_being_computed() -> None:
    engine = streaming_engine()
    engine.add(100, prompt_of(100, 8000), max_tokens=1)
    turn(engine)
    engine.add(101, prompt_of(101, 16), max_tokens=1, priority=-1)
    engine.add(102, prompt_of(102, 16), max_tokens=1)
    turn(engine, 3)
    assert 101 in engine.ends
    assert 102 not in engine.ends
    turn(engine, 20)
    assert engine.ends.keys() >= {100, 102}


def test_many_short_prompts_are_bounded_together_and_go_in_order() -> None:
    engine = streaming_engine()
    for request_id in range(100, 140):
        engine.add(request_id, prompt_of(request_id, 200), max_tokens=1, priority=request_id % 2)
    works, ended = [], []
    while len(ended) < 40:
        works += turn(engine)
        ended += sorted(engine.ends.keys() - ended, key=lambda i: (i % 2, i))
    assert max(map(gpu_seconds, works)) < 8.5e-3
    assert ended == [*range(100, 140, 2), *range(101, 140, 2)]


def test_a_long_prompt_goes_on_however_slow_the_device() -> None:
    engine = streaming_engine(max_seconds=1e-6)
    engine.step_seconds = lambda work: 1000 * gpu_seconds(work)
    turn(engine, 20)
    engine.add(100, prompt_of(100, 8192), max_tokens=1)
    works = [work for work in turn(engine, 8192 // MIN_CHUNK + 4) if work.tokens]
    assert 100 in engine.ends
    assert min(work.tokens for work in works[:-1]) >= MIN_CHUNK


def test_a_pause_does_not_shrink_the_chunks_that_follow() -> None:
    def chunks_of(paused_steps: set[int]) -> list[int]:
        engine = streaming_engine()
        engine.add(100, prompt_of(100, 8192), max_tokens=1)
        works = []
        for step in range(12):
            engine.step_seconds = lambda work: gpu_seconds(work) + (0.1 if step in paused_steps else 0.0)  # noqa: B023
            works += turn(engine)
        return [work.tokens for work in works if work.tokens]

    assert len(chunks_of({3})) == len(chunks_of({1, 5})) == len(chunks_of(set()))


def test_a_warm_prompt_costs_what_is_left_to_compute_while_streams_run() -> None:
    engine = streaming_engine()
    prompt = prompt_of(100, 8192)
    for request_id in (100, 101):
        engine.add(request_id, prompt, max_tokens=1)
        works = []
        while request_id not in engine.ends:
            works += turn(engine)
    # Cached whole: the last block is computed again, in one step.
    assert [work.tokens for work in works if work.tokens] == [16]


def test_the_same_times_make_the_same_steps() -> None:
    def chunks() -> list[StepWork]:
        engine, chooser = streaming_engine(), random.Random(1)
        engine.step_seconds = lambda work: gpu_seconds(work) * chooser.uniform(0.5, 3)
        for request_id in range(100, 110):
            engine.add(request_id, prompt_of(request_id, 3000), max_tokens=4)
        return turn(engine, 60)

    assert chunks() == chunks()


class RandomOperations(RuleBasedStateMachine):
    """Any mix of arrivals, aborts, steps, times, answers and deaths, with blocks so few that preemption is common."""

    @initialize(
        depth=st.sampled_from([1, 2]),
        num_blocks=st.integers(17, 40),
        budget=st.sampled_from([6, 17, 64]),
        max_seconds=st.sampled_from([None, 0.01, 0.05]),
        min_chunk=st.sampled_from([1, 8]),
        least_layered=st.sampled_from([1, 8, 1000]),
        max_client_share=st.sampled_from([0.1, 0.5, 1.0]),
    )
    def start(
        self,
        depth: int,
        num_blocks: int,
        budget: int,
        max_seconds: float | None,
        min_chunk: int,
        least_layered: int,
        max_client_share: float,
    ) -> None:
        model = None
        if max_seconds is not None:
            costs = RelativeCosts(pair=0.05, cached_token=0.02, num_layers=4)
            model = RecordingStepTimeModel(max_seconds, costs, min_chunk, least_layered)
        scheduler = make_scheduler(
            model,
            num_blocks=num_blocks,
            max_num_seqs=6,
            max_num_batched_tokens=budget,
            max_client_share=max_client_share,
        )
        self.engine = Engine(scheduler, depth, self.next_token)
        self.engine.step_seconds = self.step_seconds
        self.pace = 1.0
        self.prompts: dict[int, tuple[list[int], int]] = {}
        self.nan_seeds: set[int] = set()

    def next_token(self, seed: int, position: int, total: int) -> int:
        if seed in self.nan_seeds and position % 11 == 0:
            return -1
        return pseudo_token(seed, position, total)

    @rule(
        seed=st.integers(0, 3),
        length=st.integers(1, 50),
        max_tokens=st.integers(1, 60),
        priority=st.integers(0, 2),
        client=st.integers(0, 2),
        logprobs=st.none() | st.just(0),
        prompt_logprobs=st.none() | st.just(0),
        broken=st.integers(0, 9).map(lambda n: n == 0),
    )
    def add(self, seed: int, length: int, max_tokens: int, broken: bool, **options: int | None) -> None:
        request_id = len(self.prompts)
        self.prompts[request_id] = (prompt_of(seed, length), max_tokens)
        if broken:
            self.nan_seeds.add(request_id)
        self.engine.add(request_id, prompt_of(seed, length), max_tokens=max_tokens, **options)

    def step_seconds(self, work: StepWork) -> float:
        return self.pace * (5e-3 * bool(work.context) + 1e-4 * work.context + 1e-3 * work.tokens + 5e-5 * work.pairs)

    @rule(pace=st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.0, 1.0, 2.0, 1000.0]))
    def change_pace(self, pace: float) -> None:
        self.pace = pace

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.prompts:
            self.engine.abort(data.draw(st.sampled_from(sorted(self.prompts))))

    @rule(times=st.integers(1, 5))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.engine.send()
            if self.engine.worker.pending:
                self.engine.receive()

    @rule()
    def send(self) -> None:
        self.engine.send()

    @rule()
    def lose_worker(self) -> None:
        self.engine.lose_worker()

    @rule()
    def lose_core(self) -> None:
        self.engine.lose_core()

    @invariant()
    def held_blocks_are_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        held: dict[int, int] = {}
        for request in scheduler._running:
            for block in request.block_ids:
                held[block] = held.get(block, 0) + 1
        references = {block: count for block, count in enumerate(scheduler.pool._references) if count}
        assert references == held
        assert scheduler.pool.num_free == scheduler.pool.num_usable - len(held)

    @invariant()
    def queued_work_is_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler, tokens, pairs = self.engine.scheduler, 0, 0
        for request in scheduler._requests.values():
            start, end = 0, len(request.token_ids)
            if request.slot >= 0:
                start = int(scheduler.table.num_computed[request.slot])
                end = int(scheduler.table.num_known[request.slot]) if request.phase is Phase.PREFILLING else start
            tokens += end - start
            pairs += sum(range(start + 1, end + 1))
        assert scheduler.queued_work() == StepWork(0, tokens, pairs)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.run()
        scheduler = engine.scheduler
        assert scheduler.pool.num_free == scheduler.pool.num_usable
        assert not any(scheduler.pool._references)
        assert scheduler.table.num_free == scheduler.config.max_num_seqs
        assert scheduler.stats().num_running == scheduler.stats().num_waiting == 0
        assert not np.any([request is not None for request in scheduler.table.requests])
        assert not scheduler._shares._num_requests
        for request_id, (prompt, max_tokens) in self.prompts.items():
            expected = expected_tokens(request_id, prompt, max_tokens)
            got = engine.tokens[request_id]
            if request_id in engine.aborted or request_id in engine.failed:
                assert got == expected[: len(got)]
            else:
                assert got == expected
                assert engine.ends[request_id] == ("stop" if got[-1] == EOS else "length")


RandomOperations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccounting = RandomOperations.TestCase


def test_queue_time_is_from_arrival_to_the_first_step_and_counts_once() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    engine = Engine(scheduler, depth=1)
    for request_id, arrived in ((0, 10.0), (1, 11.0), (2, 12.0)):
        params = SamplingParams(temperature=0.0, seed=request_id, max_tokens=1, ignore_eos=True)
        engine.tokens[request_id] = []
        scheduler.add(0, AddRequest(request_id, pack_ints([5, 6, 7]), params), arrived)
    scheduler.abort(0, [2])
    for now in (10.25, 13.5):
        step = scheduler.schedule(now)
        assert step is not None
        engine.worker.execute(step)
        engine.receive()
    waited = scheduler.stats().queue_time
    # 0.25 s and 2.5 s; the third was never computed.
    assert (sum(waited.counts), waited.total) == (2, 2.75)
    assert [bound for bound, count in zip(waited.bounds, waited.counts, strict=False) if count] == [0.3, 2.5]


def test_a_preempted_request_is_not_queued_anew() -> None:
    engine = Engine(make_scheduler(num_blocks=17))
    for request_id in range(12):
        engine.add(request_id, prompt_of(request_id, 20), max_tokens=20, ignore_eos=True)
    engine.run()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert sum(stats.queue_time.counts) == 12
