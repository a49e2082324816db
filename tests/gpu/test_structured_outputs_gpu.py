"""Grammar masks on a GPU, in captured graphs and eagerly, beside rows without one: answers are what is asked for."""

from __future__ import annotations

import json

import jsonschema
import pytest
import tokenizers

from frontend.structured_output import answer_grammar
from frontend.tool_choice import Tools
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams
from tests.support.engine import InProcessEngine
from tests.support.models import MODEL_DIR
from tests.support.schemas import schemas


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"async_scheduling": False}], ids=str)
def test_every_finished_answer_is_valid_for_its_schema(options: dict[str, bool]) -> None:
    engine = InProcessEngine(
        MODEL_DIR,
        device="cuda",
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=64,
        num_gpu_blocks_override=2048,
        **options,
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time there was").ids
    # Formats are checked where a standard validator's differences are known, in the end-to-end tests.
    cases = [schema for name, schema in schemas().items() if "format" not in name]
    grammars: list[str | None] = [
        answer_grammar(StructuredOutputsParams(json=schema), "over", Tools(), set()) for schema in cases
    ]
    num_free = 40
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=160) for seed in range(len(cases) + num_free)]
    answers = engine.generate([prompt] * len(params), params, grammars=[*grammars, *[None] * num_free])
    finished = [index for index in range(len(cases)) if engine.finished[index] == "stop"]
    assert len(finished) >= len(cases) * 0.8
    for index in finished:
        answer = json.loads(tokenizer.decode(answers[index]))
        jsonschema.Draft202012Validator(cases[index]).validate(answer)
    assert all(answers[len(cases) :]), "rows without a grammar draw beside them"
