"""Log-probabilities of generated and of prompt tokens equal transformers', however the work was cut and repeated."""

from collections.abc import Sequence

import pytest
import torch

from protocol.logprobs import TokenLogprob
from protocol.sampling import SamplingParams
from tests.support.engine import InProcessEngine
from tests.support.models import MODEL_DIR, random_prompts, reference_model

TOLERANCE = 1e-4
OPTIONS = {"device": "cpu", "max_model_len": 224, "kv_cache_memory": "32MiB", "num_threads": 1}
PROMPTS = random_prompts(14, 1000)
VOCAB = reference_model(MODEL_DIR).config.vocab_size
WAYS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 24, "max_num_seqs": 8},
        {"max_num_seqs": 8, "num_gpu_blocks_override": 16},
    ],
    ids=["together", "one step at a time", "chunked", "preempted"],
)


def reference_logprobs(sequence: list[int]) -> torch.Tensor:
    """[tokens, vocab]: row i is the distribution of token i + 1."""
    with torch.inference_mode():
        return reference_model(MODEL_DIR)(torch.tensor([sequence])).logits[0].float().log_softmax(-1)


def assert_measured(measured: TokenLogprob, token: int, expected: torch.Tensor, width: int) -> None:
    """`expected` is [vocab]. Which of two equals comes first is left open."""
    assert abs(measured.logprob - float(expected[token])) < TOLERANCE
    assert (expected > measured.logprob + TOLERANCE).sum() < measured.rank
    assert measured.rank <= (expected > measured.logprob - TOLERANCE).sum()
    assert len(set(measured.top_ids)) == len(measured.top_ids) == len(measured.top_logprobs) == width
    torch.testing.assert_close(torch.tensor(measured.top_logprobs), expected.topk(width).values, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(expected[measured.top_ids], torch.tensor(measured.top_logprobs), atol=TOLERANCE, rtol=0)


def assert_answer_is_measured(
    prompt: list[int], answer: list[int], measured: Sequence[TokenLogprob], width: int
) -> None:
    assert len(measured) == len(answer)
    expected = reference_logprobs(prompt + answer)
    for index, token in enumerate(answer):
        assert_measured(measured[index], token, expected[len(prompt) + index - 1], width)


def assert_prompt_is_measured(prompt: list[int], measured: dict[int, TokenLogprob], width: int) -> None:
    assert sorted(measured) == list(range(1, len(prompt)))
    expected = reference_logprobs(prompt)
    for position, entry in measured.items():
        assert_measured(entry, prompt[position], expected[position - 1], width)


@WAYS
def test_logprobs_of_answers_equal_transformers(options: dict) -> None:
    """They are of the model's own distribution, whatever the options make of it."""
    engine = InProcessEngine(MODEL_DIR, **(OPTIONS | options))
    params = [
        SamplingParams(
            temperature=0.9 * (index % 2), top_p=0.9, seed=index, max_tokens=24, ignore_eos=True,
            logprobs=(5, 0, 20, -1, None)[index % 5], repetition_penalty=1 + 0.3 * (index % 3),
            logit_bias={7: 5.0} if index % 4 == 0 else None,
        )
        for index in range(len(PROMPTS))
    ]  # fmt: skip
    answers = engine.generate(PROMPTS, params)
    for prompt, each, answer, measured in zip(PROMPTS, params, answers, engine.logprobs, strict=True):
        if each.logprobs is None:
            assert measured == []
        else:
            width = VOCAB if each.logprobs == -1 else each.logprobs
            narrowed = [entry.narrowed(width) for entry in measured]
            assert_answer_is_measured(prompt, answer, narrowed, width)
    assert (engine.scheduler.stats().num_preemptions > 0) == ("num_gpu_blocks_override" in options)
    # Who asks for them gets no other tokens, and neither does who runs beside.
    without = [SamplingParams(**{**as_dict(each), "logprobs": None}) for each in params]
    assert engine.generate(PROMPTS, without) == answers


def as_dict(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__struct_fields__}


@WAYS
def test_logprobs_of_prompts_equal_transformers(options: dict) -> None:
    engine = InProcessEngine(MODEL_DIR, **(OPTIONS | options))
    widths = [(3, 0, 20, None, 1, -1)[index % 6] for index in range(len(PROMPTS))]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=30,
            ignore_eos=True,
            prompt_logprobs=width,
            logprobs=0 if index % 2 else None,
        )
        for index, width in enumerate(widths)
    ]
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected_answers = engine.generate(PROMPTS, plain)  # fills the prefix cache, which must not be asked
    assert engine.generate(PROMPTS, params) == expected_answers
    for prompt, width, measured in zip(PROMPTS, widths, engine.prompt_logprobs, strict=True):
        if width is None:
            assert measured == {}
        else:
            assert_prompt_is_measured(prompt, measured, VOCAB if width == -1 else width)
    for prompt, each, answer, measured in zip(PROMPTS, params, expected_answers, engine.logprobs, strict=True):
        if each.logprobs is not None:
            assert_answer_is_measured(prompt, answer, [entry.narrowed(0) for entry in measured], 0)
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == ("num_gpu_blocks_override" in options)
    assert stats.num_free_blocks == stats.num_blocks


def test_a_measured_prompt_fills_the_prefix_cache_and_does_not_read_it() -> None:
    engine = InProcessEngine(MODEL_DIR, **OPTIONS)
    prompt = PROMPTS[9]
    measured = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    for _ in range(2):
        engine.generate([prompt], measured)
        assert_prompt_is_measured(prompt, engine.prompt_logprobs[0], 0)
    assert engine.scheduler.stats().prefix_cache_hits == 0
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert engine.scheduler.stats().prefix_cache_hits > 0
