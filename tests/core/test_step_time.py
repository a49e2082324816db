"""What the model of step times learns, what it takes no notice of, and the chunks that follow from it."""

import math
import random
from pathlib import Path

import pytest

from core.prefill_budget import TILE_TOKENS, PrefillBudget, num_pairs
from core.step_time import (
    ATTENTION_FLOP,
    MIN_CHUNK,
    MOST_STEPS_OF_QUEUE,
    PREFILL_PER_DECODE,
    UNMEASURED_CHUNK,
    RelativeCosts,
    StepClock,
    StepTimeModel,
    StepWork,
)
from protocol.messages import LEAST_LAYERED_TOKENS
from protocol.model_config import load_model_config
from tests.support.step_times import gpu_seconds

ROOT = Path(__file__).resolve().parents[2]
COSTS = RelativeCosts(pair=2.6e-4, cached_token=4.8e-5)
BUDGET = 8192
BLOCK_SIZE = 16
NUM_STREAMS = 64
STREAMS = StepWork(context=NUM_STREAMS * 400)


def prefill(start: int, length: int, context: int = 0) -> StepWork:
    return StepWork(context, length, num_pairs(start, length))


def chunk(model: StepTimeModel, start: int = 0, context: int = STREAMS.context, queued: int = 0) -> int:
    """Tokens of a long prompt's next chunk."""
    queue = StepWork(0, queued, num_pairs(start, queued))
    return model.prefill_budget(BUDGET, BLOCK_SIZE, NUM_STREAMS, context, queue).take(start, 100_000)


def taught_model(max_seconds: float = 8e-3) -> StepTimeModel:
    model = StepTimeModel(max_seconds, COSTS)
    for work in (STREAMS, prefill(0, 2048), prefill(2048, 1024, STREAMS.context)) * 5:
        model.observe(work, gpu_seconds(work))
    return model


def test_costs_are_the_model_s_flops_and_bytes() -> None:
    costs = RelativeCosts.of(load_model_config(ROOT / "benchmarks/models/qwen3-0.6b"))
    weights_per_layer = 1024 * (16 + 8 + 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072
    assert costs.pair == pytest.approx(ATTENTION_FLOP * 4 * 16 * 128 / (2 * weights_per_layer))
    weights = 28 * weights_per_layer + 151_936 * 1024
    assert costs.cached_token == pytest.approx(114_688 / (2 * 2 * weights))


@pytest.mark.parametrize("start", [0, 16, 4096, 30_000])
def test_a_chunk_comes_as_near_to_the_bound_as_whole_tiles_do(start: int) -> None:
    model = taught_model()
    work = prefill(start, chunk(model, start), STREAMS.context)

    def predicted(tokens: int) -> float:
        return model.decode_seconds(STREAMS.context) + model.prefill_seconds(tokens, num_pairs(start, tokens))

    if NUM_STREAMS + work.tokens >= 4 * TILE_TOKENS:
        assert (NUM_STREAMS + work.tokens) % TILE_TOKENS == 0
        # The longest that fits, whose last token may be cut off too, is rounded to the nearest tile.
        assert predicted(work.tokens - TILE_TOKENS // 2) <= 8e-3 < predicted(work.tokens + TILE_TOKENS // 2 + 1)
        assert gpu_seconds(work) == pytest.approx(8e-3, rel=0.1)
    else:  # of few tiles one more or less would be too much: it ends with a block
        assert (start + work.tokens) % BLOCK_SIZE == 0
        assert work.tokens == MIN_CHUNK or predicted(work.tokens) <= 8e-3 < predicted(work.tokens + BLOCK_SIZE)


def test_chunks_grow_with_the_bound() -> None:
    chunks = [chunk(taught_model(bound)) for bound in (9e-3, 12e-3, 16e-3, math.inf)]
    assert chunks == sorted(set(chunks))
    assert chunks[-1] == BUDGET


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("before", [None, 0.1, 30.0])
def test_model_converges(slower: float, before: float | None) -> None:
    """Within three steps of a long prompt, whatever was thought of the device before."""
    model = StepTimeModel(8e-3, COSTS)
    for work in (STREAMS, prefill(0, 2048)) * 5 if before else ():
        model.observe(work, before * gpu_seconds(work))
    start, times = 0, []
    for _ in range(3):
        model.observe(STREAMS, slower * gpu_seconds(STREAMS))
    for _ in range(6):
        work = prefill(start, chunk(model, start), STREAMS.context)
        times.append(slower * gpu_seconds(work))
        model.observe(work, times[-1])
        start += work.tokens
    target = max(8e-3, (1 + PREFILL_PER_DECODE) * slower * gpu_seconds(STREAMS))
    if work.tokens > MIN_CHUNK:
        assert times[3:] == pytest.approx([target] * 3, rel=0.25)
    else:
        assert times[-1] > target


@pytest.mark.parametrize("factor", [1e-4, 100.0], ids=["too short", "too long"])
@pytest.mark.parametrize("work", [STREAMS, prefill(0, 2048), prefill(2048, 1024, STREAMS.context)], ids=str)
def test_outlier_does_not_shrink_chunks(factor: float, work: StepWork) -> None:
    """Nor does it make them grow: a pause makes one step look long, and the next one short."""
    model = taught_model()
    before = chunk(model)
    model.observe(work, factor * gpu_seconds(work))
    model.observe(work, gpu_seconds(work) / factor)
    assert chunk(model) == pytest.approx(before, rel=0.1)


LAYERED_COSTS = RelativeCosts(pair=2.6e-4, cached_token=4.8e-5, num_layers=36)


def layers_at_once(model: StepTimeModel, length: int = LEAST_LAYERED_TOKENS) -> int:
    """Layers of a prompt of this length that the next step computes; 0 if it is cut instead."""
    queue = StepWork(0, length, num_pairs(0, length))
    budget = model.prefill_budget(BUDGET, BLOCK_SIZE, NUM_STREAMS, STREAMS.context, queue)
    length = budget.layered_length(0, length)
    return budget.take_layers(0, length, 0, budget.num_layers) if length else 0


@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_a_wrong_rate_of_layers_is_measured_again(slower: float) -> None:
    model = StepTimeModel(8e-3, LAYERED_COSTS)

    def seconds(work: StepWork) -> float:
        return slower * gpu_seconds(work)

    for work in (STREAMS, prefill(0, 2048), prefill(2048, 1024, STREAMS.context)) * 5:
        model.observe(work, seconds(work))
    before = layers_at_once(model)
    assert before > 0
    tokens, pairs = LEAST_LAYERED_TOKENS, num_pairs(0, LEAST_LAYERED_TOKENS)
    for factor in (100.0, 1.0):
        for _ in range(6):
            layers = layers_at_once(model)
            assert layers > 0
            part = StepWork(STREAMS.context, tokens * layers // 36, pairs * layers // 36, is_layered=True)
            model.observe(part, factor * seconds(part))
    assert layers_at_once(model) >= before


def test_noise_moves_chunks_little() -> None:
    chooser = random.Random(0)
    model = taught_model()
    expected, chunks = chunk(model), []
    for _ in range(200):
        work = chooser.choice([STREAMS, prefill(0, 2048), prefill(2048, 1024, STREAMS.context)])
        model.observe(work, gpu_seconds(work) * chooser.uniform(0.9, 1.1))
        chunks.append(chunk(model))
    assert min(chunks) > 0.75 * expected
    assert max(chunks) < 1.25 * expected


def test_short_prefills_teach_nothing() -> None:
    model = taught_model()
    before = chunk(model)
    for _ in range(10):
        work = prefill(0, MIN_CHUNK // 2 - 1, STREAMS.context)
        model.observe(work, 50 * gpu_seconds(work))
    assert chunk(model) == before


def test_a_long_queue_is_computed_in_larger_chunks_and_a_short_one_is_not() -> None:
    model = taught_model()
    bounded = chunk(model)
    assert 0.75 * bounded < chunk(model, queued=bounded * MOST_STEPS_OF_QUEUE // 2) <= bounded
    larger = chunk(model, queued=bounded * MOST_STEPS_OF_QUEUE * 2)
    assert bounded * 1.3 < larger <= bounded * 2.1  # attention grows with the chunk
    assert chunk(model, queued=10_000_000) == BUDGET


@pytest.mark.parametrize("length", [3_000, 8_192, 12_000])
def test_a_prompt_takes_as_few_steps_as_it_must_and_they_are_equal(length: int) -> None:
    model, start, times = taught_model(), 0, []
    while start < length:
        queue = StepWork(0, length - start, num_pairs(start, length - start))
        tokens = model.prefill_budget(BUDGET, BLOCK_SIZE, NUM_STREAMS, STREAMS.context, queue).take(
            start, length - start
        )
        times.append(model.prefill_seconds(tokens, num_pairs(start, tokens)))
        start += tokens
    decode, total = model.decode_seconds(STREAMS.context), model.prefill_seconds(length, num_pairs(0, length))
    bound = max(8e-3 - decode, PREFILL_PER_DECODE * decode)
    assert len(times) == math.ceil(total / bound - 0.05) > 1
    assert times == pytest.approx([total / len(times)] * len(times), rel=0.1)


@pytest.mark.parametrize("length", [60, 90, 100, 250])
def test_a_wrong_rate_is_corrected_by_the_little_that_it_leaves_room_for(length: int) -> None:
    """One absurd time, before any other, and then short prompts only, whatever their chunks come to."""
    model = StepTimeModel(8e-3, COSTS)
    for _ in range(5):
        model.observe(STREAMS, gpu_seconds(STREAMS))
    model.observe(prefill(0, 1024), 1.0)
    for _ in range(50):
        budget = model.prefill_budget(BUDGET, BLOCK_SIZE, NUM_STREAMS, STREAMS.context, StepWork(0))
        while budget.take(0, length):
            pass
        work = StepWork(STREAMS.context, budget.num_tokens, budget.num_pairs)
        model.observe(work, gpu_seconds(work))
    assert model.prefill_budget(BUDGET, BLOCK_SIZE, NUM_STREAMS, STREAMS.context, StepWork(0)).take(0, BUDGET) > 1500


def test_times_that_are_no_times_are_passed_over() -> None:
    model = taught_model()
    before = chunk(model)
    for _ in range(5):
        model.observe(STREAMS, 0.0)
        model.observe(prefill(0, 2048), -1.0)
    assert chunk(model) == before


def test_the_first_chunk_is_small_until_prefill_was_measured() -> None:
    model = StepTimeModel(8e-3, COSTS)
    first = chunk(model)
    assert UNMEASURED_CHUNK / 2 < first <= UNMEASURED_CHUNK
    model.observe(STREAMS, gpu_seconds(STREAMS))
    assert chunk(model) == first
    work = prefill(0, first, STREAMS.context)
    model.observe(work, gpu_seconds(work))
    assert chunk(model, first) == pytest.approx(chunk(taught_model(), first), rel=0.2)


def test_decodes_that_were_never_alone_are_learned_from_what_prefill_leaves() -> None:
    """As when many prompts come at once: the first step decodes nothing, and all that follow prefill something."""
    model = StepTimeModel(8e-3, COSTS)
    model.observe(prefill(0, 2048), gpu_seconds(prefill(0, 2048)))
    for _ in range(5):
        work = prefill(0, 1024, STREAMS.context)
        model.observe(work, gpu_seconds(work))
    assert model.decode_seconds(STREAMS.context) == pytest.approx(gpu_seconds(STREAMS), rel=0.1)


@pytest.mark.parametrize("slower", [3.0, 10.0])
def test_prompts_do_not_crawl_where_decodes_alone_take_the_bound(slower: float) -> None:
    model = StepTimeModel(1e-3, COSTS)
    for work in (STREAMS, prefill(0, 2048)) * 5:
        model.observe(work, slower * gpu_seconds(work))
    work = prefill(0, chunk(model), STREAMS.context)
    assert work.tokens > MIN_CHUNK
    assert gpu_seconds(work) == pytest.approx((1 + PREFILL_PER_DECODE) * gpu_seconds(STREAMS), rel=0.1)


def test_a_budget_counts_what_is_taken() -> None:
    budget = PrefillBudget(100, block_size=16)
    assert [budget.take(0, 40), budget.take(16, 50), budget.take(0, 40), budget.take(0, 40)] == [40, 50, 10, 0]
    assert budget.is_spent
    assert (budget.num_tokens, budget.num_pairs) == (100, 820 + 16 * 50 + 1275 + 55)


def test_several_short_prompts_share_the_work() -> None:
    budget = PrefillBudget(8192, block_size=16, work=1000)
    assert [budget.take(0, 300) for _ in range(5)] == [300, 300, 300, 124, 0]
    assert budget.is_spent


def test_a_chunk_that_time_cuts_ends_with_a_block() -> None:
    budget = PrefillBudget(8192, block_size=16, work=100, pair_cost=1e-4)
    length = budget.take(7, 1000)
    assert (7 + length) % 16 == 0
    assert 80 <= length <= 100


def test_a_step_may_always_hold_a_little_prefill() -> None:
    for work in (0.0, 1e-9, 10.0):
        assert PrefillBudget(8192, 16, work, min_tokens=64).take(16, 1000) == 64
        assert PrefillBudget(8192, 16, work, min_tokens=64).take(16, 64) == 64
        assert PrefillBudget(8192, 256, work, min_tokens=64).take(256, 1000) == 256
        assert PrefillBudget(40, 16, work, min_tokens=64).take(0, 1000) == 40
    budget = PrefillBudget(8192, 16, 0.0, min_tokens=64)
    assert [budget.take(0, 30), budget.take(0, 30), budget.take(0, 30)] == [30, 30, 0]


def test_a_step_begins_when_it_is_sent_or_the_one_before_is_done() -> None:
    clock = StepClock()
    clock.sent(10.0)
    clock.sent(10.5)
    assert clock.answered(11.0) == 1.0
    assert clock.answered(11.25) == 0.25
    clock.sent(20.0)
    assert clock.answered(20.5) == 0.5
