"""What is asked of the engine: named workloads, and random ones from options. All prompts are random token ids.

| name | requests | input | output | sampling |
|---|---|---|---|---|
| nano | 256 at once | uniform 100-1024 | uniform 100-1024 (133,966 in all) | temperature 0.6 |
| seed | 256 at once | 20 | 725 | temperature 1.0 |
| single | 1 | 128 | 1024 | greedy |
| b8 | 8 at once | 128 | 512 | greedy |
| prefill | 64 at once | 2048 | 1 | greedy |
| longctx | 32 at once | 8192 | 256 | greedy |

What these measure is throughput; `benchmarks.online` has the workloads of a server in use.

`nano` is the published benchmark of nano-vllm and mini-sglang, with their random seed. `ignore_eos` is always on, so
that every request returns exactly the tokens asked for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

# Ids up to here are text in every Qwen3 tokenizer; a smaller vocabulary bounds them further.
MAX_TOKEN_ID = 10_000


@dataclass(frozen=True, slots=True)
class BenchmarkRequest:
    prompt_token_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, how they sample, and when they are sent.

    `request_rate` is the mean of a Poisson process in requests a second, or None to send without waiting;
    `concurrency` bounds the requests under way, or is None.
    """

    name: str
    requests: list[BenchmarkRequest]
    temperature: float
    request_rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    @property
    def input_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_len for request in self.requests)

    def saved(self) -> dict[str, Any]:
        """What the saved figures say of it."""
        return {
            "name": self.name,
            "temperature": self.temperature,
            "request_rate": self.request_rate,
            "concurrency": self.concurrency,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths drawn uniformly from `low..high`."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> LengthRange:
        """`128` or `100-1024`. Raises ValueError for anything else."""
        low, _, high = text.partition("-")
        bounds = LengthRange(int(low), int(high or low))
        if not 1 <= bounds.low <= bounds.high:
            raise ValueError(f"a length must be at least 1 and a range must ascend, got {text!r}")
        return bounds

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    def draw(self, chooser: random.Random) -> int:
        return chooser.randint(self.low, self.high)


NAMES = ("nano", "seed", "single", "b8", "prefill", "longctx")


def named_workload(name: str, vocab_size: int) -> Workload:
    """One of the workloads of the table above."""
    if name == "nano":
        return _nano(vocab_size)
    count, input_len, output_len, temperature = {
        "seed": (256, 20, 725, 1.0),
        "single": (1, 128, 1024, 0.0),
        "b8": (8, 128, 512, 0.0),
        "prefill": (64, 2048, 1, 0.0),
        "longctx": (32, 8192, 256, 0.0),
    }[name]
    fixed = LengthRange(input_len, input_len), LengthRange(output_len, output_len)
    return Workload(name, random_requests(count, *fixed, vocab_size), temperature)


def _nano(vocab_size: int) -> Workload:
    """All prompts are drawn first, each its length and then its ids, then all output lengths."""
    chooser = random.Random(0)
    # The ids are drawn in the published range whatever the vocabulary, so that the lengths stay the published ones.
    prompts = [
        [chooser.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(chooser.randint(100, 1024))] for _ in range(256)
    ]
    return Workload("nano", [BenchmarkRequest(prompt, chooser.randint(100, 1024)) for prompt in prompts], 0.6)


def random_requests(
    count: int, input_len: LengthRange, output_len: LengthRange, vocab_size: int, shared_prefix: int = 0, seed: int = 0
) -> list[BenchmarkRequest]:
    """Requests of random lengths; the first `shared_prefix` ids are the same in all and come on top of `input_len`."""
    chooser = random.Random(seed)
    prefix = random_ids(chooser, shared_prefix, vocab_size)
    return [
        BenchmarkRequest(prefix + random_ids(chooser, input_len.draw(chooser), vocab_size), output_len.draw(chooser))
        for _ in range(count)
    ]


def new_requests(
    count: int, input_len: LengthRange, output_len: LengthRange, vocab_size: int, lengths: random.Random
) -> list[BenchmarkRequest]:
    """Requests with lengths drawn from `lengths` and ids that nobody has drawn before: no prefix cache has them."""
    chooser = random.Random()
    drawn = [(input_len.draw(lengths), output_len.draw(lengths)) for _ in range(count)]
    return [
        BenchmarkRequest(random_ids(chooser, prompt_len, vocab_size), answer_len) for prompt_len, answer_len in drawn
    ]


def random_ids(chooser: random.Random, count: int, vocab_size: int) -> list[int]:
    return chooser.choices(range(min(MAX_TOKEN_ID + 1, vocab_size)), k=count)
