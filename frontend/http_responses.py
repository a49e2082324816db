"""The endpoints of the Responses API: making a response, and reading, cancelling and deleting one that is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from frontend.answer_parser import AnswerParser
from frontend.collector import Collector, Output
from frontend.generation_config import SamplingDefaults
from frontend.http_completions import Endpoint
from frontend.http_sending import EventStream, gather, send_json, stream_outputs, usage_of
from frontend.requests import RunningRequest
from frontend.response_store import ResponseStore, RunningResponse, StoredResponse
from frontend.responses_answer import ResponseAnswer
from frontend.responses_input import Message, messages_of, messages_of_output
from frontend.responses_types import (
    RESPONSES_REQUEST,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseBody,
    ResponsesFields,
    ResponseUsage,
    check_fields,
    nested_tool,
    nested_tool_choice,
    text_format,
)
from frontend.service import Service
from frontend.structured_output import read_format, read_structured_outputs
from frontend.tool_choice import Tools, read_tools
from protocol.errors import EngineError, InvalidRequestError
from protocol.messages import ChatPrompt, Prompt
from protocol.structured_outputs import StructuredOutputsParams

_encode = msgspec.json.encode


class _Answer(ResponseAnswer):
    """A response, and the conversation that it belongs to, without instructions."""

    def __init__(self, body: ResponseBody, parser: AnswerParser | None, conversation: list[Message]) -> None:
        super().__init__(body, parser)
        self.conversation = conversation


class _ResponseEvents:
    """The stream of a response."""

    def __init__(self, answer: _Answer, collector: Collector, usage: Callable[[], ResponseUsage]) -> None:
        self._answer = answer
        self._collector = collector
        self._usage = usage

    def begin(self) -> list[bytes]:
        return self._answer.begin()

    def feed(self, outputs: list[Output]) -> list[bytes]:
        events = []
        for choice, text, _ in outputs:
            if text or choice.finished is not None:
                events += self._answer.feed(text, choice.finished is not None)
        return events

    def end(self) -> list[bytes]:
        (choice,) = self._collector.choices
        assert choice.finished is not None
        return self._answer.end(choice.finished.reason, self._usage())

    def fail(self, error: EngineError) -> list[bytes]:
        return self._answer.fail(str(error))


class ResponsesEndpoint(Endpoint):
    """POST /v1/responses"""

    def __init__(self, service: Service, defaults: SamplingDefaults, store: ResponseStore) -> None:
        super().__init__(service, defaults)
        self._store = store

    async def _token_ids(self, prompt: Prompt | list[int], truncate: int | None) -> list[int]:
        try:
            return await super()._token_ids(prompt, truncate)
        except InvalidRequestError as error:
            if error.param != "messages":
                raise
            # What chat calls messages is the input here.
            raise InvalidRequestError(error.message.replace("messages", "input", 1), "input") from error

    def _decode(self, body: bytes) -> tuple[ResponsesFields, list[Prompt | list[int]]]:
        fields: ResponsesFields = RESPONSES_REQUEST.decode(body)
        check_fields(fields)
        tools = self._tools(fields)
        messages: list[Message] = []
        if fields.instructions:
            messages.append({"role": "system", "content": fields.instructions})
        if fields.previous_response_id is not None:
            messages += self._store.get(fields.previous_response_id, "previous_response_id").messages
        messages += messages_of(fields.input)
        return fields, [ChatPrompt(messages, tools.offered or None, fields.chat_template_kwargs or {})]

    def _tools(self, fields: ResponsesFields) -> Tools:
        return read_tools(
            [nested_tool(tool) for tool in fields.tools or ()],
            nested_tool_choice(fields.tool_choice),
            fields.parallel_tool_calls,
        )

    def _structured_outputs(self, fields: ResponsesFields) -> tuple[StructuredOutputsParams | None, str]:
        by_format = read_format(text_format(fields), "text.format")
        return read_structured_outputs(fields.structured_outputs, by_format, "text.format")

    def _max_tokens(self, fields: ResponsesFields) -> tuple[int | None, str | None]:
        return fields.max_output_tokens, "max_output_tokens"

    def _answer(
        self, fields: ResponsesFields, prompts: list[Prompt | list[int]], token_ids: list[list[int]]
    ) -> _Answer:
        (prompt,) = prompts
        assert isinstance(prompt, ChatPrompt)
        parallel = fields.parallel_tool_calls is not False
        new_parser = self._service.answer_format.parser_factory(
            prompt, token_ids[0], parallel=parallel, stream=bool(fields.stream)
        )
        defaults = self._defaults
        body = ResponseBody(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            model=self._service.engine.model,
            instructions=fields.instructions,
            max_output_tokens=fields.max_output_tokens,
            metadata=fields.metadata or {},
            parallel_tool_calls=parallel,
            previous_response_id=fields.previous_response_id,
            store=fields.store is not False,
            temperature=defaults.temperature if fields.temperature is None else fields.temperature,
            top_p=defaults.top_p if fields.top_p is None else fields.top_p,
            tool_choice=fields.tool_choice or "auto",
            tools=[{"strict": None, **tool} for tool in fields.tools or ()],
            text={"format": text_format(fields)},
        )
        conversation = prompt.messages[1:] if fields.instructions else prompt.messages
        return _Answer(body, new_parser() if new_parser is not None else None, conversation)

    async def _send_whole(
        self, send: Send, answer: _Answer, collector: Collector, requests: list[RunningRequest]
    ) -> None:
        self._begin(answer, requests)
        try:
            choices = await gather(collector, requests)
            if choices is None:
                return
            (choice,) = choices
            answer.feed(choice.text, is_last=True)
            answer.end(choice.finished.reason, self._usage(answer, collector, requests))
            encoded = _encode(answer.body)
            self._keep(answer, encoded)
        finally:
            self._store.end(answer.body.id, None)
        await send_json(send, encoded)

    async def _send_stream(
        self, stream: EventStream, answer: _Answer, collector: Collector, requests: list[RunningRequest]
    ) -> None:
        self._begin(answer, requests)
        try:
            writer = _ResponseEvents(answer, collector, lambda: self._usage(answer, collector, requests))
            events = await stream_outputs(stream, collector, writer)
            if events is None:
                return
            self._keep(answer, _encode(answer.body))
        finally:
            self._store.end(answer.body.id, None)
        await stream.end(events)

    def _begin(self, answer: _Answer, requests: list[RunningRequest]) -> None:
        if answer.body.store:
            running = RunningResponse(answer.body, lambda: self._service.requests.end(requests))
            self._store.begin(answer.body.id, running)

    def _keep(self, answer: _Answer, encoded: bytes) -> None:
        if answer.body.store:
            messages = [*answer.conversation, *messages_of_output(answer.body.output)]
            num_bytes = len(encoded) + len(_encode(messages))
            self._store.end(answer.body.id, StoredResponse(encoded, messages, num_bytes))

    def _usage(self, answer: _Answer, collector: Collector, requests: list[RunningRequest]) -> ResponseUsage:
        usage = usage_of(collector, requests)
        thoughts = answer.thoughts
        (request,) = requests
        num_reasoning = self._service.answer_format.num_reasoning_tokens(thoughts, request.token_ids) if thoughts else 0
        return ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(num_reasoning),
            usage.total_tokens,
        )


class StoredResponses:
    """GET and DELETE /v1/responses/{id}, and POST /v1/responses/{id}/cancel."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def show(self, request: Request) -> Response:
        """A stored response, or one that is being made with the items that it has so far."""
        if request.query_params.get("stream") == "true":
            raise InvalidRequestError("stream is not supported here: it can only be false, got 'true'", "stream")
        response_id = request.path_params["id"]
        running = self._store.running(response_id)
        return _json(_encode(running.body) if running is not None else self._store.get(response_id).body)

    async def cancel(self, request: Request) -> Response:
        """Ends a response where it is: whoever waits for it gets what there is, with the status "cancelled"."""
        response_id = request.path_params["id"]
        running = self._store.running(response_id)
        if running is None:
            self._store.get(response_id)
            raise InvalidRequestError(f"the response {response_id!r} has ended and cannot be cancelled")
        running.cancel()
        return _json(_encode(msgspec.structs.replace(running.body, status="cancelled")))

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        if self._store.running(response_id) is not None:
            raise InvalidRequestError(f"the response {response_id!r} is being made: it can only be cancelled")
        self._store.delete(response_id)
        return _json(_encode({"id": response_id, "object": "response", "deleted": True}))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
