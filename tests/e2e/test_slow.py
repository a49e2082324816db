"""The slow tier: what takes minutes. Run with `pytest -m slow`; docs/testing.md has the last results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import Tokenizer

from bundled import MODEL_DIR
from bundled.corpus import held_out
from bundled.evaluate import is_right
from frontend import Client, SamplingParams
from tests.core.test_scheduler import RandomOperations
from tests.e2e.conftest import ROOT, RunningEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_every_held_out_question_is_answered_by_the_running_engine(engine: RunningEngine) -> None:
    questions = held_out()
    params = SamplingParams(temperature=0.0, max_tokens=400)
    with Client(engine.address) as client:
        results = client.generate([question.prompt for question in questions], params, use_tqdm=False)
        stats = client.stats()
    # Marked with their end-of-turn tokens, which are among the ids and not in the text.
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    answers = [result.outputs[0].token_ids for result in results]
    texts = tokenizer.decode_batch(answers, skip_special_tokens=False)
    right = sum(is_right(question, text) for question, text in zip(questions, texts, strict=True))
    print(f"{right} of {len(questions)} right")
    assert right >= 0.95 * len(questions)
    assert stats.num_free_blocks == stats.num_blocks


def test_three_times_as_fast_as_transformers_with_the_same_answers(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.versus_transformers", "--runs", "3", "--json", str(tmp_path / "figures")],
        cwd=ROOT,
        check=True,
    )
    natural, fixed = json.loads((tmp_path / "figures").read_text())
    assert natural["equal_answers"] == fixed["equal_answers"] == 64
    assert natural["ratio"] >= 3


def test_thousands_of_requests_leave_nothing_behind(start_engine: Callable[..., RunningEngine]) -> None:
    # On one thread, which loses less than two when something else needs the CPUs.
    engine = start_engine("--no-http", "--num-threads", "1").wait_until_ready()
    soak = [sys.executable, "-m", "benchmarks.soak", "--ipc", engine.address]
    # Enough for a leak of 1 KB a request to pass what is allowed.
    result = subprocess.run([*soak, "--num-requests", "15000"], cwd=ROOT, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr


class ManyRandomOperations(RandomOperations):
    """The accounting property over far more and longer histories than the fast tier's."""


ManyRandomOperations.TestCase.settings = settings(max_examples=2000, stateful_step_count=120, deadline=None)
TestAccountingAtLength = ManyRandomOperations.TestCase
