"""lm-eval's `local-completions` against the real engine, on tasks that the test makes.

In the slow tier, with an extra of its own: its packages take a minute to install, and half a minute to start.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

# Read when its packages are imported: they look for data and news on a hub otherwise.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

lm_eval = pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")

from bundled import MODEL_DIR  # noqa: E402
from tests.e2e.conftest import RunningEngine  # noqa: E402
from tests.support.models import reference_model  # noqa: E402

pytestmark = pytest.mark.slow

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo"}


def write_lines(file: Path, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """A data set of one file, as a task names it."""
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}


def evaluate(engine: RunningEngine, task: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        "model": "tiny-qwen3",
        "base_url": f"{engine.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(MODEL_DIR),
        "num_concurrent": 2,
        "max_length": 2048,
    }
    results = lm_eval.simple_evaluate("local-completions", arguments, [task], batch_size=2, bootstrap_iters=0)
    assert isinstance(results, dict)
    return results


def reference(context: str, continuation: str) -> tuple[float, bool]:
    """transformers' log-likelihood of a continuation, and whether greedy decoding would give it."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids, start = tokenizer.encode(context + continuation).ids, len(tokenizer.encode(context).ids)
    with torch.inference_mode():
        logprobs = reference_model(MODEL_DIR)(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[start - 1 :]
    rest = torch.tensor(ids[start:])
    return logprobs.gather(1, rest[:, None]).sum().item(), bool((logprobs.argmax(-1) == rest).all())


def test_loglikelihoods_are_those_of_transformers(engine: RunningEngine, tmp_path: Path) -> None:
    cities = list(CAPITALS.values())
    documents = [
        {"question": f"The capital of {country} is", "cities": cities, "right": cities.index(city)}
        for country, city in CAPITALS.items()
    ]
    task = {
        "task": "capitals",
        **write_lines(tmp_path / "capitals.jsonl", documents),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{cities}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    results = evaluate(engine, task)
    assert results["results"]["capitals"]["acc,none"] == 1.0
    compared = 0
    for sample in results["samples"]["capitals"]:
        for (context, continuation), ((found, is_greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            expected, is_best = reference(context, continuation)
            assert float(found) == pytest.approx(expected, abs=1e-3)
            assert is_greedy is is_best
            compared += 1
    assert compared == len(CAPITALS) ** 2


def test_generated_answers_are_right(engine: RunningEngine, tmp_path: Path) -> None:
    documents = [{"question": f"The capital of {country} is", "city": city} for country, city in CAPITALS.items()]
    task = {
        "task": "name_capitals",
        **write_lines(tmp_path / "name_capitals.jsonl", documents),
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{city}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 16, "temperature": 0.0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    results = evaluate(engine, task)
    assert results["results"]["name_capitals"]["exact_match,none"] == 1.0
