"""From what running requests produce to what a client receives: a body when all is there, or a stream of events.

Knows how answers are asked for what they look like, not what that is.
"""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Scope, Send

from frontend.answers import Answer, WholeChoice
from frontend.collector import Collector
from frontend.http_errors import error_body
from frontend.http_exchange import exchange_of
from frontend.openai_responses import PromptTokensDetails, Usage, UsageSoFar
from frontend.requests import RunningRequest
from protocol.errors import EngineError
from protocol.messages import Finished

_encode = msgspec.json.encode
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks a proxy in between to pass events on as they come.
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """A response of server-sent events."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send_start = send
        self._send_body = exchange_of(scope).send_body

    async def begin(self) -> None:
        await self._send_start({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})

    async def send(self, events: list[bytes]) -> None:
        await self._send_body({"type": "http.response.body", "body": b"".join(events), "more_body": True})

    async def end(self, events: list[bytes]) -> None:
        await self._send_body({"type": "http.response.body", "body": b"".join(events)})


async def gather(
    collector: Collector, requests: list[RunningRequest], *, is_prompt_only: bool = False
) -> list[WholeChoice] | None:
    """Waits for all choices to finish; None if the client has left."""
    whole: list[WholeChoice | None] = [None] * len(requests)
    while collector.num_unfinished:
        outputs = await collector.take()
        if not outputs:
            return None
        for choice, text, token_ids in outputs:
            assert choice.finished is not None
            finished = choice.finished
            if is_prompt_only:
                text, token_ids, finished = "", [], _end_of_prompt(finished)
            whole[choice.index] = WholeChoice(text, token_ids, requests[choice.index], finished)
    return [choice for choice in whole if choice is not None]


def _end_of_prompt(finished: Finished) -> Finished:
    """How an answer without tokens ends whose request has ended so: not by what the one token was."""
    if finished.reason != "stop":
        return finished
    return Finished(finished.request_id, "length", None, finished.num_cached_tokens)


async def respond(send: Send, answer: Answer, collector: Collector, requests: list[RunningRequest]) -> None:
    choices = await gather(collector, requests, is_prompt_only=answer.is_prompt_only)
    if choices is None:
        return
    usage = _usage(answer, collector, requests)

    def encoded() -> bytes:
        return _encode(answer.whole(choices, usage))

    # Log-probabilities may be many, and running streams do not wait until all are written.
    await send_json(send, await asyncio.to_thread(encoded) if answer.has_logprobs else encoded())


async def send_json(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def stream_events(
    stream: EventStream, answer: Answer, collector: Collector, requests: list[RunningRequest]
) -> None:
    # Nothing is sent before there is output, so that a request that fails at once gets a status that says so.
    outputs = await collector.take()
    if not outputs:
        return
    await stream.begin()
    events = [
        _event(chunk)
        for request in requests
        if (chunk := answer.first_chunk(request.tag, request.prompt_token_ids)) is not None
    ]
    sees_every_token = answer.sees_every_token
    num_prompt_tokens, num_tokens = _num_prompt_tokens(requests, answer.options.num_choices), 0
    try:
        while True:
            for choice, text, token_ids in outputs:
                finished = choice.finished
                if answer.is_prompt_only:
                    text, token_ids, finished = "", [], finished and _end_of_prompt(finished)
                if answer.logprobs is not None:
                    answer.logprobs.add(choice.index, token_ids, requests[choice.index])
                num_tokens += len(token_ids)
                # Tokens that make no text yet, half a character or the possible start of a stop string, can wait.
                if text or finished is not None or sees_every_token:
                    chunk = answer.chunk(choice.index, text, token_ids, finished)
                    if chunk is not None:
                        if answer.options.continuous_usage:
                            chunk.usage = UsageSoFar(num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens)
                        events.append(_event(chunk))
            if not collector.num_unfinished:
                break
            if events:
                await stream.send(events)
                events = []
            outputs = await collector.take()
            if not outputs:
                return
        if answer.with_usage:
            events.append(_event(answer.usage_chunk(_usage(answer, collector, requests))))
    except EngineError as error:
        events.append(_event(error_body(error)))
    events.append(b"data: [DONE]\n\n")
    await stream.end(events)


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def _usage(answer: Answer, collector: Collector, requests: list[RunningRequest]) -> Usage:
    usage = usage_of(collector, requests, answer.options.num_choices)
    if answer.is_prompt_only:
        usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
    return usage


def usage_of(collector: Collector, requests: list[RunningRequest], num_choices: int = 1) -> Usage:
    """Counts of all choices; a prompt that several of them answer counts once."""
    prompt_tokens = _num_prompt_tokens(requests, num_choices)
    completion_tokens = sum(len(request.token_ids) for request in requests)
    firsts = collector.choices[::num_choices]
    cached = sum(choice.finished.num_cached_tokens for choice in firsts if choice.finished is not None)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached),
    )


def _num_prompt_tokens(requests: list[RunningRequest], num_choices: int) -> int:
    return sum(len(request.prompt_token_ids) for request in requests[::num_choices])
