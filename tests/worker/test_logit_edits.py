"""Penalties, bias, bad words, allowed tokens and min_tokens, through the engine: the tokens are those that a reference
in plain torch draws from transformers' logits, alone and in a crowd."""

import pytest
import torch

from protocol.messages import AddRequest, Failed, pack_ints
from protocol.sampling import SamplingParams
from tests.support.edits import edited_by_definition
from tests.support.engine import InProcessEngine, make_config
from tests.support.models import MODEL_DIR, random_prompts, reference_model
from tests.support.sampling import kept_by_definition
from worker.kernels.gumbel_sample import sample_reference

MAX_TOKENS = 24
COMMON = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
EOS = make_config(MODEL_DIR, device="cpu").model_config.eos_token_ids
OPTIONS = {"device": "cpu", "max_model_len": 192, "kv_cache_memory": "32MiB", "num_threads": 1}


def greedy(prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    return expected_tokens(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), [])


def expected_tokens(prompt: list[int], params: SamplingParams, bad_words: list[list[int]]) -> list[int]:
    model, generated, cache = reference_model(MODEL_DIR), [], None
    while len(generated) < params.max_tokens:
        with torch.inference_mode():
            output = model(torch.tensor([generated[-1:] or prompt]), past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1], output.past_key_values
        scores = edited_by_definition(logits, prompt, generated, params, bad_words, EOS)
        token = int(scores.argmax())
        if params.temperature > 0:
            must, _ = kept_by_definition(scores, params.temperature, params.top_k, params.top_p, params.min_p)
            position = torch.tensor([len(prompt) + len(generated)], dtype=torch.int32)
            token = int(
                sample_reference(
                    scores.masked_fill(~must, -torch.inf)[None], torch.tensor([0]),
                    torch.tensor([params.temperature]), torch.tensor([params.seed]), position,
                )
            )  # fmt: skip
        generated.append(token)
        if (token in params.stop_token_ids or (token in EOS and not params.ignore_eos)) and (
            len(generated) >= params.min_tokens
        ):
            break
    return generated


PROMPTS = random_prompts(14, 1000, longest=100)
# What a greedy answer would say, so that banning it bites.
TOLD = greedy(PROMPTS[4])

CASES: list[tuple[str, dict, list[list[int]]]] = [
    ("presence", {"presence_penalty": 1.5}, []),
    ("frequency", {"frequency_penalty": 0.9}, []),
    ("negative", {"presence_penalty": -1.0, "frequency_penalty": -0.25}, []),
    ("repetition", {"repetition_penalty": 1.4}, []),
    ("encouraged repetition", {"repetition_penalty": 0.7}, []),
    ("all penalties", {"presence_penalty": 0.3, "frequency_penalty": 0.4, "repetition_penalty": 1.2}, []),
    ("bias", {"logit_bias": {TOLD[0]: -100, TOLD[1]: -3.5, 17: 4.25}}, []),
    ("one bad token", {}, [[TOLD[0]]]),
    ("bad words", {}, [TOLD[:2], TOLD[2:6], [999, TOLD[0]], TOLD[1:17]]),
    ("allowed", {"allowed_token_ids": list(range(3, 900, 7))}, []),
    ("min tokens", {"min_tokens": 9, "stop_token_ids": (TOLD[3], TOLD[12])}, []),
    ("min tokens and the model's end", {"min_tokens": 5, "ignore_eos": False, "logit_bias": {EOS[0]: 50}}, []),
    (
        "everything",
        {"presence_penalty": 0.3, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_tokens": 7,
         "stop_token_ids": (TOLD[3], 40), "logit_bias": {40: 30, TOLD[1]: -3}, "allowed_token_ids": list(range(1000))},
        [TOLD[:2], [TOLD[4]]],
    ),
    ("nothing", {}, []),
]  # fmt: skip
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "top_k": 200}


def params_of(index: int, sampled: bool) -> SamplingParams:
    sampling = {**SAMPLED, "seed": index} if sampled else {"temperature": 0}
    return SamplingParams(**(COMMON | sampling | CASES[index][1]))


@pytest.fixture(scope="module", params=[False, True], ids=["greedy", "sampled"])
def batch(request: pytest.FixtureRequest) -> tuple[list[list[int]], list[SamplingParams], list, list[list[int]]]:
    """Prompts, parameters, bad words, and the tokens of the reference. Most have the prompt whose answer is known."""
    prompts = [prompt if index in (0, 4, 5, 9, 13) else PROMPTS[4] for index, prompt in enumerate(PROMPTS)]
    params = [params_of(index, request.param) for index in range(len(CASES))]
    words = [case[2] for case in CASES]
    return prompts, params, words, list(map(expected_tokens, prompts, params, words))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"max_num_seqs": 8, "num_gpu_blocks_override": 8, "max_model_len": 128},
    ],
    ids=["together", "one step at a time", "chunked", "preempted"],
)
def test_tokens_equal_the_reference(batch: tuple, options: dict) -> None:
    prompts, params, words, expected = batch
    engine = InProcessEngine(MODEL_DIR, **(OPTIONS | options))
    answers = engine.generate(prompts, params, words)
    for case, answer, reference in zip(CASES, answers, expected, strict=True):
        assert answer == reference, case[0]
    # Slots are used again, by requests with other options and with none.
    again = engine.generate(prompts[::-1], params[::-1], words[::-1])
    assert again == expected[::-1]
    plain = SamplingParams(temperature=0, **COMMON)
    assert engine.generate([PROMPTS[4]] * 8, plain) == [TOLD] * 8
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == ("num_gpu_blocks_override" in options)
    assert stats.num_free_blocks == stats.num_blocks


def test_every_option_changes_the_answer(batch: tuple) -> None:
    """Otherwise nothing would be shown by the answers that are equal."""
    prompts, params, _, expected = batch
    plain = [
        SamplingParams(
            temperature=each.temperature, seed=each.seed, top_p=each.top_p, min_p=each.min_p, top_k=each.top_k,
            max_tokens=MAX_TOKENS, stop_token_ids=each.stop_token_ids, ignore_eos=each.ignore_eos,
        )
        for each in params
    ]  # fmt: skip
    unedited = list(map(expected_tokens, prompts, plain, [[]] * len(prompts)))
    same = [case[0] for case, got, without in zip(CASES, expected, unedited, strict=True) if got == without]
    if params[0].temperature == 0:
        assert same == ["nothing"]
    else:  # of what is drawn, the words of the greedy answer may be no part
        assert set(same) <= {"nothing", "one bad token", "bad words", "min tokens"}


def test_no_end_within_min_tokens_and_one_right_after() -> None:
    engine = InProcessEngine(MODEL_DIR, **OPTIONS)
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=6, logit_bias={EOS[0]: 100})
    [answer] = engine.generate([PROMPTS[5]], params)
    assert len(answer) == 7
    assert answer[6] == EOS[0]


def test_a_request_that_allows_nothing_fails_alone_and_says_why() -> None:
    engine = InProcessEngine(MODEL_DIR, **OPTIONS)
    add = engine.scheduler.add
    impossible = SamplingParams(max_tokens=9, min_tokens=3, allowed_token_ids=[EOS[0]])
    add(0, AddRequest(900, pack_ints(PROMPTS[5]), impossible))
    add(0, AddRequest(901, pack_ints(PROMPTS[5]), SamplingParams(temperature=0, max_tokens=4)))
    messages = list(engine.run())
    [failed] = [message for message in messages if isinstance(message, Failed)]
    assert failed.request_id == 900
    assert "allowed_token_ids" in failed.message
    assert sum(len(message.token_ids) // 4 for message in messages if not isinstance(message, Failed)) == 4
