"""Function calls are found in an answer, however the text is cut into pieces, and what is no call stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.tool_calls import CallDelta, ToolCallParser
from tests.support.pieces import cut, pieces_of

HEAD, CALL = '{"name": "f", "arguments": ', '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
# Text in which calls, whole, broken and nested, are common.
TEXTS = pieces_of(
    "<tool_call>", "</tool_call>", "<tool", "_call>", "</", HEAD, CALL, "{", "}", "}}", '"', "\\", "[", "\n", " ", "a",
    '{"a": "</tool_call>"}', '{"arguments": {"a": 1}, "name": "g"}', '"name": "f"', ",", ":", '{"a": 1}',
)  # fmt: skip
Calls = list[tuple[str, str]]


def parse(pieces: list[str], *, stream: bool, parallel: bool = True) -> tuple[str, Calls]:
    """Said text, and name and arguments of each call."""
    parser = ToolCallParser(stream=stream, parallel=parallel)
    said, calls = "", []
    for parts in [*map(parser.feed, pieces), parser.flush()]:
        for part in parts:
            if isinstance(part, str):
                said += part
            elif part.name is not None:
                assert part.index == len(calls)
                calls.append((part.name, part.arguments))
            else:
                assert part.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return said, calls


@given(TEXTS, st.booleans(), st.booleans(), st.data())
def test_any_cut_of_a_text_gives_the_same_result(text: str, stream: bool, parallel: bool, data: st.DataObject) -> None:
    expected = parse([text], stream=stream, parallel=parallel)
    assert parse(cut(text, data), stream=stream, parallel=parallel) == expected
    assert parse(list(text), stream=stream, parallel=parallel) == expected


@given(TEXTS)
def test_calls_of_a_whole_answer_are_objects_and_all_else_is_said(text: str) -> None:
    said, calls = parse([text], stream=False)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
    if not calls:
        assert said == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["</tool_call>", "<tool_call>", '"}}\\']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@given(
    st.lists(st.tuples(st.from_regex(r"\A[a-z_]{1,20}\Z"), OBJECTS), min_size=1, max_size=3),
    st.sampled_from(["", "Let me look.", "One\n\ntwo <b>"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_calls_come_back_as_they_were_written(
    calls: list[tuple[str, dict[str, Any]]], said: str, stream: bool, ascii: bool, data: st.DataObject
) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=ascii)) for name, arguments in calls]
    blocks = [f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in written]
    text = "\n".join([*([said] if said else []), *blocks])
    assert parse(cut(text, data), stream=stream) == (said, written)
    assert parse(cut(text, data), stream=stream, parallel=False) == (said, written[:1])


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        # Other orders, spacings and keys than the model was trained on.
        ('<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call> { "name" : "f" , "arguments" : {} } </tool_call>', "", [("f", "{}")]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
        ('<tool_call>\n{"name": "f", "arguments": {}, "id": 3}\n</tool_call>', "", [("f", "{}")]),
        # Text around calls, and tags that were left out.
        (f"Look: \n{CALL}\n", "Look:", [("f", '{"a": "b"}')]),
        (f"{CALL}\n\nDone.", "Done.", [("f", '{"a": "b"}')]),
        (f"{CALL.removesuffix('</tool_call>')}", "", [("f", '{"a": "b"}')]),
        (f"{CALL.removesuffix('</tool_call>')}{CALL}", "", [("f", '{"a": "b"}')] * 2),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_unusual_forms(text: str, said: str, calls: Calls, stream: bool) -> None:
    assert parse([text], stream=stream) == parse(list(text), stream=stream) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON\n</tool_call>",
        "<tool_call>\n[1, 2]\n</tool_call>",
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "a"}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name" "f"}\n</tool_call>',
        "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        "<tool_call>\n",
        "Text <tool_call",
        '  \n<tool_call>\n{"name": "f"',
        '<tool_call>{"a": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_said_as_it_is(text: str, stream: bool) -> None:
    assert parse([text], stream=stream) == (text, [])


@pytest.mark.parametrize(
    ("broken", "passed_on"),
    [
        ('{"a": Paris}}\n</tool_call>', '{"a": Paris}'),
        ('{"a": "two\nlines"}}\n</tool_call>', '{"a": "two\nlines"}}\n'),
        ('{"a": "never closed}}\n</tool_call>', '{"a": "never closed}}\n'),
        ('{"a": "cut o', '{"a": "cut o'),
    ],
)
def test_arguments_that_turn_out_wrong_were_passed_on_in_a_stream_and_are_said_otherwise(
    broken: str, passed_on: str
) -> None:
    text = f"<tool_call>\n{HEAD}{broken}"
    assert parse([text], stream=False) == (text, [])
    assert parse([text], stream=True) == ("", [("f", passed_on)])


def test_arguments_are_passed_on_while_they_are_written() -> None:
    parser = ToolCallParser(stream=True)
    pieces = [
        "Hi",
        " \n",
        "<tool_call>",
        '\n{"na',
        'me": "f", "argu',
        'ments": {"',
        "a",
        '": [',
        "1]}",
        "}",
        "\n</tool_call>",
    ]
    assert [parser.feed(piece) for piece in pieces] == [
        ["Hi"], [], [], [], [],
        [CallDelta(0, '{"', "f")], [CallDelta(0, "a")], [CallDelta(0, '": [')], [CallDelta(0, "1]}")],
        [], [],
    ]  # fmt: skip
