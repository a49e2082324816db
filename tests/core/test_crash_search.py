"""A request that crashes the worker is found, whatever runs beside it, and nobody else is blamed."""

import random

import pytest

from core.crash_search import CrashSearch
from tests.core.test_scheduler import Engine, make_scheduler, prompt_of, pseudo_token
from tests.support.null_worker import NullWorker


class WorkerCrashed(Exception):
    pass


class CrashingEngine(Engine):
    """The worker crashes whenever it computes a poisonous request at or past a number of tokens.

    Does what the core and the launcher do about it.
    """

    def __init__(self, poison: dict[int, int], num_requests: int, depth: int = 2, num_stray_crashes: int = 0) -> None:
        scheduler = make_scheduler(max_num_seqs=32, num_blocks=2000)
        super().__init__(scheduler, depth, self.next_token)
        self.poison = poison
        self.num_crashes = 0
        self.num_stray_crashes = num_stray_crashes
        self.blamed: list[int] = []
        self.search = CrashSearch(scheduler)
        for request_id in range(num_requests):
            self.add(request_id, prompt_of(request_id, 5 + request_id), max_tokens=30, ignore_eos=True)

    def next_token(self, seed: int, position: int, total: int) -> int:
        if position >= self.poison.get(seed, 1000):
            raise WorkerCrashed
        if self.num_stray_crashes and position == 20:
            self.num_stray_crashes -= 1
            raise WorkerCrashed
        return max(2, pseudo_token(seed, position, total))

    def survive(self) -> None:
        self.num_crashes += 1
        self.worker = NullWorker(self.scheduler.config.block_size, self.worker.rule)
        culprit = self.search.crashed(self.scheduler.restart(self.scheduler.epoch + 1))
        if culprit is not None:
            self.blamed.append(culprit.request_id)
            failed = self.scheduler.fail(culprit, "it crashes the worker")
            self.failed[failed.request_id] = failed.message
        self.search.advance()

    def run(self) -> None:
        while not self.search.is_hopeless:
            try:
                while self.send():
                    pass
            except WorkerCrashed:
                self.survive()
                continue
            if not self.scheduler.num_in_flight:
                assert not self.search.is_running
                return
            self.receive()
            if self.search.is_running:
                self.search.advance()

    def check_survivors(self) -> None:
        for request_id, prompt in self.prompts.items():
            tokens, expected = list(prompt), []
            while len(expected) < min(30, 64 - len(prompt)):
                expected.append(max(2, pseudo_token(request_id, len(tokens), sum(tokens))))
                tokens.append(expected[-1])
            if request_id in self.failed:
                assert self.tokens[request_id] == expected[: len(self.tokens[request_id])]
            else:
                assert self.tokens[request_id] == expected
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("poison", [{7: 20}, {0: 5}, {24: 40}, {3: 12, 19: 30}, {1: 10, 2: 10, 3: 10}])
def test_who_crashes_the_worker_is_found_and_the_others_go_on(poison: dict[int, int], depth: int) -> None:
    engine = CrashingEngine(poison, 25, depth)
    engine.run()
    assert sorted(engine.blamed) == sorted(poison)
    # A crash for each halving of 25, for each of them.
    assert engine.num_crashes <= 6 * len(poison)
    engine.check_survivors()


def test_a_crash_that_does_not_happen_again_is_nobodys_fault() -> None:
    engine = CrashingEngine({}, 25, num_stray_crashes=1)
    engine.run()
    assert engine.num_crashes == 1
    assert engine.blamed == []
    engine.check_survivors()


def test_what_arrives_during_the_search_waits_for_its_end() -> None:
    engine = CrashingEngine({4: 15}, 9)
    late: list[int] = []
    survive = engine.survive

    def survive_with_arrivals() -> None:
        survive()
        request_id = 100 + engine.num_crashes
        late.append(request_id)
        engine.add(request_id, prompt_of(request_id, 6), max_tokens=5, ignore_eos=True)

    engine.survive = survive_with_arrivals  # type: ignore[method-assign]
    engine.run()
    assert engine.blamed == [4]
    assert len(late) == engine.num_crashes
    assert all(len(engine.tokens[request_id]) == 5 for request_id in late)


def test_a_suspect_that_is_aborted_does_not_hold_up_the_search() -> None:
    engine = CrashingEngine({4: 15}, 9)
    survive = engine.survive

    def survive_with_aborts() -> None:
        survive()
        if engine.num_crashes == 2:
            for request_id in (0, 1, 2, 3, 4):
                engine.abort(request_id)
            engine.search.advance()

    engine.survive = survive_with_aborts  # type: ignore[method-assign]
    engine.run()
    assert engine.blamed == []
    assert all(len(engine.tokens[request_id]) == 30 for request_id in range(5, 9))


class KilledEngine(CrashingEngine):
    """Beside the crashes, somebody kills the worker at some of its answers."""

    def __init__(self, kills: list[int], poison: dict[int, int], num_requests: int) -> None:
        super().__init__(poison, num_requests)
        self.kills = kills
        self.num_answers = 0

    def receive(self) -> None:
        self.num_answers += 1
        if self.num_answers in self.kills:
            self.lose_worker()
            self.search.interrupted()
        else:
            super().receive()


def test_a_kill_from_outside_blames_nobody_and_does_not_end_the_search() -> None:
    rng = random.Random(0)
    for _ in range(20):
        engine = KilledEngine(rng.sample(range(60), 4), {7: 20}, 12)
        engine.run()
        assert engine.blamed == [7]
        engine.check_survivors()


def test_who_is_left_of_a_crash_is_tested_before_it_is_blamed() -> None:
    engine = CrashingEngine({0: 8}, 2)
    survive = engine.survive

    def survive_after_a_leave() -> None:
        if engine.num_crashes == 0:
            # Request 0 hangs the worker, and its client has left when that is noticed.
            engine.abort(0)
        survive()

    engine.survive = survive_after_a_leave  # type: ignore[method-assign]
    engine.run()
    assert engine.num_crashes == 1
    assert engine.blamed == []
    assert len(engine.tokens[1]) == 30


def test_a_worker_that_dies_while_it_starts_clears_nobody() -> None:
    engine = CrashingEngine({4: 15}, 9)
    survive = engine.survive

    def survive_twice() -> None:
        survive()
        if engine.num_crashes in (2, 3):
            # The group is chosen, and the next worker ends before it has computed anything.
            assert engine.search.crashed(engine.scheduler.restart(engine.scheduler.epoch + 1)) is None
            engine.search.advance()

    engine.survive = survive_twice  # type: ignore[method-assign]
    engine.run()
    assert engine.blamed == [4]
    engine.check_survivors()


def test_a_worker_that_crashes_whatever_it_computes_is_not_the_requests_fault() -> None:
    engine = CrashingEngine(dict.fromkeys(range(25), 0), 25)
    engine.run()
    assert engine.search.is_hopeless
    assert len(engine.blamed) == 8
    assert engine.num_crashes < 25
