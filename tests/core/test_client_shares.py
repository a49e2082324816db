"""The cap on what one client may hold when blocks are short: who goes first then, and that it costs nobody his turn."""

from typing import Any

import pytest

from tests.core.test_scheduler import BLOCK_SIZE, Engine, make_scheduler, prompt_of

FLOODER, OTHER, THIRD = 1, 2, 3
NUM_BLOCKS = 24
PROMPT = 4 * BLOCK_SIZE - 1


def flooded_engine(num_requests: int = 20, **changes: Any) -> Engine:
    """One client has sent so many requests that those that run hold most of the blocks; ids count from 0."""
    config = {"num_blocks": NUM_BLOCKS + 1, "max_client_share": 0.5, "enable_prefix_caching": False} | changes
    engine = Engine(make_scheduler(**config), rule=lambda *_: 9)
    for request_id in range(num_requests):
        engine.add(request_id, prompt_of(request_id, PROMPT), max_tokens=8, client=FLOODER)
    engine.send()
    return engine


def run_in_order(engine: Engine) -> list[int]:
    """The requests in the order in which they ended."""
    order: list[int] = []
    while engine.send() or engine.scheduler.num_in_flight:
        while engine.send():
            pass
        engine.receive()
        order += sorted(engine.ends.keys() - set(order))
    return order


@pytest.mark.parametrize("max_client_share", [0.5, 1.0])
def test_a_newcomer_goes_before_the_queue_of_one_who_holds_too_much(max_client_share: float) -> None:
    engine = flooded_engine(max_client_share=max_client_share)
    running = engine.scheduler.stats().num_running
    assert running < 8, "blocks are to be short, not slots"
    engine.add(100, prompt_of(100, PROMPT), max_tokens=8, client=OTHER)
    order = run_in_order(engine)
    assert len(order) == 21
    if max_client_share < 1:
        assert order.index(100) <= 2 * running
    else:
        assert order.index(100) == 20


def test_nobody_is_passed_over_while_no_other_client_waits() -> None:
    order = run_in_order(flooded_engine())
    assert order == sorted(order)
    alone = flooded_engine()
    shared = flooded_engine()
    shared.add(100, prompt_of(100, PROMPT), max_tokens=1, client=OTHER)
    run_in_order(alone)
    run_in_order(shared)
    assert shared.scheduler.stats().num_steps <= alone.scheduler.stats().num_steps + 8


def test_plenty_of_blocks_leave_the_order_as_it_is() -> None:
    engine = flooded_engine(num_blocks=500, max_num_seqs=4)
    engine.add(100, prompt_of(100, PROMPT), max_tokens=8, client=OTHER)
    assert run_in_order(engine) == [*range(20), 100]


def test_one_who_holds_too_much_is_preempted_before_later_arrivals_of_others() -> None:
    engine = flooded_engine(3, num_blocks=21)
    engine.add(100, prompt_of(100, PROMPT), max_tokens=12, client=OTHER)
    while not engine.scheduler.stats().num_preemptions:
        engine.send() or engine.receive()
    running = {request.request_id for request in engine.scheduler._running}
    assert 100 in running
    assert 0 in running, "the first of each client is spared"
    engine.run()
    assert len(engine.ends) == 4


def test_a_request_larger_than_a_share_ends_beside_a_stream_of_small_ones() -> None:
    engine = flooded_engine(1, max_client_share=0.1)
    engine.add(50, prompt_of(50, 40), max_tokens=20, client=THIRD)
    next_id = 100
    for _ in range(400):
        if engine.scheduler.stats().num_waiting < 4:
            engine.add(next_id, prompt_of(next_id, PROMPT), max_tokens=8, client=OTHER)
            next_id += 1
        engine.send() or engine.receive()
        if 50 in engine.ends:
            return
    pytest.fail("the large request did not end")


def test_one_who_was_passed_over_gets_his_share_beside_others_that_keep_coming() -> None:
    engine = flooded_engine(12)
    next_id = 100
    for _ in range(2000):
        if engine.scheduler.stats().num_waiting < 20:
            engine.add(next_id, prompt_of(next_id, PROMPT), max_tokens=8, client=OTHER + next_id % 2)
            next_id += 1
        engine.send() or engine.receive()
        if all(request_id in engine.ends for request_id in range(12)):
            return
    pytest.fail(f"only {sorted(i for i in engine.ends if i < 12)} of the first client ended")


def test_requests_passed_over_keep_their_order_among_themselves() -> None:
    engine = flooded_engine()
    engine.add(100, prompt_of(100, PROMPT), max_tokens=8, client=OTHER)
    engine.add(50, prompt_of(50, PROMPT), max_tokens=8, client=FLOODER, priority=-1)
    order = run_in_order(engine)
    mine = [request_id for request_id in order if request_id not in (50, 100)]
    assert mine == sorted(mine)
    assert order.index(50) < 12


def test_requests_that_are_aborted_while_passed_over_leave_nothing() -> None:
    engine = flooded_engine()
    engine.add(100, prompt_of(100, PROMPT), max_tokens=8, client=OTHER)
    while 100 not in engine.tokens or not engine.tokens[100]:
        engine.send() or engine.receive()
    for request_id in range(20):
        engine.abort(request_id)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert engine.scheduler._waiting.num_tokens == 0
