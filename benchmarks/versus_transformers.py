"""The engine against `transformers.generate` on the same machine, model and prompts, in one run.

    python -m benchmarks.versus_transformers

The engine gets all requests at once, through the client and its processes; transformers gets them in padded batches.
Both run greedily in float32 to the same number of tokens, and the answers are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from bundled import MODEL_DIR
from frontend import LLM, SamplingParams


def make_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Token ids of 16 to 64 tokens, without special tokens, which come first in the vocabulary or last."""
    chooser = random.Random(0)
    return [chooser.choices(range(300, vocab_size - 50), k=chooser.randint(16, 64)) for _ in range(count)]


def timed(runs: int, function: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Median seconds of some runs after a warm-up, and the last run's answers."""
    answers = function()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        answers = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), answers


def run_engine(model: Path, prompts: list[list[int]], output_len: int, runs: int) -> tuple[float, list[list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    options = {"device": "cpu", "dtype": "float32", "enable_prefix_caching": False}
    with LLM(str(model), **options) as llm:
        return timed(runs, lambda: [r.outputs[0].token_ids for r in llm.generate(prompts, params, use_tqdm=False)])


def run_transformers(
    model: Path, prompts: list[list[int]], output_len: int, runs: int, batch_size: int
) -> tuple[float, list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate() -> list[list[int]]:
        answers = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            output = reference.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,
                eos_token_id=None,
            )
            answers += output[:, longest:].tolist()
        return answers

    return timed(runs, generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="model directory")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16, help="requests that transformers gets at once")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to save the figures to")
    arguments = parser.parse_args()
    vocab_size = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    prompts = make_prompts(arguments.requests, vocab_size)
    size = (prompts, arguments.output_len, arguments.runs)
    engine_seconds, engine_answers = run_engine(arguments.model, *size)
    reference_seconds, reference_answers = run_transformers(arguments.model, *size, arguments.batch_size)
    tokens = arguments.requests * arguments.output_len
    equal = sum(a == b for a, b in zip(engine_answers, reference_answers, strict=True))
    figures = {
        "engine_tokens_per_s": tokens / engine_seconds,
        "transformers_tokens_per_s": tokens / reference_seconds,
        "ratio": reference_seconds / engine_seconds,
        "equal_answers": equal,
        "requests": arguments.requests,
    }
    print(f"| what | tokens/s |\n|---|---|\n| engine | {figures['engine_tokens_per_s']:.0f} |")
    print(f"| transformers, batches of {arguments.batch_size} | {figures['transformers_tokens_per_s']:.0f} |")
    print(f"ratio {figures['ratio']:.2f}; {equal} of {arguments.requests} answers equal")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
