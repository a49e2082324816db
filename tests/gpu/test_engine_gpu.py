"""The engine on a GPU in bf16: graphs equal eager, backends agree, and the error is the number format's own."""

import gc
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from core.step_time import RelativeCosts, StepTimeModel, StepWork
from protocol.sampling import SamplingParams
from tests.support.engine import InProcessEngine
from tests.support.models import make_random_model, random_prompts, reference_model

VOCAB = 4096
# The number of blocks is set, since several engines share the device here, and processes where tests run in parallel.
OPTIONS = {
    "device": "cuda",
    "dtype": "bfloat16",
    "max_model_len": 1280,
    "max_num_seqs": 64,
    "num_gpu_blocks_override": 4096,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the 0.6B's layer shape, fewer layers and a smaller vocabulary."""
    return make_random_model(
        tmp_path_factory.mktemp("qwen3"),
        vocab_size=VOCAB,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.07,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(48, VOCAB, longest=1100)


def greedy(max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def engine(model: Path, step_time: StepTimeModel | None = None, **options: object) -> InProcessEngine:
    # Of the largest blocks as many as hold twice the others' tokens: with as many blocks, eight processes do not fit.
    has_large_blocks = options.get("attention_backend") == "flash_attn" or options.get("block_size") == 256
    blocks = {"num_gpu_blocks_override": 512} if has_large_blocks else {}
    return InProcessEngine(model, step_time, **(OPTIONS | blocks | options))


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> StepTimeModel:
    """Has room in a step for some layers of a prompt of more than 100 tokens, while others decode."""
    # Or else so many prompts at once would not be bounded in time.
    monkeypatch.setattr("core.step_time.MOST_STEPS_OF_QUEUE", 1_000_000)
    step_time = StepTimeModel(1e-3, RelativeCosts(1e-6, 1e-6, num_layers=8), min_chunk=16, least_layered=100)
    step_time.observe(StepWork(context=100), 1e-9)
    step_time.observe(StepWork(context=0, tokens=1000), 1e-2)
    return step_time


@dataclass(frozen=True)
class Bf16Error:
    """How far transformers' own bf16 is from its fp32 on the prompts, over all positions."""

    largest: float  # in any logit
    flips: float  # share of positions at which the most likely token is another

    @property
    def epsilon(self) -> float:
        """Answers may part where the fp32 reference's best logits are closer than this: one error for each token."""
        return 2 * self.largest


@pytest.fixture(scope="module")
def bf16_error(model: Path, prompts: list[list[int]]) -> Bf16Error:
    exact, halves = (reference_model(model, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16))
    largest, flips = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            expected, got = exact(ids).logits, halves(ids).logits.float()
        largest = max(largest, (got - expected).abs().max().item())
        flips += int((got.argmax(-1) != expected.argmax(-1)).sum())
    return Bf16Error(largest, flips / sum(map(len, prompts)))


def assert_equal_up_to_ties(
    model: Path, prompts: list[list[int]], first: list[list[int]], second: list[list[int]], error: Bf16Error
) -> None:
    reference = reference_model(model, torch.float32, "cuda")
    parted = agreed = 0
    for prompt, a, b in zip(prompts, first, second, strict=True):
        assert len(a) == len(b)
        if a == b:
            agreed += len(a)
            continue
        parted += 1
        index = next(i for i in range(len(a)) if a[i] != b[i])
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + a[:index]], device="cuda")).logits[0, -1]
        top = logits.max()
        assert top - logits[a[index]] < error.epsilon, f"position {index}: {a[index]} is not among the best"
        assert top - logits[b[index]] < error.epsilon, f"position {index}: {b[index]} is not among the best"
        agreed += index
    # Two computations in bf16 may each flip a decision as often as transformers' does.
    assert parted / (parted + agreed) <= 2 * error.flips


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_and_eager_give_the_same_tokens(model: Path, prompts: list[list[int]], temperature: float) -> None:
    params = [
        SamplingParams(
            temperature=temperature * (i % 3), top_p=1 - 0.1 * (i % 2), seed=i, max_tokens=24, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    with_graphs = engine(model).generate(prompts, params)
    assert engine(model, enforce_eager=True).generate(prompts, params) == with_graphs


def test_prompts_that_come_alone_give_the_same_tokens_with_graphs_and_eager(
    model: Path, bf16_error: Bf16Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, so that none of their steps has decodes: these have graphs of their own."""
    with_graphs, eager = engine(model), engine(model, enforce_eager=True)
    launched: list[object] = []
    monkeypatch.setattr(with_graphs.runner.program, "forward", launched.append)
    monkeypatch.setattr(with_graphs.runner.state, "bring_changes", lambda *buffer: launched.append(buffer))

    def answers(lengths: list[int]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        prompts = [random.Random(length).choices(range(VOCAB), k=length) for length in lengths]
        first, second = (
            [running.generate([each], greedy())[0] for each in prompts] for running in (with_graphs, eager)
        )
        return prompts, first, second

    # Of the sizes that are captured, nothing is padded, and all is computed in the same shapes.
    _, first, second = answers([16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024])
    assert first == second
    assert_equal_up_to_ties(model, *answers([3, 40, 100, 130, 300, 500, 700, 1000, 1100]), bf16_error)
    assert launched == []  # kernel by kernel; all was replayed


def edited(count: int) -> tuple[list[SamplingParams], list[list[list[int]]]]:
    """Every third request as it is, the others with edits and log-probabilities of several kinds; and bad words."""
    params = []
    for i in range(count):
        options: dict = {"temperature": 0.7 * (i % 2), "seed": i, "max_tokens": 24, "ignore_eos": True}
        if i % 3:
            options |= {
                "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {i: 3.0},
                "min_tokens": 5, "stop_token_ids": [i + 100],
                "allowed_token_ids": range(i % 7, VOCAB, 2) if i % 4 == 0 else None,
            }  # fmt: skip
        if i % 3 == 2:
            options |= {"logprobs": i % 21, "prompt_logprobs": 3 if i % 2 else None}
        params.append(SamplingParams(**options))
    return params, [[[i, i + 1], [2 * i]] if i % 3 == 1 else [] for i in range(count)]


def test_edits_and_logprobs_are_the_same_in_graphs_and_eager_and_when_preempted(
    model: Path, prompts: list[list[int]], bf16_error: Bf16Error
) -> None:
    params, words = edited(len(prompts))
    one = {"max_num_seqs": 1}  # so that products have one shape, and answers are equal to the bit
    first, second = engine(model), engine(model, enforce_eager=True)
    answers = first.generate(prompts, params, words)
    assert second.generate(prompts, params, words) == answers
    for measured, again in zip(first.logprobs, second.logprobs, strict=True):
        # Steps of other sizes round differently in bf16.
        torch.testing.assert_close(
            torch.tensor([entry.logprob for entry in measured]),
            torch.tensor([entry.logprob for entry in again]),
            atol=bf16_error.epsilon,
            rtol=0,
        )
    assert [sorted(each) for each in first.prompt_logprobs] == [sorted(each) for each in second.prompt_logprobs]
    few = engine(model, max_num_seqs=16, num_gpu_blocks_override=82)
    assert {len(answer) > 5 for answer in few.generate(prompts, params, words)} == {True}
    assert few.scheduler.stats().num_preemptions > 0
    assert engine(model, **one).generate(prompts[:6], params[:6], words[:6]) == engine(
        model, **one, async_scheduling=False
    ).generate(prompts[:6], params[:6], words[:6])


def test_logprobs_are_transformers_within_the_error_of_bf16(
    model: Path, prompts: list[list[int]], bf16_error: Bf16Error
) -> None:
    running = engine(model)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=4, prompt_logprobs=4)
    answers = running.generate(prompts, params)
    reference = reference_model(model, torch.float32, "cuda")
    for prompt, answer, measured, of_prompt in zip(
        prompts, answers, running.logprobs, running.prompt_logprobs, strict=True
    ):
        sequence = torch.tensor([prompt + answer], device="cuda")
        with torch.inference_mode():
            expected = reference(sequence).logits[0].log_softmax(-1)
        entries = of_prompt | dict(enumerate(measured, len(prompt)))
        assert sorted(entries) == list(range(1, len(prompt) + len(answer)))
        for position, entry in entries.items():
            exact = float(expected[position - 1, sequence[0, position]])
            assert abs(entry.logprob - exact) < bf16_error.epsilon, position


def test_no_kernel_is_compiled_once_the_engine_is_ready(
    model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    running = engine(model, layer_by_layer(monkeypatch), max_model_len=4096)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]))
    params, words = edited(len(prompts))
    running.generate(prompts, params, words)
    running.generate(prompts[:2], SamplingParams(max_tokens=3, logprobs=-1, prompt_logprobs=-1))
    assert compiled == []


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        {"max_num_batched_tokens": 64},
        {"max_num_seqs": 16, "num_gpu_blocks_override": 82},
        {"block_size": 256},
        {"enable_prefix_caching": False},
        {"attention_backend": "torch"},
        {"attention_backend": "flash_attn"},
    ],
    ids=str,
)
def test_answers_agree_up_to_ties(model: Path, prompts: list[list[int]], bf16_error: Bf16Error, options: dict) -> None:
    if options.get("attention_backend") == "flash_attn" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    expected = engine(model).generate(prompts, greedy())
    other = engine(model, **options)
    assert_equal_up_to_ties(model, prompts, other.generate(prompts, greedy()), expected, bf16_error)
    if "num_gpu_blocks_override" in options:
        assert other.scheduler.stats().num_preemptions > 0
    # Where blocks are few, what the last round left is overwritten before it is asked for again.
    elif other.config.options.enable_prefix_caching:
        assert_equal_up_to_ties(model, prompts, other.generate(prompts, greedy()), expected, bf16_error)
        assert other.scheduler.stats().prefix_cache_hits > 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 4096},
        {"max_model_len": 4096, "enforce_eager": True},
        {"max_num_seqs": 16, "num_gpu_blocks_override": 82},
        {"attention_backend": "torch"},
        {"attention_backend": "flash_attn"},
    ],
    ids=str,
)
def test_answers_agree_up_to_ties_when_prompts_are_computed_layer_by_layer(
    model: Path,
    prompts: list[list[int]],
    bf16_error: Bf16Error,
    options: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options.get("attention_backend") == "flash_attn" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    expected = engine(model).generate(prompts, greedy())
    layered = engine(model, layer_by_layer(monkeypatch), **options)
    layers: list[int] = []
    resume, program = layered.runner.program.layered.resume, layered.runner.program

    def counted() -> None:
        layers.append(program.layered.num_tokens)
        resume()

    monkeypatch.setattr(program.layered, "resume", counted)
    assert_equal_up_to_ties(model, prompts, layered.generate(prompts, greedy()), expected, bf16_error)
    assert len(layers) > 20
    # In graphs, all have the size that was captured.
    assert (set(layers) == {4096}) == (options == {"max_model_len": 4096})


@pytest.mark.parametrize("backend", ["triton", "flash_attn"])
def test_error_is_at_most_that_of_transformers_own_bf16(model: Path, prompts: list[list[int]], backend: str) -> None:
    if backend == "flash_attn" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    exact = reference_model(model, torch.float32, "cuda")
    halves = reference_model(model, torch.bfloat16, "cuda")
    ours = engine(model, attention_backend=backend, max_num_seqs=48)
    answers = ours.generate(prompts, greedy(8))
    errors = {"ours": 0.0, "transformers": 0.0}
    # Teacher-forced: the last position of each prompt with its answer, prefilled, and then decoded for one more token.
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = torch.tensor([prompt + answer], device="cuda")
        with torch.inference_mode():
            expected = exact(sequence).logits[0, -1]
            errors["transformers"] += (halves(sequence).logits[0, -1].float() - expected).square().sum().item()
            ours.generate([sequence[0].tolist()], greedy(1))
            got = ours.runner.program.logits(1)[0]
            errors["ours"] += (got.float() - expected).square().sum().item()
    assert errors["ours"] ** 0.5 <= 1.1 * errors["transformers"] ** 0.5


def test_nothing_is_left_on_the_device(model: Path, prompts: list[list[int]]) -> None:
    running = engine(model)
    running.generate(prompts, greedy())
    gc.collect()  # of the tests before
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        running.generate(prompts, SamplingParams(temperature=1.0, top_p=0.9, max_tokens=40, ignore_eos=True))
        running.generate(prompts, *edited(len(prompts)))
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    stats = running.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks
