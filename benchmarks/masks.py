"""What the masks of a step cost the core: the real grammars and masks, at the size of a real model's vocabulary.

    python -m benchmarks.masks

Every row follows the same JSON schema, at another place of its answer. The vocabulary is a byte-level one, made up of
random words; a step's time is making the masks of all rows and encoding them. Sockets are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.grammar import Grammars, GrammarState
from core.masks import MaskMaker
from core.request import Request
from protocol.messages import AddRequest, StepMasks, pack_ints
from protocol.sampling import SamplingParams
from protocol.transport import encode

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LONGEST_ANSWER = 64


def make_vocabulary(size: int) -> Tokenizer:
    """A byte-level tokenizer of so many tokens: all bytes, then words, with merges that make each of a shorter one."""
    chooser = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {byte: index for index, byte in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    ends = [*string.ascii_letters, *string.digits, *'",:.{}[]_']
    beginnings = ["Ġ", *ends]
    while len(words) < size:
        first, second = chooser.choice(beginnings), chooser.choice(ends)
        if first + second in words or len(first) > 12:
            continue
        words[first + second] = len(words)
        merges.append((first, second))
        beginnings.append(first + second)
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def states(file: Path, vocab_size: int, count: int) -> list[GrammarState]:
    """So many places in answers to the schema, each a random one of its own."""
    done = threading.Semaphore(0)
    grammars = Grammars([file], vocab_size, [0], done.release)
    grammar = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
    for key in range(count):
        grammars.compile((0, key), grammar)
    for _ in range(count):
        done.acquire()
    found = []
    chooser = np.random.default_rng(0)
    for _, state in grammars.take_ready():
        assert isinstance(state, GrammarState), state
        for _ in range(chooser.integers(LONGEST_ANSWER)):
            allowed = np.frombuffer(state.matcher.compute_bitmask(), np.uint8)
            tokens = np.flatnonzero(np.unpackbits(allowed, bitorder="little")[:vocab_size])
            tokens = tokens[tokens != 0]  # the end
            if not len(tokens):
                break
            state.advance(int(chooser.choice(tokens)))
        found.append(state)
    grammars.close()
    return found


def step_times(found: list[GrammarState], vocab_size: int, num_steps: int) -> list[float]:
    """Seconds that the masks of a step with a row for each state take, sorted."""
    maker = MaskMaker(vocab_size, [0])
    rows = []
    for slot, state in enumerate(found):
        request = Request(0, AddRequest(slot, pack_ints([1]), SamplingParams()), 0, LONGEST_ANSWER + 2)
        request.grammar = state
        rows.append((slot, request, 2))
    times = []
    for step_id in range(num_steps + 3):
        start = time.perf_counter()
        masks: StepMasks = maker.masks(step_id, rows)
        encode(masks)
        times.append(time.perf_counter() - start)
    return sorted(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="rows that follow a grammar")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--steps", type=int, default=100, help="steps measured for each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tokenizer.json"
        make_vocabulary(arguments.vocab_size).save(str(file))
        found = states(file, arguments.vocab_size, max(arguments.rows))
    print("| rows | p50 ms | p99 ms |\n|---|---|---|")
    for count in arguments.rows:
        times = step_times(found[:count], arguments.vocab_size, arguments.steps)
        p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
        print(f"| {count} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    main()
