"""The OpenAPI 3.1 document of the HTTP API, made of the very types that bodies are read and written with.

Says which operations there are, what they take and what they answer. Knows nothing of how they are served.
"""

from __future__ import annotations

from typing import Any

import msgspec

from frontend.http_tokenize import DETOKENIZE_REQUEST, TOKENIZE_REQUEST, Detokenized, Tokenized
from frontend.openai_responses import ChatChunk, ChatCompletion, ErrorResponse, ModelCard, ModelList, TextCompletion
from frontend.openai_types import CHAT_REQUEST, COMPLETION_REQUEST, RequestType
from frontend.requests import MAX_CACHE_SALT_CHARS
from frontend.responses_types import RESPONSES_REQUEST, ResponseBody
from protocol import __version__
from protocol.sampling import MAX_BAD_WORDS, MAX_CHOICES, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    "400": "the request is wrong: `param` names the field",
    "404": "no such model, response or path",
    "408": "the request did not come in time",
    "413": "the body is too long",
    "429": "more requests are waiting than the engine takes",
    "500": "the request failed",
    "503": "the engine is starting, stopping or failed",
}
# What is said of a field beside its type. That each is true is for the server to check, not for this document.
_RANGES: dict[str, dict[str, Any]] = {
    "allowed_token_ids": {"minItems": 1},
    "best_of": {"minimum": 1, "maximum": MAX_CHOICES},
    "bad_words": {"maxItems": MAX_BAD_WORDS},
    "cache_salt": {"minLength": 1, "maxLength": MAX_CACHE_SALT_CHARS},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "logit_bias": {"maxProperties": MAX_LOGIT_BIASES},
    "max_completion_tokens": {"minimum": 1},
    "input": {"minItems": 1},
    "max_output_tokens": {"minimum": 1},
    "messages": {"minItems": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "min_tokens": {"minimum": 0},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "prompt_logprobs": {"minimum": -1, "maximum": MAX_LOGPROBS},
    "repetition_penalty": {"minimum": 1e-30, "maximum": 1e30},
    "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "top_logprobs": {"minimum": -1, "maximum": MAX_LOGPROBS},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
}

_JSON_OBJECT = {"type": "object"}
_TEXT = {"type": "string"}
_FUNCTION_NAME = {"type": "string", "minLength": 1, "maxLength": 128}
_TEXT_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["text"]}, "text": _TEXT},
        "required": ["type", "text"],
    },
}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_FUNCTION = {"name": _FUNCTION_NAME, "description": _TEXT, "parameters": _JSON_OBJECT, "strict": {"type": "boolean"}}
_CALL = _object(
    {
        "id": _TEXT,
        "type": {"enum": ["function"]},
        "function": _object({"name": _TEXT, "arguments": {"anyOf": [_TEXT, _JSON_OBJECT]}}, "name"),
    },
    "function",
)
_JSON_SCHEMA = {"name": _TEXT, "description": _TEXT, "schema": _JSON_OBJECT, "strict": {"type": "boolean"}}
# Objects that are read by hand, by what else there is than their type to know about them.
_FORMS: dict[str, dict[str, Any]] = {
    "messages": _object(
        {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, _TEXT_PARTS, {"type": "null"}]},
            "name": _TEXT,
            "tool_calls": {"type": "array", "items": _CALL},
            "tool_call_id": _TEXT,
            "reasoning_content": _TEXT,
        },
        "role",
    ),
    "response_format": {
        "anyOf": [
            _object({"type": {"enum": ["text", "json_object"]}}, "type"),
            _object({"type": {"enum": ["json_schema"]}, "json_schema": _object(_JSON_SCHEMA, "schema")}, "type"),
        ]
    },
    "structured_outputs": _object(
        {
            "json": {"anyOf": [_JSON_OBJECT, _TEXT, {"type": "boolean"}]},
            "regex": _TEXT,
            "choice": {"type": "array", "items": _TEXT, "minItems": 1},
            "grammar": _TEXT,
            "json_object": {"type": "boolean"},
            "whitespace_pattern": _TEXT,
        }
    ),
    "tools": _object({"type": {"enum": ["function"]}, "function": _object(_FUNCTION, "name")}, "type", "function"),
}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}
_RESPONSES_FORMS: dict[str, dict[str, Any]] = _FORMS | {
    "input": {
        "anyOf": [
            _object(
                {
                    "type": {"enum": ["message"]},
                    "role": {"enum": ["user", "assistant", "system", "developer"]},
                    "content": _TEXT,
                },
                "role",
                "content",
            ),
            _object(
                {"type": {"enum": ["function_call"]}, "call_id": _TEXT, "name": _TEXT, "arguments": _TEXT},
                *("type", "call_id", "name", "arguments"),
            ),
            _object(
                {"type": {"enum": ["function_call_output"]}, "call_id": _TEXT, "output": _TEXT},
                *("type", "call_id", "output"),
            ),
        ]
    },
    "tools": _object({"type": {"enum": ["function"]}, **_FUNCTION}, "type", "name"),
}


def openapi_document(*, with_keys: bool = False) -> dict[str, Any]:
    """The document as JSON values; `with_keys` if the engine asks for API keys."""
    requests = {
        "/v1/chat/completions": CHAT_REQUEST,
        "/v1/completions": COMPLETION_REQUEST,
        "/v1/responses": RESPONSES_REQUEST,
        "/tokenize": TOKENIZE_REQUEST,
        "/detokenize": DETOKENIZE_REQUEST,
    }
    answers: list[Any] = [ErrorResponse, ModelCard, ModelList, Tokenized, Detokenized]
    answers += [ChatCompletion, ChatChunk, TextCompletion, ResponseBody]
    body_types = [request.type for request in requests.values()]
    _, schemas = msgspec.json.schema_components([*body_types, *answers], ref_template=_REFERENCE)
    for request in requests.values():
        forms = _RESPONSES_FORMS if request is RESPONSES_REQUEST else _FORMS
        _complete(schemas[request.type.__name__], request, forms)
    schemas[COMPLETION_REQUEST.type.__name__]["properties"]["prompt"] = _PROMPTS

    def post(path: str, summary: str, answer: Any, stream: str | None = None) -> dict[str, Any]:
        body = {"required": True, "content": {"application/json": {"schema": _reference(requests[path].type)}}}
        return {"post": {**_operation(summary, answer, stream), "requestBody": body}}

    state = {"type": "object", "properties": {"status": {"type": "string"}, "reason": {"type": "string"}}}
    health = _operation("whether requests are taken", {**state, "required": ["status"]})
    health["responses"]["503"]["content"]["application/json"]["schema"] = state
    response_id = _parameter("id", "a response's id")
    stored = {"parameters": [response_id]}
    show = _operation("a response that is stored or being made", ResponseBody)
    # A parameter that OpenAI's clients send; only false is served.
    show["parameters"] = [{"name": "stream", "in": "query", "schema": {"type": "string", "enum": ["false"]}}]
    paths: dict[str, Any] = {
        "/v1/chat/completions": post(
            "/v1/chat/completions", "an answer in a conversation", ChatCompletion, "chunks, ChatChunk, then [DONE]"
        ),
        "/v1/completions": post(
            "/v1/completions", "the continuation of texts", TextCompletion, "chunks, TextCompletion, then [DONE]"
        ),
        "/v1/responses": post("/v1/responses", "a response", ResponseBody, "the events of the Responses API"),
        "/v1/responses/{id}": stored
        | {
            "get": show,
            "delete": _operation("forgets a stored response", {"type": "object"}),
        },
        "/v1/responses/{id}/cancel": stored | {"post": _operation("ends a response where it is", ResponseBody)},
        "/v1/models": {"get": _operation("the models that are served", ModelList)},
        "/v1/models/{model}": {
            "parameters": [_parameter("model", "a model's name")],
            "get": _operation("a model", ModelCard),
        },
        "/tokenize": post("/tokenize", "the token ids of a text or a conversation", Tokenized),
        "/detokenize": post("/detokenize", "the text of token ids", Detokenized),
        "/health": {"get": health},
        "/ping": {"get": health, "post": health},
        "/version": {"get": _operation("the engine's version", {"type": "object"})},
        "/metrics": {"get": _operation("counters and gauges for Prometheus", None)},
        "/openapi.json": {"get": _operation("this document", {"type": "object"})},
    }
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {
        name: {"schema": {"type": "string"}} for name in ("text/plain", "application/openmetrics-text")
    }
    components: dict[str, Any] = {"schemas": schemas}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in paths.items():
            if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
                for operation in (operations[name] for name in ("get", "post", "delete") if name in operations):
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = _error("no API key, or not one of this engine's")
    return {
        "openapi": "3.1.0",
        "info": {"title": "mini-vLLM", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _operation(summary: str, answer: Any, stream: str | None = None) -> dict[str, Any]:
    """`answer` is a type, a schema, or None if it is no JSON; `stream` says what the events of a stream are."""
    content = {}
    if answer is not None:
        schema = answer if isinstance(answer, dict) else _reference(answer)
        content["application/json"] = {"schema": schema}
    if stream is not None:
        # Without a type: some take the events for a text, others for objects.
        content["text/event-stream"] = {"schema": {"description": stream}}
    responses = {"200": {"description": summary, "content": content}}
    return {"summary": summary, "responses": responses | {code: _error(text) for code, text in _ERRORS.items()}}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(ErrorResponse)}}}


def _parameter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}


def _complete(schema: dict[str, Any], request: RequestType, forms: dict[str, dict[str, Any]]) -> None:
    """Adds what types do not say: ranges, forms, and the values that fields which are not served may have."""
    for name, field in schema["properties"].items():
        if name in request.only:
            schema["properties"][name] = {"enum": [*request.only[name], None], "default": None}
            continue
        for kind in [field, *field.get("anyOf", ())]:
            for keyword, limit in _RANGES.get(name, {}).items():
                if kind.get("type") in _types_with(keyword):
                    kind[keyword] = limit
            if name in forms and kind.get("type") == "array":
                kind["items"] = forms[name]
            elif name in forms and kind.get("type") == "object":
                kind.clear()
                kind.update(forms[name])


def _types_with(keyword: str) -> tuple[str, ...]:
    """The types of JSON values that a range's keyword is about."""
    if keyword.endswith("Items"):
        return ("array",)
    if keyword.endswith("Length"):
        return ("string",)
    return ("object",) if keyword.endswith("Properties") else ("integer", "number")
