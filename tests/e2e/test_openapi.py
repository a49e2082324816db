"""The OpenAPI document says what the server does, and no request made from it or against it is an error of the server.

Schemathesis makes requests that are right and requests that are wrong, field by field, always the same ones, and checks
status, content type and body of each answer against the document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import hypothesis
import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from frontend.openapi import openapi_document
from tests.e2e.conftest import RunningEngine

DOCUMENT = openapi_document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
# Requests of each kind and mode: those with a body have most to get wrong.
NUM_REQUESTS = int(os.environ.get("MINI_VLLM_FUZZ_REQUESTS", "60"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# What the events of a stream are, where they are all of a kind.
STREAMS = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "TextCompletion", "/v1/responses": None}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """With a short context, so that a request that asks for all of it is soon over."""
    directory = tmp_path_factory.mktemp("fuzzed")
    directory.chmod(0o700)
    running = RunningEngine(directory, "--port", "0", "--max-model-len", "96").wait_until_ready()
    yield running
    running.stop_at_any_cost()


def test_the_server_publishes_the_document(engine: RunningEngine) -> None:
    assert engine.http.get("/openapi.json").json() == DOCUMENT


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_is_an_error_of_the_server(operation: schemathesis.APIOperation, engine: RunningEngine) -> None:
    _send(operation, GenerationMode.POSITIVE, engine, NUM_REQUESTS if operation.body else 10)


@pytest.mark.parametrize(
    "operation", [operation for operation in OPERATIONS if operation.body], ids=lambda operation: operation.label
)
def test_no_wrong_request_is_an_error_of_the_server(
    operation: schemathesis.APIOperation, engine: RunningEngine
) -> None:
    _send(operation, GenerationMode.NEGATIVE, engine, NUM_REQUESTS)


@pytest.mark.parametrize(("path", "chunk"), STREAMS.items())
def test_no_stream_is_an_error_of_the_server(path: str, chunk: str | None, engine: RunningEngine) -> None:
    validator = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{chunk}", **DOCUMENT})
    num_streams = 0

    def streamed(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body["stream"] = True

    def check_events(response: requests.Response) -> None:
        nonlocal num_streams
        if response.status_code != 200:
            return
        num_streams += 1
        parts = response.text.split("\n\n")
        assert parts.pop() == ""
        if chunk is not None:
            assert parts.pop() == "data: [DONE]"
            for part in parts:
                validator.validate(json.loads(part.removeprefix("data: ")))
        else:
            assert parts[-1].startswith(("event: response.completed\n", "event: response.incomplete\n"))

    _send(SCHEMA[path]["POST"], GenerationMode.POSITIVE, engine, NUM_REQUESTS, streamed, check_events)
    assert num_streams >= NUM_REQUESTS // 10


def test_after_all_this_the_engine_serves_and_has_logged_no_traceback(engine: RunningEngine) -> None:
    answer = engine.http.post("/v1/completions", json={"prompt": "The capital of Italy is", "temperature": 0})
    assert " Rome" in answer.json()["choices"][0]["text"]
    assert "Traceback" not in engine.output


def _send(
    operation: schemathesis.APIOperation,
    mode: GenerationMode,
    engine: RunningEngine,
    num_requests: int,
    change: Callable[[schemathesis.Case], None] = lambda case: None,
    look: Callable[[requests.Response], None] = lambda response: None,
) -> None:
    @hypothesis.settings(
        max_examples=num_requests,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        change(case)
        # Not `case.call`, which reads no more than the beginning of a stream.
        response = requests.request(**case.as_transport_kwargs(base_url=engine.url), timeout=60)
        look(response)
        case.validate_response(response, checks=CHECKS)

    check()
