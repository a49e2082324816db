"""What is thought is told from what is said, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.reasoning import ReasoningParser, Thinking, thinking_after_beginning, thinking_after_prompt
from tests.support.pieces import cut, pieces_of

STARTS: tuple[Thinking, ...] = ("undecided", "open", "begun", "over")
# Text in which tags, halves of tags and line breaks are common.
TEXTS = pieces_of("<think>", "</think>", "<", "</", "<thi", "nk>", "\n", "\n\n", " ", "a", "Größe 🙂")


def parse(pieces: list[str], start: Thinking = "undecided") -> tuple[str, str]:
    parser = ReasoningParser(start)
    outputs = [parser.feed(piece) for piece in pieces] + [parser.flush()]
    return "".join(thought for thought, _ in outputs), "".join(said for _, said in outputs)


@given(TEXTS, st.sampled_from(STARTS), st.data())
def test_any_cut_of_a_text_gives_the_same_result(text: str, start: Thinking, data: st.DataObject) -> None:
    assert parse(cut(text, data), start) == parse([text], start)


@given(pieces_of("<think>", "<", "</thi", "\n", " ", "a"), pieces_of("</think>", "<", "\n", "a"), st.data())
def test_thoughts_and_said_text_come_back_as_they_were_written(thought: str, said: str, data: st.DataObject) -> None:
    text = f"<think>\n{thought}\n</think>\n\n{said}"
    assert parse(cut(text, data)) == (thought.strip("\n"), said.lstrip("\n"))


@given(TEXTS, st.data())
def test_text_that_opens_otherwise_is_said_as_it_is(text: str, data: st.DataObject) -> None:
    assert parse(cut(f"Yes {text}", data)) == ("", f"Yes {text}")
    assert parse(cut(text, data), "over") == ("", text)


@pytest.mark.parametrize(
    ("text", "start", "thought", "said"),
    [
        ("<think>\nSo.\n\nThen.\n</think>\n\nYes.\n", "undecided", "So.\n\nThen.", "Yes.\n"),
        ("So.\n</think>\n\nYes.", "open", "So.", "Yes."),
        ("\nSo.\n</think>\nYes.", "begun", "\nSo.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "undecided", "", "Yes."),
        ("<think>Cut off\n", "undecided", "Cut off", ""),
        ("Cut off </thi", "open", "Cut off </thi", ""),
        ("  <think>So.</think>Yes.", "undecided", "So.", "Yes."),
        ("  Yes, <think>no</think>.", "undecided", "", "  Yes, <think>no</think>."),
        ("\n", "undecided", "", "\n"),
        ("<think", "undecided", "", "<think"),
        ("<think>So.</think>Yes. <think>No.</think>", "undecided", "So.", "Yes. <think>No.</think>"),
        ("<think>So.</think>", "over", "", "<think>So.</think>"),
        ("Yes </think> no.", "undecided", "", "Yes </think> no."),
    ],
)
def test_thoughts_and_said_text(text: str, start: Thinking, thought: str, said: str) -> None:
    assert parse([text], start) == parse(list(text), start) == (thought, said)


def test_thoughts_come_as_soon_as_they_are_known() -> None:
    parser = ReasoningParser()
    received = [
        parser.feed(piece) for piece in ("<think>", "\nI", " think", ".\n", "\nSo", "</th", "ink>\n", "\nYes", ".")
    ]
    assert [thought for thought, _ in received] == ["", "I", " think", ".", "\n\nSo", "", "", "", ""]
    assert [said for _, said in received] == ["", "", "", "", "", "", "", "Yes", "."]
    assert parser.is_over


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<|im_start|>assistant\n", "undecided"),
        ("<|im_start|>assistant\n<think>\n", "open"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "over"),
        ("<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n", "undecided"),
    ],
)
def test_the_end_of_the_prompt_says_where_an_answer_starts(prompt: str, thinking: Thinking) -> None:
    assert thinking_after_prompt(prompt) == thinking


@pytest.mark.parametrize(
    ("answer", "thinking"),
    [
        ("", "undecided"),
        ("<think>\n", "open"),
        ("<think>\nSo", "begun"),
        ("<think>So</think>", "over"),
        ("Yes", "over"),
    ],
)
def test_a_beginning_says_where_an_answer_goes_on(answer: str, thinking: Thinking) -> None:
    assert thinking_after_beginning(answer) == thinking
