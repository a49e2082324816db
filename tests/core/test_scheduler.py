"""What the scheduler promises: who goes first, what is computed, and that nothing is lost or leaked."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.scheduler import Scheduler, SchedulerConfig
from protocol.messages import AddRequest, Failed, StepOutputs, pack_ints, unpack_ints
from protocol.sampling import SamplingParams
from tests.support.null_worker import NullWorker

EOS = 1
BLOCK_SIZE = 4


def pseudo_token(seed: int, position: int, total: int) -> int:
    """A token that depends on everything before it; now and then the end-of-sequence token."""
    mixed = (seed * 1_000_003 + position * 7919 + total * 104_729) % 1_000_000_007
    return EOS if mixed % 23 == 0 else 2 + mixed % 97


def make_scheduler(**changes: Any) -> Scheduler:
    config = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "block_size": BLOCK_SIZE,
        "num_blocks": 129,
        "enable_prefix_caching": True,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(SchedulerConfig(**(config | changes)))


class Engine:
    """Scheduler and null worker, with the outputs that the frontend would collect."""

    def __init__(self, scheduler: Scheduler, depth: int = 2, rule: Any = pseudo_token) -> None:
        self.scheduler = scheduler
        self.worker = NullWorker(scheduler.config.block_size, rule)
        self.depth = depth
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.aborted: set[int] = set()
        self.failed: dict[int, str] = {}

    def add(self, request_id: int, prompt: list[int], **params: Any) -> None:
        options = {"temperature": 0.0, "seed": request_id, **params}
        salt = options.pop("cache_salt", None)
        priority = options.pop("priority", 0)
        self.tokens[request_id] = []
        self.scheduler.add(0, AddRequest(request_id, pack_ints(prompt), SamplingParams(**options), priority, salt))

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
        return step is not None

    def receive(self) -> None:
        for _, message in self.scheduler.apply(self.worker.answer()).messages(0):
            if isinstance(message, Failed):
                assert message.request_id not in self.ends
                self.failed[message.request_id] = message.message
                continue
            assert isinstance(message, StepOutputs)
            ids, tokens = unpack_ints(message.request_ids, "<i8").tolist(), unpack_ints(message.token_ids).tolist()
            for request_id, token in zip(ids, tokens, strict=True):
                assert request_id not in self.ends, "a token after the end"
                assert request_id not in self.aborted, "a token of an aborted request"
                self.tokens[request_id].append(token)
            for finished in message.finished:
                self.ends[finished.request_id] = finished.reason

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


class RandomOperations(RuleBasedStateMachine):
    """Any mix of arrivals, aborts, steps and answers, with blocks so few that preemption is common."""

    @initialize(depth=st.sampled_from([1, 2]), num_blocks=st.integers(17, 40), budget=st.sampled_from([6, 17, 64]))
    def start(self, depth: int, num_blocks: int, budget: int) -> None:
        scheduler = make_scheduler(num_blocks=num_blocks, max_num_seqs=6, max_num_batched_tokens=budget)
        self.engine = Engine(scheduler, depth, self.next_token)
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
        broken=st.integers(0, 9).map(lambda n: n == 0),
    )
    def add(self, seed: int, length: int, max_tokens: int, priority: int, broken: bool) -> None:
        request_id = len(self.prompts)
        self.prompts[request_id] = (prompt_of(seed, length), max_tokens)
        if broken:
            self.nan_seeds.add(request_id)
        self.engine.add(request_id, prompt_of(seed, length), max_tokens=max_tokens, priority=priority)

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
