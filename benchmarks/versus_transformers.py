"""The engine against `transformers.generate` on the same machine, with the same model and prompts, in one run.

    python -m benchmarks.versus_transformers

64 held-out questions of the bundled model's domain. The engine gets them all at once, through the client and its
processes; transformers gets them in padded batches of 16. Both answer greedily in float32, once to the end of each
answer and once to a fixed number of tokens. The two take turns, so that what else the machine does hits both alike; the
answers are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bundled import MODEL_DIR
from bundled.corpus import held_out
from frontend import LLM, SamplingParams

# Longer than any answer of the bundled model.
LONGEST_ANSWER = 400


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over runs that took turns; `ratio` is the median of the runs' own ratios."""

    what: str
    requests: int
    tokens: int
    engine_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float
    equal_answers: int


def make_prompts(count: int) -> list[list[int]]:
    """Token ids of held-out questions of all categories, in random order."""
    questions = [item.prompt for item in held_out(per_category=2)]
    random.Random(0).shuffle(questions)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(questions[:count], add_special_tokens=False)]


class Reference:
    """`transformers.generate` over padded batches."""

    def __init__(self, batch_size: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        self._batch_size = batch_size

    def generate(self, prompts: list[list[int]], fixed_len: int | None) -> list[list[int]]:
        eos = self._model.generation_config.eos_token_id
        answers: list[list[int]] = []
        for first in range(0, len(prompts), self._batch_size):
            batch = prompts[first : first + self._batch_size]
            longest = max(map(len, batch))
            output = self._model.generate(
                torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch]),
                attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]),
                max_new_tokens=fixed_len or LONGEST_ANSWER,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
                eos_token_id=None if fixed_len else eos,
            )
            answers += [_until_eos(row, [] if fixed_len else eos) for row in output[:, longest:].tolist()]
        return answers


def _until_eos(tokens: list[int], eos: list[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def compare(
    llm: LLM, reference: Reference, what: str, prompts: list[list[int]], fixed_len: int | None, runs: int
) -> Comparison:
    params = SamplingParams(
        temperature=0.0, max_tokens=fixed_len or LONGEST_ANSWER, ignore_eos=fixed_len is not None, detokenize=False
    )
    seconds: dict[str, list[float]] = {"engine": [], "transformers": []}
    # The first turn of each warms up and is not counted.
    for _ in range(runs + 1):
        start = time.perf_counter()
        ours = [result.outputs[0].token_ids for result in llm.generate(prompts, params, use_tqdm=False)]
        middle = time.perf_counter()
        theirs = reference.generate(prompts, fixed_len)
        seconds["engine"].append(middle - start)
        seconds["transformers"].append(time.perf_counter() - middle)
    engine, transformers = seconds["engine"][1:], seconds["transformers"][1:]
    tokens = sum(map(len, ours))
    return Comparison(
        what=what,
        requests=len(prompts),
        tokens=tokens,
        engine_tokens_per_s=tokens / statistics.median(engine),
        transformers_tokens_per_s=sum(map(len, theirs)) / statistics.median(transformers),
        ratio=statistics.median(b / a for a, b in zip(engine, transformers, strict=True)),
        equal_answers=sum(a == b for a, b in zip(ours, theirs, strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128, help="tokens of the run of fixed length")
    parser.add_argument("--batch-size", type=int, default=16, help="requests that transformers gets at once")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to save the figures to")
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.requests)
    reference = Reference(arguments.batch_size)
    with LLM(device="cpu", dtype="float32", enable_prefix_caching=False) as llm:
        rows = [
            compare(llm, reference, "to the end of each answer", prompts, None, arguments.runs),
            compare(
                llm, reference, f"{arguments.output_len} tokens each", prompts, arguments.output_len, arguments.runs
            ),
        ]
    print(
        "| answers | tokens | engine, tok/s | transformers, tok/s | ratio | equal answers |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row.what} | {row.tokens} | {row.engine_tokens_per_s:.0f} | {row.transformers_tokens_per_s:.0f} "
            f"| {row.ratio:.2f} | {row.equal_answers} of {row.requests} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
