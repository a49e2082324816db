"""Greedy answers equal transformers', however the engine cut, cached, overlapped or repeated the work."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from core.step_time import RelativeCosts, StepTimeModel, StepWork
from protocol.messages import AddRequest, pack_ints, unpack_ints
from protocol.model_config import load_model_config
from protocol.sampling import SamplingParams
from tests.support.engine import InProcessEngine
from tests.support.models import MODEL_DIR, greedy_reference, make_random_model, random_prompts, reference_model

MAX_TOKENS = 40
# Blocks for one sequence at its longest and a few short ones, so that what runs together cannot all stay.
FEW_BLOCKS = 18


Case = tuple[Path, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def made_cases() -> dict[str, Case]:
    """Those there are, since making one takes seconds."""
    return {}


@pytest.fixture(params=["bundled", "random"])
def case(request: pytest.FixtureRequest, made_cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """(model, 64 prompts, what transformers answers)."""
    if request.param not in made_cases:
        is_bundled = request.param == "bundled"
        model = MODEL_DIR if is_bundled else make_random_model(tmp_path_factory.mktemp("random-qwen3"))
        prompts = random_prompts(64, reference_model(model).config.vocab_size)
        # Some share their beginning, so that the prefix cache has something to find.
        prompts[40:50] = [[*prompts[9][:64], *prompt[:20]] for prompt in prompts[40:50]]
        made_cases[request.param] = model, prompts, greedy_reference(model, prompts, MAX_TOKENS)
    return made_cases[request.param]


def every_combination_on_one_model() -> list[Any]:
    """Parameters with each combination of ways to run, on one of the models, and any four of the five choices."""
    parameters = []
    choices = (
        {"bundled": "bundled", "random": "random"},
        {"few-blocks": FEW_BLOCKS, "blocks": None},
        {"chunked": 16, "whole": 8192},
        {"caching": True, "no-caching": False},
        {"two-steps": True, "one-step": False},
    )
    for picked in product(*(enumerate(choice.items()) for choice in choices)):
        if sum(index for index, _ in picked) % 2 == 0:
            names, values = zip(*(item for _, item in picked))
            parameters.append(pytest.param(*values, id="-".join(names)))
    return parameters


@pytest.mark.parametrize(
    ("case", "num_blocks", "budget", "caching", "async_scheduling"), every_combination_on_one_model(), indirect=["case"]
)
def test_greedy_tokens_equal_transformers(
    case: Case,
    num_blocks: int | None,
    budget: int,
    caching: bool,
    async_scheduling: bool,
) -> None:
    model, prompts, expected = case
    engine = InProcessEngine(
        model,
        device="cpu",
        async_scheduling=async_scheduling,
        enable_prefix_caching=caching,
        max_num_batched_tokens=budget,
        max_num_seqs=16 if budget == 16 or num_blocks else 64,
        max_model_len=192,
        num_gpu_blocks_override=num_blocks,
        kv_cache_memory="64MiB",
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    assert engine.generate(prompts, params) == expected
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == (num_blocks is not None)
    assert stats.num_free_blocks == stats.num_blocks
    if caching:
        hits_before = stats.prefix_cache_hits
        assert engine.generate(prompts, params) == expected, "with a warm prefix cache"
        assert engine.scheduler.stats().prefix_cache_hits > hits_before


@pytest.mark.parametrize("num_blocks", [FEW_BLOCKS, None], ids=["few-blocks", "blocks"])
def test_greedy_tokens_are_the_same_when_step_time_is_bounded(case: Case, num_blocks: int | None) -> None:
    model, prompts, expected = case
    step_time = StepTimeModel(1e-3, RelativeCosts(pair=1e-3, cached_token=1e-3), min_chunk=16)
    # Decodes are fast and prefill slow, so that all but the first prompts come in chunks of a block.
    step_time.observe(StepWork(context=100), 1e-9)
    step_time.observe(StepWork(context=0, tokens=100), 1.0)
    options = {"device": "cpu", "max_num_seqs": 16, "max_model_len": 192, "kv_cache_memory": "64MiB"}
    engine = InProcessEngine(model, step_time, **options, num_gpu_blocks_override=num_blocks)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    assert engine.generate(prompts, params) == expected
    unbounded = InProcessEngine(model, **options, num_gpu_blocks_override=num_blocks)
    assert unbounded.generate(prompts, params) == expected
    assert engine.scheduler.stats().num_steps > unbounded.scheduler.stats().num_steps


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("num_blocks", [FEW_BLOCKS, None], ids=["few-blocks", "blocks"])
def test_greedy_tokens_are_the_same_when_prompts_are_computed_layer_by_layer(
    case: Case,
    num_blocks: int | None,
    caching: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Or else so many prompts at once would not be bounded in time.
    monkeypatch.setattr("core.step_time.MOST_STEPS_OF_QUEUE", 1_000_000)
    model, prompts, expected = case
    num_layers = load_model_config(model).num_layers
    # A step has room for a layer or two of most prompts. Short ones come between the layers of longer ones.
    step_time = StepTimeModel(1e-3, RelativeCosts(1e-6, 1e-6, num_layers), min_chunk=16, least_layered=32)
    step_time.observe(StepWork(context=100), 1e-9)
    step_time.observe(StepWork(context=0, tokens=100), 3e-3)
    engine = InProcessEngine(
        model,
        step_time,
        device="cpu",
        max_num_seqs=16,
        max_model_len=192,
        kv_cache_memory="64MiB",
        enable_prefix_caching=caching,
        num_gpu_blocks_override=num_blocks,
    )
    begun = []
    engine.runner.program.layered.begin = _counted(engine.runner.program.layered.begin, begun)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    assert engine.generate(prompts, params) == expected
    assert len(begun) > 10
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == (num_blocks is not None)
    assert stats.num_free_blocks == stats.num_blocks


def test_a_prompt_may_share_a_block_that_a_decode_fills_beside_its_first_layers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.step_time.MOST_STEPS_OF_QUEUE", 1_000_000)
    model, prompts, _ = case
    options = {"device": "cpu", "max_num_seqs": 16, "max_model_len": 192, "kv_cache_memory": "64MiB"}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    first = next(prompt for prompt in prompts if len(prompt) >= 15)[:15]
    (answer,) = InProcessEngine(model, **options).generate([first], params)
    # It begins with the other's prompt and first token: a block, which is full with the step after that token's.
    second = [*first, answer[0], *next(prompt for prompt in prompts if len(prompt) > 100)]
    (expected,) = InProcessEngine(model, **options).generate([second], params)
    step_time = StepTimeModel(
        1e-3, RelativeCosts(1e-6, 1e-6, load_model_config(model).num_layers), min_chunk=16, least_layered=32
    )
    step_time.observe(StepWork(context=100), 1e-9)
    step_time.observe(StepWork(context=0, tokens=100), 3e-3)
    engine = InProcessEngine(model, step_time, **options)
    scheduler, tokens, shared = engine.scheduler, {}, []

    def turns(count: int) -> None:
        for _ in range(count):
            step = scheduler.schedule()
            if step is None:
                break
            shared.extend((step.prefill_num_layers, each.num_computed_tokens) for each in step.admitted)
            for _, message in scheduler.apply(engine.runner.execute(step).result()).messages(0):
                ids, drawn = unpack_ints(message.request_ids, "<i8").tolist(), unpack_ints(message.token_ids).tolist()
                for request_id, token in zip(ids, drawn, strict=True):
                    tokens.setdefault(request_id, []).append(token)

    # Another one decodes, so that time is bounded.
    for request_id, prompt, count in ((0, prompts[0], 2), (1, first, 1), (2, second, 200)):
        scheduler.add(0, AddRequest(request_id, pack_ints(prompt), params))
        turns(count)
    assert shared[-1][0] > 0, "the prompt was not computed layer by layer"
    assert shared[-1][1] == 16, "no block was shared"
    assert tokens[1] == answer
    assert tokens[2] == expected


def _counted(function: Callable[..., None], calls: list[tuple]) -> Callable[..., None]:
    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        function(*arguments)

    return counted


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_seeded_draws_do_not_depend_on_the_batch(temperature: float) -> None:
    prompts = random_prompts(12, 300)
    params = [
        SamplingParams(
            temperature=temperature,
            top_p=0.9,
            top_k=40 * (i % 2),
            min_p=0.02 * (i % 3),
            seed=i,
            max_tokens=40,
            ignore_eos=True,
        )
        for i in range(12)
    ]
    options = {"device": "cpu", "max_model_len": 256, "kv_cache_memory": "32MiB"}
    together = InProcessEngine(MODEL_DIR, **options).generate(prompts, params)
    alone = InProcessEngine(MODEL_DIR, **options, async_scheduling=False, enable_prefix_caching=False)
    assert [alone.generate([prompt], [each])[0] for prompt, each in zip(prompts, params)] == together
    crowded = InProcessEngine(
        MODEL_DIR, **(options | {"max_model_len": 224}), num_gpu_blocks_override=16, max_num_seqs=8
    )
    assert crowded.generate(prompts, params) == together
    assert crowded.scheduler.stats().num_preemptions > 0


def test_requests_without_a_seed_differ() -> None:
    engine = InProcessEngine(MODEL_DIR, device="cpu", kv_cache_memory="32MiB", max_model_len=256)
    answers = engine.generate([[10, 20, 30]] * 8, SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True))
    assert len({tuple(answer) for answer in answers}) == 8
