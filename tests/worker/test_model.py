"""The model computes what transformers computes, from the same weights."""

from pathlib import Path

import pytest
import torch

from protocol.messages import AdmittedSlot, Step, pack_ints
from tests.support.engine import make_config
from tests.support.models import MODEL_DIR, make_random_model, random_prompts, reference_model
from worker.runner import StepRunner
from worker.startup import make_runner


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("random-qwen3"))


class LogitsRunner:
    """Runs steps by hand and looks at the logits that they would have sampled from."""

    def __init__(self, model: Path) -> None:
        self.runner: StepRunner
        self.runner, _ = make_runner(make_config(model, device="cpu", max_num_seqs=4, kv_cache_memory="8MiB"))
        self._next_step = 0

    def step(self, **fields: object) -> torch.Tensor:
        pending = self.runner.execute(Step(step_id=self._next_step, epoch=0, **fields))
        self._next_step += 1
        rows = len(pending.result().token_ids) // 4
        with torch.inference_mode():
            return self.runner.program.logits(rows)


def admit(slot: int, tokens: list[int], blocks: list[int], num_computed: int = 0) -> AdmittedSlot:
    return AdmittedSlot(slot, pack_ints(tokens), len(tokens), num_computed, pack_ints(blocks), 0.0, 0, 1.0, 0.0, 0)


@pytest.mark.parametrize("which", ["bundled", "random"])
def test_logits_equal_transformers_over_prefill_and_64_decode_steps(which: str, random_model: Path) -> None:
    model = MODEL_DIR if which == "bundled" else random_model
    reference = reference_model(model)
    runner = LogitsRunner(model)
    prompts = random_prompts(10, reference.config.vocab_size, seed=3)
    prompts = [prompts[4], prompts[7], prompts[9]]
    blocks = [list(range(1 + 20 * i, 21 + 20 * i)) for i in range(3)]
    logits = runner.step(
        admitted=[admit(slot, prompt, blocks[slot]) for slot, prompt in enumerate(prompts)],
        prefill_slots=pack_ints([0, 1, 2]),
        prefill_lens=pack_ints([len(prompt) for prompt in prompts]),
        prefill_samples=b"\x01\x01\x01",
        decode_slots=b"",
    )
    sequences = [list(prompt) for prompt in prompts]
    for decode_step in range(65):
        for row, sequence in enumerate(sequences):
            with torch.inference_mode():
                expected = reference(torch.tensor([sequence])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
            sequence.append(int(logits[row].argmax()))
        if decode_step < 64:
            logits = runner.step(decode_slots=pack_ints([0, 1, 2]) if decode_step == 0 else None)


def test_chunks_and_shared_blocks_give_the_logits_of_one_pass(random_model: Path) -> None:
    reference = reference_model(random_model)
    runner = LogitsRunner(random_model)
    prompt = random_prompts(10, 997, seed=4)[9]
    runner.step(
        admitted=[admit(2, prompt, list(range(1, 12)))],
        prefill_slots=pack_ints([2]),
        prefill_lens=pack_ints([37]),
        prefill_samples=b"\x00",
        decode_slots=b"",
    )
    logits = runner.step(
        prefill_slots=pack_ints([2]), prefill_lens=pack_ints([len(prompt) - 37]), prefill_samples=b"\x01"
    )
    # Another sequence takes the first two blocks as its own beginning and computes the rest.
    other = [*prompt[:32], *prompt[60:80]]
    shared = runner.step(
        admitted=[admit(0, other, [1, 2, 30, 31], num_computed=32)],
        prefill_slots=pack_ints([0]),
        prefill_lens=pack_ints([20]),
        prefill_samples=b"\x01",
    )
    with torch.inference_mode():
        torch.testing.assert_close(logits[0], reference(torch.tensor([prompt])).logits[0, -1], atol=1e-4, rtol=0)
        torch.testing.assert_close(shared[0], reference(torch.tensor([other])).logits[0, -1], atol=1e-4, rtol=0)
