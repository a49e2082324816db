"""The two completion endpoints: from a body to running requests, and from their outputs to a response or a stream.

Whatever ends an exchange early, an error, a client that leaves or a server that stops, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from frontend.answers import Answer, ChatAnswer, ParsedChatAnswer, TextAnswer, WholeChoice
from frontend.collector import Collector
from frontend.generation_config import SamplingDefaults
from frontend.http_errors import error_body, require_model
from frontend.http_exchange import exchange_of
from frontend.openai_responses import PromptTokensDetails, Usage
from frontend.openai_types import (
    CHAT_REQUEST,
    COMPLETION_REQUEST,
    ChatFields,
    CompletionFields,
    RequestFields,
    sampling_params,
)
from frontend.requests import RunningRequest
from frontend.service import Service
from frontend.structured_output import read_response_format, read_structured_outputs
from frontend.tool_choice import Tools, read_tools
from protocol.errors import EngineError, InvalidRequestError
from protocol.messages import ChatPrompt, Prompt, TextPrompt
from protocol.structured_outputs import StructuredOutputsParams

MAX_BODY_BYTES = 32 * 1024 * 1024
# The OpenAI API's for plain completions; a chat answer may fill the context.
_DEFAULT_COMPLETION_TOKENS = 16

_encode = msgspec.json.encode
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks a proxy in between to pass events on as they come.
    (b"x-accel-buffering", b"no"),
]


class Endpoint(ABC):
    """An ASGI application; subclasses say what the request and the answer look like."""

    def __init__(self, service: Service, defaults: SamplingDefaults) -> None:
        self._service = service
        self._defaults = defaults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.require_ready()
        body = await read_body(scope, receive)
        if body is None:
            return
        arrived = time.perf_counter()
        self._service.require_ready()
        fields, prompts = self._decode(body)
        self._check(fields)
        limit, limit_name = self._max_tokens(fields)
        params = sampling_params(fields, self._defaults, limit, limit_name)
        wanted, wanted_by = self._structured_outputs(fields)
        tools = self._tools(fields)
        token_ids = [await self._token_ids(prompt) for prompt in prompts]
        if limit is not None and limit_name is not None:
            for ids in token_ids:
                self._service.prompts.require_room(limit, ids, limit_name)
        grammars = [
            await self._service.grammars.of_answer(wanted, prompt, ids, tools, wanted_by)
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
        self._service.require_ready()

        stream = bool(fields.stream)
        collector = Collector(len(token_ids))
        watcher = asyncio.get_running_loop().create_task(_watch(receive, collector))
        requests: list[RunningRequest] = []
        try:
            for index, ids in enumerate(token_ids):
                requests.append(
                    self._service.requests.submit(
                        ids,
                        self._service.prompts.fit_max_tokens(params, ids),
                        collector,
                        index,
                        stream=stream,
                        priority=fields.priority or 0,
                        cache_salt=fields.cache_salt,
                        arrival_time=arrived,
                        grammar=grammars[index],
                    )
                )
            answer = self._answer(fields, prompts, token_ids)
            if stream:
                await self._send_stream(send, answer, collector, requests)
            else:
                await self._send_whole(send, answer, collector, requests)
        finally:
            watcher.cancel()
            self._service.requests.abort(requests)
            exchange_of(scope).count_tokens(requests)

    @abstractmethod
    def _decode(self, body: bytes) -> tuple[Any, list[Prompt | list[int]]]:
        """The request's fields and its prompts."""

    def _structured_outputs(self, fields: Any) -> tuple[StructuredOutputsParams | None, str]:
        """What the answer must be, and the name of the field that says so."""
        by_format = read_response_format(fields.response_format)
        return read_structured_outputs(fields.structured_outputs, by_format, "response_format")

    def _tools(self, fields: Any) -> Tools:
        """The functions that may or must be called."""
        return Tools()

    async def _token_ids(self, prompt: Prompt | list[int]) -> list[int]:
        return await self._service.prompts.token_ids(prompt)

    @abstractmethod
    def _max_tokens(self, fields: Any) -> tuple[int | None, str | None]:
        """The most tokens to generate, and the name of the field that says so, if one does."""

    @abstractmethod
    def _answer(self, fields: Any, prompts: list[Prompt | list[int]], token_ids: list[list[int]]) -> Any:
        """What makes the response out of outputs, behind these prompts, which have these ids."""

    async def _send_whole(self, send: Send, answer: Any, collector: Collector, requests: list[RunningRequest]) -> None:
        await _respond(send, answer, collector, requests)

    async def _send_stream(self, send: Send, answer: Any, collector: Collector, requests: list[RunningRequest]) -> None:
        await _stream(send, answer, collector, requests)

    def _check(self, fields: RequestFields) -> None:
        require_model(fields.model, self._service.engine.model)
        if fields.stream_options is not None and not fields.stream:
            raise InvalidRequestError("stream_options needs stream to be true", "stream_options")

    def _answer_options(self, fields: ChatFields | CompletionFields) -> dict[str, Any]:
        return {
            "model": self._service.engine.model,
            # Without a tokenizer the ids are all there is to answer with.
            "with_token_ids": bool(fields.return_token_ids) or self._service.tokenizer is None,
            "with_usage": fields.stream_options is not None and bool(fields.stream_options.include_usage),
        }


class ChatEndpoint(Endpoint):
    """POST /v1/chat/completions"""

    def _decode(self, body: bytes) -> tuple[ChatFields, list[Prompt | list[int]]]:
        fields: ChatFields = CHAT_REQUEST.decode(body)
        tools = self._tools(fields)
        options = dict(fields.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(fields, name) is not None:
                options[name] = getattr(fields, name)
        return fields, [ChatPrompt(fields.messages, tools.offered or None, options)]

    def _tools(self, fields: ChatFields) -> Tools:
        return read_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)

    def _max_tokens(self, fields: ChatFields) -> tuple[int | None, str | None]:
        if fields.max_completion_tokens is not None:
            return fields.max_completion_tokens, "max_completion_tokens"
        return fields.max_tokens, "max_tokens"

    def _answer(self, fields: ChatFields, prompts: list[Prompt | list[int]], token_ids: list[list[int]]) -> ChatAnswer:
        (prompt,) = prompts
        assert isinstance(prompt, ChatPrompt)
        new_parser = self._service.answer_format.parser_factory(
            prompt, token_ids[0], parallel=fields.parallel_tool_calls is not False, stream=bool(fields.stream)
        )
        if new_parser is None:
            return ChatAnswer(**self._answer_options(fields))
        with_reasoning = fields.include_reasoning is not False
        return ParsedChatAnswer(new_parser=new_parser, with_reasoning=with_reasoning, **self._answer_options(fields))


class CompletionEndpoint(Endpoint):
    """POST /v1/completions"""

    def _decode(self, body: bytes) -> tuple[CompletionFields, list[Prompt | list[int]]]:
        fields: CompletionFields = COMPLETION_REQUEST.decode(body)
        return fields, [TextPrompt(item) if isinstance(item, str) else item for item in fields.prompts()]

    def _max_tokens(self, fields: CompletionFields) -> tuple[int | None, str | None]:
        if fields.max_tokens is None:
            return _DEFAULT_COMPLETION_TOKENS, None
        return fields.max_tokens, "max_tokens"

    def _answer(
        self, fields: CompletionFields, prompts: list[Prompt | list[int]], token_ids: list[list[int]]
    ) -> TextAnswer:
        return TextAnswer(**self._answer_options(fields))


async def read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body, or None if the client left before it was there.

    Raises:
        HTTPException: it is too long.
    """
    too_large = HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > MAX_BODY_BYTES:
            raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def _watch(receive: Receive, collector: Collector) -> None:
    """Notices that the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
    collector.leave()


async def gather(collector: Collector, requests: list[RunningRequest]) -> list[WholeChoice] | None:
    """Waits for all choices to finish; None if the client has left."""
    whole: list[WholeChoice | None] = [None] * len(requests)
    while collector.num_unfinished:
        outputs = await collector.take()
        if not outputs:
            return None
        for choice, text, token_ids in outputs:
            assert choice.finished is not None
            prompt_token_ids = requests[choice.index].prompt_token_ids
            whole[choice.index] = WholeChoice(text, token_ids, prompt_token_ids, choice.finished)
    return [choice for choice in whole if choice is not None]


async def _respond(send: Send, answer: Answer, collector: Collector, requests: list[RunningRequest]) -> None:
    choices = await gather(collector, requests)
    if choices is not None:
        await send_json(send, _encode(answer.whole(choices, usage_of(collector, requests))))


async def send_json(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(send: Send, answer: Answer, collector: Collector, requests: list[RunningRequest]) -> None:
    # Nothing is sent before there is output, so that a request that fails at once gets a status that says so.
    outputs = await collector.take()
    if not outputs:
        return
    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
    events = [
        _event(chunk)
        for request in requests
        if (chunk := answer.first_chunk(request.tag, request.prompt_token_ids)) is not None
    ]
    try:
        while True:
            for choice, text, token_ids in outputs:
                # Tokens that make no text yet, half a character or the possible start of a stop string, can wait.
                if text or choice.finished is not None or answer.with_token_ids:
                    chunk = answer.chunk(choice.index, text, token_ids, choice.finished)
                    if chunk is not None:
                        events.append(_event(chunk))
            if not collector.num_unfinished:
                break
            if events:
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                events = []
            outputs = await collector.take()
            if not outputs:
                return
        if answer.with_usage:
            events.append(_event(answer.usage_chunk(usage_of(collector, requests))))
    except EngineError as error:
        events.append(_event(error_body(error)))
    events.append(b"data: [DONE]\n\n")
    await send({"type": "http.response.body", "body": b"".join(events)})


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def usage_of(collector: Collector, requests: list[RunningRequest]) -> Usage:
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    completion_tokens = sum(len(request.token_ids) for request in requests)
    cached = sum(choice.finished.num_cached_tokens for choice in collector.choices if choice.finished is not None)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached),
    )
