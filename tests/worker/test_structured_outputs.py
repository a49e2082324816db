"""Grammars in the engine: an answer depends on grammar, seed and prompt alone, however the work was cut or repeated."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tokenizers

from frontend.structured_output import answer_grammar
from frontend.tool_choice import Tools
from protocol.messages import AddRequest, Finished, StepOutputs, pack_ints, unpack_ints
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams
from tests.support.engine import InProcessEngine
from tests.support.models import MODEL_DIR
from tests.support.schemas import DIGIT, record

TOKENIZER = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
LIST = {"type": "array", "items": record({"a": DIGIT, "b": {"type": "boolean"}}), "minItems": 3, "maxItems": 4}
# Blocks for the longest sequence and a short one, so that what runs together cannot all stay.
FEW_BLOCKS = 9


def make_engine(**options: Any) -> InProcessEngine:
    return InProcessEngine(
        MODEL_DIR, **{"device": "cpu", "max_model_len": 128, "kv_cache_memory": "16MiB", "num_threads": 1, **options}
    )


def grammar_of(schema: object) -> str:
    return answer_grammar(StructuredOutputsParams(json=schema), "over", Tools(), set())


@pytest.fixture(scope="module")
def requests() -> tuple[list[list[int]], list[SamplingParams], list[str | None]]:
    """Two in three follow a grammar. The prompts are of mixed length."""
    chooser = random.Random(0)
    prompts = [chooser.choices(range(1000), k=chooser.randint(1, 60)) for _ in range(12)]
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=70) for seed in range(12)]
    grammars = [grammar_of(LIST) if seed % 3 else None for seed in range(12)]
    return prompts, params, grammars


@pytest.fixture(scope="module")
def alone(requests: tuple) -> list[list[int]]:
    """What each request answers when nothing runs beside it."""
    engine = make_engine(async_scheduling=False, max_num_seqs=1)
    return [
        engine.generate([prompt], params, grammars=[grammar])[0]
        for prompt, params, grammar in zip(*requests, strict=True)
    ]


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["two-steps", "one-step"])
@pytest.mark.parametrize("budget", [16, 8192], ids=["chunked", "whole"])
@pytest.mark.parametrize("num_blocks", [FEW_BLOCKS, None], ids=["few-blocks", "blocks"])
def test_answers_are_those_of_each_request_alone(
    requests: tuple, alone: list[list[int]], async_scheduling: bool, budget: int, num_blocks: int | None
) -> None:
    engine = make_engine(
        async_scheduling=async_scheduling,
        max_num_batched_tokens=budget,
        max_num_seqs=16,
        num_gpu_blocks_override=num_blocks,
    )
    prompts, params, grammars = requests
    answers = engine.generate(prompts, params, grammars=grammars)
    assert answers == alone
    assert (engine.scheduler.stats().num_preemptions > 0) == (num_blocks is not None)
    for index, (answer, grammar) in enumerate(zip(answers, grammars, strict=True)):
        if grammar is not None:
            assert engine.ended[index].reason == "stop"
            assert engine.ended[index].is_complete, "no step is spent on an end-of-sequence token"
            assert 3 <= len(json.loads(TOKENIZER.decode(answer))) <= 4
    stats = engine.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_requests_that_end_while_masks_are_due_leave_the_others_alone(requests: tuple, alone: list[list[int]]) -> None:
    """Aborted at random between a step and its masks, its tokens, and the next step."""
    engine = make_engine(max_num_seqs=8)
    chooser = random.Random(1)
    tokens: dict[int, list[int]] = {}
    finished: dict[int, Finished] = {}
    for request_id, (prompt, params, grammar) in enumerate(zip(*requests, strict=True)):
        tokens[request_id] = []
        engine.scheduler.add(0, AddRequest(request_id, pack_ints(prompt), params, grammar=grammar))
        if grammar is not None:
            engine.start_grammar((0, request_id), grammar)
    doomed = set(chooser.sample(range(12), 6))
    take = engine.scheduler.take_masked_rows

    def abort_one_then_take() -> object:
        if doomed - finished.keys() and chooser.random() < 0.3:
            victim = chooser.choice(sorted(doomed))
            engine.scheduler.abort(0, [victim])
        return take()

    engine.scheduler.take_masked_rows = abort_one_then_take  # type: ignore[method-assign]
    for message in engine.run():
        assert isinstance(message, StepOutputs), message
        ids = unpack_ints(message.request_ids, "<i8").tolist()
        for request_id, token in zip(ids, unpack_ints(message.token_ids).tolist(), strict=True):
            tokens[request_id].append(token)
        finished |= {each.request_id: each for each in message.finished}
    assert engine.scheduler.stats().aborted_requests > 2
    assert set(range(12)) - doomed <= finished.keys()
    assert [tokens[i] for i in finished] == [alone[i] for i in finished]


def test_others_overtake_a_request_that_waits_for_its_grammar() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=70)
    engine.scheduler.add(0, AddRequest(1000, pack_ints([1, 2, 3]), params, grammar=grammar_of(LIST)))
    assert len(engine.generate([[4, 5]], params)[0]) > 0
    assert engine.scheduler.stats().num_waiting == 1
    engine.start_grammar((0, 1000), grammar_of(LIST))
    reasons = [finished.reason for message in engine.run() for finished in message.finished]
    assert reasons == ["stop"]


def test_a_request_that_ends_while_its_grammar_compiles_is_forgotten() -> None:
    engine = make_engine()
    request = AddRequest(1, pack_ints([1, 2, 3]), SamplingParams(), grammar=grammar_of(LIST))
    engine.scheduler.add(0, request)
    engine.scheduler.abort(0, [1])
    engine.start_grammar((0, 1), grammar_of(LIST))
    assert engine.scheduler.schedule() is None
    assert engine.scheduler.stats().num_waiting == engine.scheduler.queued_work().tokens == 0


def test_a_grammar_that_cannot_be_compiled_fails_its_request() -> None:
    engine = make_engine()
    engine.scheduler.add(0, AddRequest(1, pack_ints([1, 2, 3]), SamplingParams(), grammar="start: <nope>"))
    failed = engine.compile_grammar((0, 1), "start: <nope>")
    assert failed is not None
    assert (failed.kind, failed.param) == ("invalid_request", "structured_outputs")
    assert "unknown special token" in failed.message
    assert engine.scheduler.stats().num_waiting == engine.scheduler.queued_work().tokens == 0


def test_where_options_leave_no_token_the_request_fails_and_says_so() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=1.0, allowed_token_ids=[70], structured_outputs=None)
    grammar = answer_grammar(StructuredOutputsParams(choice=("yes",)), "over", Tools(), set())
    engine.scheduler.add(0, AddRequest(1, pack_ints([1, 2, 3]), params, grammar=grammar))
    engine.start_grammar((0, 1), grammar)
    messages = [getattr(message, "message", "") for message in engine.run()]
    assert any("structured_outputs and allowed_token_ids leave none" in message for message in messages)


def test_a_step_without_masks_is_sent_as_before() -> None:
    engine = make_engine()
    engine.scheduler.add(0, AddRequest(1, pack_ints([1, 2, 3]), SamplingParams()))
    step = engine.scheduler.schedule()
    assert step is not None
    assert not step.needs_masks
    assert engine.scheduler.take_masked_rows() is None
