"""Which tools may be offered, and what the grammar takes of an answer that must call: calls that fit, nothing else."""

from __future__ import annotations

from typing import Any

import llguidance
import pytest
import tokenizers

from bundled import MODEL_DIR
from frontend.reasoning import Thinking
from frontend.structured_output import answer_grammar
from frontend.tool_choice import NamedFunction, NamedToolChoice, Tools, read_tools
from protocol.errors import InvalidRequestError
from tests.support.requests import WEATHER

TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "hours": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TAGS = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOON = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome", "hours": 12}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome", "hours": "12"}}\n</tool_call>'


@pytest.fixture(scope="module")
def matches(request: pytest.FixtureRequest):
    file = (MODEL_DIR / "tokenizer.json").read_text()
    tokenizer, vocabulary = tokenizers.Tokenizer.from_str(file), llguidance.LLTokenizer(file)

    def matches(grammar: str, text: str) -> bool:
        """Whether a text is in the language, as the tokens that the model would write it with."""
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return matches


def named(name: str) -> NamedToolChoice:
    return NamedToolChoice("function", NamedFunction(name))


@pytest.mark.parametrize(
    ("choice", "parallel", "thinking", "taken", "not_taken"),
    [
        ("required", True, "over", [PARIS, NOON, f"{PARIS}\n{NOON}"], [WRONG, "Hello", "", f"Hello {PARIS}"]),
        ("required", False, "over", [PARIS, NOON], [f"{PARIS}\n{NOON}"]),
        (named("get_time"), True, "over", [NOON], [PARIS, f"{NOON}\n{NOON}"]),
        (
            "required",
            True,
            "undecided",
            [PARIS, f"<think>\nI </ think.\n</think>\n\n{PARIS}"],
            [f"I\n</think>\n\n{PARIS}"],
        ),
        ("required", True, "open", [f"I think.\n</think>\n\n{NOON}"], [PARIS, "I think.\n</think>\n\nHello"]),
        ("required", True, "begun", [f" so.\n</think>\n\n{NOON}"], [PARIS]),
    ],
)
def test_the_grammar_takes_calls_and_nothing_else(
    matches: Any, choice: Any, parallel: bool, thinking: Thinking, taken: list[str], not_taken: list[str]
) -> None:
    grammar = answer_grammar(None, thinking, read_tools([WEATHER, TIME], choice, parallel), TAGS)
    assert [text for text in taken if not matches(grammar, text)] == []
    assert [text for text in not_taken if matches(grammar, text)] == []


def test_the_grammar_spells_out_tags_that_are_no_tokens() -> None:
    grammar = answer_grammar(None, "undecided", read_tools([WEATHER], "required", True), set())
    plain = llguidance.LLTokenizer("byte")
    for text in (PARIS, f"<think>\nI </ think.\n</think>\n\n{PARIS}"):
        matcher = llguidance.LLMatcher(plain, grammar)
        assert not matcher.is_error(), matcher.get_error()
        assert matcher.try_consume_tokens(list(text.encode())) == len(text)
        assert matcher.is_accepting()


def test_what_tools_say() -> None:
    assert read_tools(None, None, None) == Tools()
    assert read_tools([WEATHER], "none", None) == Tools()
    assert read_tools([WEATHER], "auto", False) == Tools([WEATHER], parallel=False)
    assert read_tools([WEATHER], named("get_weather"), None) == Tools([WEATHER], True, "get_weather")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True, "description": None}}
    (shown,) = read_tools([strict], None, None).offered
    assert shown["function"].keys() == {"name", "parameters"}


@pytest.mark.parametrize(
    ("tools", "choice", "param", "message"),
    [
        ([{"type": "web_search"}], None, "tools", "tools[0].type must be 'function', got 'web_search'"),
        ([WEATHER, {"type": "function"}], None, "tools", "tools[1].function must be an object, got None"),
        ([{"type": "function", "function": {"name": ""}}], None, "tools", "1 to 128 characters, got ''"),
        ([{"type": "function", "function": {"name": "a", "parameters": 5}}], None, "tools", "got 5"),
        (
            [{"type": "function", "function": {"name": "a", "code": "x"}}],
            None,
            "tools",
            "function.code is not supported",
        ),
        ([WEATHER, WEATHER], None, "tools", "two functions named 'get_weather'"),
        ([WEATHER], named("get_time"), "tool_choice", "one of the tools (get_weather), got 'get_time'"),
        ([], "required", "tool_choice", "needs tools"),
        (None, named("f"), "tool_choice", "got 'f'"),
    ],
)
def test_tools_that_cannot_be_offered_are_named(tools: Any, choice: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_tools(tools, choice, None)
    assert caught.value.param == param
    assert message in caught.value.message
