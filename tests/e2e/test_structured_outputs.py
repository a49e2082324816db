"""Structured outputs of the running engine, at temperature 1: what ends is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from frontend import Client, InvalidRequestError, SamplingParams, StructuredOutputsParams
from tests.e2e.conftest import RunningEngine
from tests.support.requests import TIME, WEATHER, ask, is_idle, wait_until
from tests.support.schemas import record, schemas

SCHEMAS = schemas()
PROMPT = "Once upon a time there was"
MAX_TOKENS = 100


@pytest.fixture(scope="module")
def ai(engine: RunningEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def structured(seed: int, max_tokens: int = MAX_TOKENS, **wanted: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**wanted)
    )


FORMATS = jsonschema.FormatChecker()
for each in ("date", "time", "date-time"):
    _, errors = FORMATS.checkers[each]

    @FORMATS.checks(each, errors)
    def conforms(text: str, name: str = each) -> bool:
        """As RFC 3339 has it, with leap seconds and a year 0, which Python lacks; and February 29 in all years, since a
        grammar does not count years."""
        text = re.sub("^0000", "2000", text).replace("-02-29", "-02-28")
        return jsonschema.FormatChecker().conforms(re.sub(r"(?<=\d:\d\d):60", ":59", text), name)


def is_valid(text: str, schema: Any) -> bool:
    return jsonschema.Draft202012Validator(schema, format_checker=FORMATS).is_valid(json.loads(text))


def test_every_finished_answer_is_valid_for_its_schema(client: Client) -> None:
    assert len(SCHEMAS) >= 200
    params = [structured(seed, json=schema) for seed, schema in enumerate(SCHEMAS.values())]
    outputs = client.generate([PROMPT] * len(params), params)
    answers = dict(zip(SCHEMAS, [output.outputs[0] for output in outputs], strict=True))
    finished = {name: answer.text for name, answer in answers.items() if answer.finish_reason == "stop"}
    assert {answer.finish_reason for answer in answers.values()} <= {"stop", "length"}
    assert [f"{name}: {text}" for name, text in finished.items() if not is_valid(text, SCHEMAS[name])] == []
    # A number or a string without a bound may go on, and few others have.
    assert len(finished) >= 200, sorted(SCHEMAS.keys() - finished.keys())
    wait_until(lambda: is_idle(client.stats()), "the engine is idle, and no block is lost")


def test_answers_are_valid_with_one_step_in_flight_and_few_blocks(start_engine: Callable[..., RunningEngine]) -> None:
    flags = ("--no-http", "--no-async-scheduling", "--max-model-len", "256", "--num-gpu-blocks-override", "24")
    engine = start_engine(*flags).wait_until_ready()
    some = [
        SCHEMAS[name] for name in ("array of objects", "matrix", "a tree", "anyOf objects", "word and perhaps date")
    ]
    with Client(engine.address) as client:
        params = [structured(seed, json=schema) for schema in some for seed in range(5)]
        answers = [output.outputs[0] for output in client.generate([PROMPT * 4] * len(params), params)]
        finished = [(a.text, p) for a, p in zip(answers, params, strict=True) if a.finish_reason == "stop"]
        assert len(finished) > 15
        assert all(is_valid(text, each.structured_outputs.json) for text, each in finished)
        assert client.stats().num_preemptions > 0
        wait_until(lambda: is_idle(client.stats()), "the engine is idle, and no block is lost")


def test_text_follows_a_regex_a_choice_or_a_grammar(client: Client) -> None:
    sums = 'start: sum\nsum: NUMBER (" + " NUMBER){1,3} " = " NUMBER\nNUMBER: /[1-9][0-9]?/\n'
    number = "[1-9][0-9]?"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"regex": r"[A-Z][a-z]{2,5}-\d{3}"}, r"[A-Z][a-z]{2,5}-\d{3}"),
        ({"regex": r"(yes|no), (because|though) [a-z ]{1,20}\."}, r"(yes|no), (because|though) [a-z ]{1,20}\."),
        ({"choice": ("Paris", "Rome", 'say "yes"', "ü\n")}, 'Paris|Rome|say "yes"|ü\n'),
        ({"choice": ("alone",)}, "alone"),
        ({"grammar": sums}, rf"{number}( \+ {number}){{1,3}} = {number}"),
    ]
    params = [structured(seed, **wanted) for wanted, _ in cases for seed in range(8)]
    expected = [pattern for _, pattern in cases for _ in range(8)]
    for output, pattern in zip(client.generate([PROMPT] * len(params), params), expected, strict=True):
        (answer,) = output.outputs
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, answer.text), (answer.text, pattern)


def test_json_objects_and_white_space(client: Client) -> None:
    flat = record({"a": {"type": "boolean"}, "b": {"type": "boolean"}})
    params = [
        *(structured(seed, json_object=True, max_tokens=60) for seed in range(12)),
        *(structured(seed, json=json.dumps(flat), whitespace_pattern=r"\n?") for seed in range(12)),
        *(structured(seed, json=flat) for seed in range(12)),
    ]
    texts = []
    for output in client.generate([PROMPT] * len(params), params):
        if output.outputs[0].finish_reason == "stop":
            texts.append(output.outputs[0].text)
            assert isinstance(json.loads(texts[-1]), dict)
    assert len(texts) > 24, "some objects have ended too"
    assert any("\n" in text for text in texts[-24:-12])
    assert all(re.fullmatch(r'\{"a": \w+, "b": \w+\}', text) for text in texts[-12:])


def test_it_works_beside_other_options(client: Client) -> None:
    """Several answers, a seed, stop strings, log-probabilities, tokens that are forbidden or must wait, prompts that
    are cached, and neighbours without a grammar."""
    digits = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 20}
    wanted = StructuredOutputsParams(json=digits)
    base = {"temperature": 1.0, "seed": 5, "max_tokens": 90, "structured_outputs": wanted}
    several = SamplingParams(**base, n=3)
    with_logprobs = SamplingParams(**base, logprobs=2)
    stopped = SamplingParams(**base, stop=(", ",))
    patient = SamplingParams(**{**base, "min_tokens": 25})
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=40)
    banned = SamplingParams(**base, bad_words=("1", "2", "3", "4"), frequency_penalty=1.0)
    params = [several, with_logprobs, stopped, patient, free, banned]
    for _ in range(2):
        outputs = client.generate([PROMPT] * len(params), params)
        answers = [output.outputs for output in outputs]
        texts = [answer.text for answer in answers[0]]
        assert len(set(texts)) == 3
        assert all(is_valid(text, digits) for text in texts)
        assert answers[1][0].text == texts[0], "the same seed draws the same"
        assert len(answers[1][0].logprobs) == len(answers[1][0].token_ids)
        assert answers[2][0].text == texts[0].partition(", ")[0]
        assert answers[2][0].stop_reason == ", "
        assert is_valid(answers[3][0].text, digits)
        assert len(answers[3][0].token_ids) >= 25
        assert not set("1234") & set(answers[5][0].text)
        assert is_valid(answers[5][0].text, digits)
    assert [answers[4][0].text] == [client.generate([PROMPT], [free])[0].outputs[0].text]


def test_min_tokens_does_not_keep_a_complete_answer_from_ending(client: Client) -> None:
    wanted = StructuredOutputsParams(choice=("yes", "no"))
    params = SamplingParams(temperature=1.0, max_tokens=50, min_tokens=40, ignore_eos=True, structured_outputs=wanted)
    (answer,) = client.generate(PROMPT, params)[0].outputs
    assert answer.text in ("yes", "no")
    assert answer.finish_reason == "stop"


def test_a_stream_gives_the_same_text(client: Client) -> None:
    params = structured(3, json=SCHEMAS["array of objects"])
    streamed = "".join(chunk.text for chunk in client.stream(PROMPT, params))
    assert streamed == client.generate(PROMPT, params)[0].outputs[0].text
    assert is_valid(streamed, SCHEMAS["array of objects"])


@pytest.mark.parametrize(
    ("wanted", "param", "message"),
    [
        ({"json": {"properties": {"a": {"uniqueItems": True}}}}, "structured_outputs", "uniqueItems"),
        ({"json": {"type": "strin"}}, "structured_outputs", "strin"),
        ({"json": '{"type": '}, "structured_outputs.json", "not valid JSON"),
        ({"json": {"$ref": "#/$defs/a"}}, "structured_outputs", "/$defs/a"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "structured_outputs", "Unsatisfiable"),
        ({"regex": "(a"}, "structured_outputs", "unclosed group"),
        ({"regex": "a(?=b)"}, "structured_outputs", "look-around"),
        ({"grammar": "start: a"}, "structured_outputs", "unknown name"),
        ({"grammar": "start: <nope>"}, "structured_outputs", "unknown special token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_grammar_that_cannot_be_followed_is_refused(
    client: Client, wanted: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(PROMPT, structured(0, **wanted))
    assert caught.value.param == param
    assert message in caught.value.message


# --- over HTTP ------------------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str = Field(max_length=12)
    country: Literal["France", "Italy", "Spain"]
    people: int = Field(ge=0, le=99)


class Trip(BaseModel):
    cities: list[City] = Field(max_length=2)
    by: Literal["train", "boat"] | None


def test_the_openai_client_parses_into_a_model(ai: OpenAI) -> None:
    for seed in range(2):
        answer = ai.chat.completions.parse(
            model="tiny-qwen3", messages=ask("Where do I go?"), response_format=Trip, temperature=1, seed=seed,
            max_tokens=400,
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Trip)
    with ai.chat.completions.stream(
        model="tiny-qwen3", messages=ask("Where do I go?"), response_format=Trip, temperature=1, seed=0, max_tokens=400
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Trip)


def test_responses_parse_into_a_model(ai: OpenAI) -> None:
    response = ai.responses.parse(
        model="tiny-qwen3", input="Where do I go?", text_format=Trip, temperature=1, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Trip)
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS["3 required"]}}},
        {"structured_outputs": {"json": SCHEMAS["3 required"]}},
    ],
    ids=["response_format", "structured_outputs"],
)
def test_both_endpoints_take_both_fields(engine: RunningEngine, fields: dict[str, Any]) -> None:
    common = {"temperature": 1, "seed": 1, "max_tokens": 200, **fields}
    for path, prompt in (("chat/completions", {"messages": ask("Hello")}), ("completions", {"prompt": PROMPT})):
        response = engine.http.post(f"/v1/{path}", json={**prompt, **common})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "stop"
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert is_valid(text, SCHEMAS["3 required"])


def test_thoughts_come_first_and_are_free(ai: OpenAI) -> None:
    question = ask("What is 3 plus 4?")
    answer = ai.chat.completions.create(
        model="tiny-qwen3", messages=question, temperature=0, max_tokens=200,
        extra_body={"structured_outputs": {"regex": "The sum is [0-9]\\."}},
    )  # fmt: skip
    assert answer.choices[0].message.reasoning_content == "I have to work out 3 plus 4. 3 + 4 = 7."
    assert answer.choices[0].message.content == "The sum is 7."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "get_time"])
def test_an_answer_that_must_call_calls(ai: OpenAI, choice: str, stream: bool) -> None:
    tool_choice = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    for seed in range(2):
        options = {"tools": [WEATHER, TIME], "tool_choice": tool_choice, "seed": seed, "max_tokens": 300}
        if stream:
            with ai.chat.completions.stream(
                model="tiny-qwen3", messages=ask("Tell me a story."), temperature=1, **options
            ) as events:
                (found,) = events.get_final_completion().choices
        else:
            (found,) = ai.chat.completions.create(
                model="tiny-qwen3", messages=ask("Tell me a story."), temperature=1, **options
            ).choices
        if found.finish_reason == "length":
            continue
        assert found.finish_reason == "tool_calls"
        assert not found.message.content
        assert found.message.tool_calls
        for call in found.message.tool_calls:
            assert call.function.name in ({"get_weather", "get_time"} if choice == "required" else {choice})
            assert is_valid(call.function.arguments, WEATHER["function"]["parameters"])


def test_a_response_that_must_call_calls(ai: OpenAI) -> None:
    flat = [{"type": "function", **tool["function"], "strict": False} for tool in (WEATHER, TIME)]
    response = ai.responses.create(
        model="tiny-qwen3", input="What is the weather in Paris?", tools=flat, temperature=0, max_output_tokens=300,
        tool_choice={"type": "function", "name": "get_time"}, extra_body={"seed": 1},
    )  # fmt: skip
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_time"
    assert is_valid(call.arguments, WEATHER["function"]["parameters"])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object, got None"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
            "response_format.json_schema.schema",
            "must be a JSON schema, got 5",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            'Unimplemented keys: ["not"] (at /not)',
        ),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "not supported"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice, grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "got regex and choice"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "not supported"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 1024 strings"),
        ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice", "a list of strings"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "a string, got 5"),
        ({"structured_outputs": {"regex": "[a"}}, "structured_outputs", "unclosed character class"),
        ({"structured_outputs": {"grammar": "start: <nope>"}}, "structured_outputs", "unknown special token"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "response_format and structured_outputs cannot both",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_followed_is_a_400_that_names_the_part(
    engine: RunningEngine, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    for path, prompt in (("chat/completions", {"messages": ask("Hello")}), ("completions", {"prompt": PROMPT})):
        response = engine.http.post(f"/v1/{path}", json={**prompt, **fields, "stream": stream, "max_tokens": 4})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert message in error["message"]


def test_a_function_whose_arguments_cannot_be_followed_is_named(ai: OpenAI) -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(openai.BadRequestError, match='Unimplemented keys: \\["not"\\]') as caught:
        ai.chat.completions.create(
            model="tiny-qwen3", messages=ask("Hello"), tools=[WEATHER, odd], tool_choice="required"
        )
    assert caught.value.param == "tools[1].function.parameters"
