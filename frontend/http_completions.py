"""The two completion endpoints: from a body to running requests, and to what makes the response of their outputs.

Whatever ends an exchange early, an error, a client that leaves or a server that stops, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from frontend.admission import Reservation
from frontend.answers import AnswerOptions, ChatAnswer, ParsedChatAnswer, TextAnswer
from frontend.client_identity import http_client
from frontend.collector import Collector
from frontend.deadlines import time_limit
from frontend.generation_config import SamplingDefaults
from frontend.http_errors import require_model
from frontend.http_exchange import exchange_of
from frontend.http_sending import EventStream, respond, stream_events
from frontend.openai_logprobs import ChatLogprobsWriter, TextLogprobsWriter, TokenNames
from frontend.openai_types import (
    CHAT_REQUEST,
    COMPLETION_REQUEST,
    ChatFields,
    CompletionFields,
    RequestFields,
    renamed,
    sampling_params,
)
from frontend.requests import RunningRequest
from frontend.service import Service
from frontend.structured_output import read_response_format, read_structured_outputs
from frontend.token_options import check_logprobs_of_all
from frontend.tool_choice import Tools, read_tools
from protocol.config import parse_size
from protocol.errors import InvalidRequestError
from protocol.messages import ChatPrompt, Prompt, TextPrompt
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

# The OpenAI API's for plain completions; a chat answer may fill the context.
_DEFAULT_COMPLETION_TOKENS = 16
# Answers to one body, all prompts and choices together: each is a request of its own.
_MOST_CHOICES = 2048


class Endpoint(ABC):
    """An ASGI application; subclasses say what the request and the answer look like."""

    def __init__(self, service: Service, defaults: SamplingDefaults) -> None:
        self._service = service
        self._defaults = defaults
        self._max_stream_buffer = parse_size(service.config.options.max_stream_buffer, "--max-stream-buffer")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.require_ready()
        with self._service.admission.reserve() as place:
            body = await read_body(scope, receive, self._service.max_body_bytes, place)
            if body is None:
                return
            arrived = time.perf_counter()
            self._service.require_ready()
            fields, prompts = self._decode(body)
            del body
            await self._serve(fields, prompts, place, arrived, scope, receive, send)

    async def _serve(
        self,
        fields: Any,
        prompts: list[Prompt | list[int]],
        place: Reservation,
        arrived: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Runs the requests of a body that has `arrived` and sends their answer. Its room is released in between."""
        self._check(fields)
        limit, limit_name = self._max_tokens(fields)
        names = self._own_names(fields)
        with renamed(names):
            params = self._generated(fields, sampling_params(fields, self._defaults, limit))
        _require_few(len(prompts), params.n, "n" if fields.n == params.n else "best_of")
        wanted, wanted_by = self._structured_outputs(fields)
        tools = self._tools(fields)
        timeout = self._service.timeout_of(fields.timeout)
        client = http_client(scope, has_keys=bool(self._service.config.options.api_key))
        num_requests = len(prompts) * params.n

        def abort_slow_client() -> None:
            logger.warning(
                "a client does not read its stream, and more waits for it than --max-stream-buffer allows: "
                "aborting its %d requests",
                num_requests,
            )
            exchange_of(scope).abort()

        collector = Collector(num_requests, self._max_stream_buffer, abort_slow_client, exchange_of(scope).answer_ready)
        watcher = asyncio.get_running_loop().create_task(_watch(receive, collector))
        requests: list[RunningRequest] = []
        try:
            place.add(num_requests)
            with place, renamed(names):
                async with time_limit(arrived, timeout):
                    token_ids = [await self._token_ids(prompt, params.truncate_prompt_tokens) for prompt in prompts]
                    if limit is not None and limit_name is not None:
                        for ids in token_ids:
                            self._service.prompts.require_room(limit, ids, limit_name)
                    fitting = [self._service.prompts.fit_max_tokens(params, ids) for ids in token_ids]
                    check_logprobs_of_all(fitting, token_ids, self._service.engine.vocab_size)
                    grammars = [
                        await self._service.grammars.of_answer(wanted, prompt, ids, tools, wanted_by)
                        for prompt, ids in zip(prompts, token_ids, strict=True)
                    ]
                self._service.require_ready()
                self._service.admission.require_tokens(sum(map(len, token_ids)) * params.n, num_requests)
                for ids, own_params, grammar in zip(token_ids, fitting, grammars, strict=True):
                    for choice in range(params.n):
                        requests.append(
                            self._service.requests.submit(
                                ids,
                                own_params.choice(choice),
                                collector,
                                len(requests),
                                stream=bool(fields.stream),
                                priority=fields.priority or 0,
                                cache_salt=fields.cache_salt,
                                arrival_time=arrived,
                                grammar=grammar,
                                timeout=timeout,
                                client=client,
                            )
                        )
            answer = self._answer(fields, prompts, token_ids)
            if fields.stream:
                exchange = exchange_of(scope)
                stream = EventStream(send, exchange.send_body, exchange.answer_ready)
                await self._send_stream(stream, answer, collector, requests)
            else:
                await self._send_whole(send, answer, collector, requests)
        finally:
            watcher.cancel()
            self._service.requests.abort(requests)
            if requests:
                exchange_of(scope).count_tokens(requests, params.n)

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

    async def _token_ids(self, prompt: Prompt | list[int], truncate: int | None) -> list[int]:
        return await self._service.prompts.token_ids(prompt, truncate)

    @abstractmethod
    def _max_tokens(self, fields: Any) -> tuple[int | None, str | None]:
        """The most tokens to generate, and the name of the field that says so, if one does."""

    def _own_names(self, fields: Any) -> dict[str, str]:
        """Sampling parameters that the request calls by other names."""
        _, limit_name = self._max_tokens(fields)
        return {"max_tokens": limit_name} if limit_name is not None else {}

    def _generated(self, fields: Any, params: SamplingParams) -> SamplingParams:
        """What is generated, of which the answer may be a part."""
        return params

    @abstractmethod
    def _answer(self, fields: Any, prompts: list[Prompt | list[int]], token_ids: list[list[int]]) -> Any:
        """What makes the response out of outputs, behind these prompts, which have these ids."""

    async def _send_whole(self, send: Send, answer: Any, collector: Collector, requests: list[RunningRequest]) -> None:
        await respond(send, answer, collector, requests)

    async def _send_stream(
        self, events: EventStream, answer: Any, collector: Collector, requests: list[RunningRequest]
    ) -> None:
        await stream_events(events, answer, collector, requests)

    def _check(self, fields: RequestFields) -> None:
        require_model(fields.model, self._service.engine.model)
        if fields.stream_options is not None and not fields.stream:
            raise InvalidRequestError("stream_options needs stream to be true", "stream_options")
        if fields.stream and fields.prompt_logprobs is not None:
            raise InvalidRequestError(
                f"prompt_logprobs has no place in a stream: stream must be false, got prompt_logprobs "
                f"{fields.prompt_logprobs} with it",
                "prompt_logprobs",
            )

    def _answer_options(self, fields: ChatFields | CompletionFields) -> AnswerOptions:
        tokenizer, options = self._service.tokenizer, fields.stream_options
        return AnswerOptions(
            # Without a tokenizer the ids are all there is to answer with.
            with_token_ids=bool(fields.return_token_ids) or tokenizer is None,
            with_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
            num_choices=fields.n or 1,
            num_generated=fields.n or 1,
            token_names=TokenNames(tokenizer, as_token_ids=bool(fields.return_tokens_as_token_ids)),
            prompt_logprobs=fields.prompt_logprobs,
        )


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

    def _own_names(self, fields: ChatFields) -> dict[str, str]:
        return super()._own_names(fields) | {"logprobs": "top_logprobs"}

    def _answer(self, fields: ChatFields, prompts: list[Prompt | list[int]], token_ids: list[list[int]]) -> ChatAnswer:
        (prompt,) = prompts
        assert isinstance(prompt, ChatPrompt)
        new_parser = self._service.answer_format.parser_factory(
            prompt, token_ids[0], parallel=fields.parallel_tool_calls is not False, stream=bool(fields.stream)
        )
        model, options = self._service.engine.model, self._answer_options(fields)
        logprobs = ChatLogprobsWriter(options.token_names) if fields.logprobs else None
        if new_parser is None:
            return ChatAnswer(model, options, logprobs)
        with_reasoning = fields.include_reasoning is not False
        return ParsedChatAnswer(model, options, logprobs, new_parser, with_reasoning=with_reasoning)


class CompletionEndpoint(Endpoint):
    """POST /v1/completions"""

    def _decode(self, body: bytes) -> tuple[CompletionFields, list[Prompt | list[int]]]:
        fields: CompletionFields = COMPLETION_REQUEST.decode(body)
        if _is_prompt_only(fields) and fields.min_tokens:
            raise InvalidRequestError.out_of_range("min_tokens", fields.min_tokens, "at most max_tokens, which is 0")
        return fields, [TextPrompt(item) if isinstance(item, str) else item for item in fields.prompts()]

    def _max_tokens(self, fields: CompletionFields) -> tuple[int | None, str | None]:
        if fields.max_tokens is None:
            return _DEFAULT_COMPLETION_TOKENS, None
        # Nothing but the prompt is wanted: a token is generated all the same, and left out of the answer.
        return 1 if _is_prompt_only(fields) else fields.max_tokens, "max_tokens"

    def _generated(self, fields: CompletionFields, params: SamplingParams) -> SamplingParams:
        best_of = fields.best_of_more()
        if best_of is None:
            return params
        # By log-probabilities they are chosen, whether these are shown or not.
        return msgspec.structs.replace(params, n=best_of, logprobs=params.logprobs or 0)

    def _answer(
        self, fields: CompletionFields, prompts: list[Prompt | list[int]], token_ids: list[list[int]]
    ) -> TextAnswer:
        options = self._answer_options(fields)
        options.num_generated = fields.best_of_more() or options.num_choices
        logprobs = None
        if fields.logprobs is not None:
            skip = fields.skip_special_tokens is not False
            num_echoed = fields.logprobs if fields.echo else None
            logprobs = TextLogprobsWriter(options.token_names, skip_special_tokens=skip, num_echoed=num_echoed)
        echo = None
        if fields.echo:
            is_cut = fields.truncate_prompt_tokens is not None
            echo = [self._echoed(prompt, ids, is_cut) for prompt, ids in zip(prompts, token_ids, strict=True)]
        is_prompt_only = _is_prompt_only(fields)
        return TextAnswer(self._service.engine.model, options, logprobs, echo=echo, is_prompt_only=is_prompt_only)

    def _echoed(self, prompt: Prompt | list[int], token_ids: list[int], is_cut: bool) -> str:
        """A text as it was sent, unless it was cut; else what the ids stand for, as far as the engine knows."""
        if isinstance(prompt, TextPrompt) and not is_cut:
            return prompt.text
        tokenizer = self._service.tokenizer
        return tokenizer.decode(token_ids, skip_special_tokens=False) if tokenizer is not None else ""


def _is_prompt_only(fields: CompletionFields) -> bool:
    return fields.max_tokens == 0 and bool(fields.echo)


def _require_few(num_prompts: int, num_choices: int, choices_name: str) -> None:
    """Raises InvalidRequestError if one body asks for more answers than a frontend lets it have at once."""
    if num_prompts * num_choices > _MOST_CHOICES:
        name = choices_name if num_choices > 1 else "prompt"
        raise InvalidRequestError(
            f"{name} is too large: {num_prompts} prompts with {num_choices} choices each make "
            f"{num_prompts * num_choices} answers, of which a request may have {_MOST_CHOICES}",
            name,
        )


async def read_body(scope: Scope, receive: Receive, max_bytes: int, place: Reservation) -> bytes | None:
    """The whole body, or None if the client left before it was there. Takes room in `place` for what has come.

    Raises:
        HTTPException: it is too long.
        EngineOverloadedError: there is no room for it beside what waits.
    """
    too_large = HTTPException(413, f"the body is longer than {max_bytes} bytes (--max-body-size)")
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > max_bytes:
            raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise too_large
        place.add(num_bytes=len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _watch(receive: Receive, collector: Collector) -> None:
    """Notices that the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
    collector.leave()
