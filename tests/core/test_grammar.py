"""Grammars that users send: what fails, fails alone, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from llguidance.numpy import fill_next_token_bitmask

from core.grammar import Grammars, GrammarState

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "bundled" / "tiny-qwen3" / "tokenizer.json"
VOCAB_SIZE = 2048


def compiled(*grammars: dict, tokenizer: Path = TOKENIZER) -> GrammarState | str:
    """The state at the start of a grammar, or why there is none."""
    done = threading.Event()
    compiler = Grammars([tokenizer], VOCAB_SIZE, [0], done.set)
    compiler.compile((0, 0), json.dumps({"grammars": list(grammars)}))
    assert done.wait(60)
    ((key, outcome),) = compiler.take_ready()
    compiler.close()
    assert key == (0, 0)
    return outcome


def test_a_grammar_that_fails_while_masks_are_made_does_not_end_the_answer_as_if_it_were_whole() -> None:
    state = compiled({"lark_grammar": f"start: /{'a?' * 4000}b/\n"})
    if isinstance(state, str):
        return  # refused at once is as good
    mask = np.zeros((1, -(-VOCAB_SIZE // 32)), np.int32)
    for _ in range(50):
        fill_next_token_bitmask(state.matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        token = int(np.flatnonzero(bits)[-1 if state.matcher.is_error() else 0])
        if state.matcher.is_error():
            with pytest.raises(ValueError, match=r"\S"):
                state.advance(token)
            return
        state.advance(token)
        if state.is_complete:
            break
    pytest.fail("the grammar was expected to become too complex")


def test_rules_that_lead_from_one_to_the_next_do_not_end_the_process() -> None:
    code = """
from tests.core.test_grammar import compiled
rules = ["start: r0"] + [f"r{i}: r{i + 1}" for i in range(8000)] + ['r8000: "x"']
outcome = compiled({"lark_grammar": "\\n".join(rules) + "\\n"})
print(type(outcome).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("GrammarState", "str")


def allowed_at_start(state: GrammarState) -> set[int]:
    mask = np.zeros((1, -(-VOCAB_SIZE // 32)), np.int32)
    fill_next_token_bitmask(state.matcher, mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_special_tokens_of_the_configuration_alone_can_be_named_and_are_no_text(tmp_path: Path) -> None:
    tokenizer = json.loads(TOKENIZER.read_text())
    late = VOCAB_SIZE - 1
    word, word_id = next(
        (text, i) for text, i in tokenizer["model"]["vocab"].items() if text.isalpha() and len(text) > 3
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    added = {late: {"content": "<|late|>", "special": True}, word_id: {"content": word, "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    file = tmp_path / "tokenizer.json"
    named = compiled({"lark_grammar": "start: <|late|>\n"}, tokenizer=file)
    assert isinstance(named, GrammarState), named
    assert allowed_at_start(named) == {late}
    text = compiled({"lark_grammar": "start: /[A-Za-z]+/\n"}, tokenizer=file)
    before = compiled({"lark_grammar": "start: /[A-Za-z]+/\n"})
    assert isinstance(text, GrammarState)
    assert isinstance(before, GrammarState)
    assert allowed_at_start(before) - allowed_at_start(text) == {word_id}
