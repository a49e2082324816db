"""From what running requests produce to what a client receives: a body when all is there, or a stream of events.

Knows how answers are asked for what they look like, not what that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from frontend.answers import Answer, WholeChoice, best_choices
from frontend.collector import Collector, Output
from frontend.http_errors import error_body
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
    """A response of server-sent events.

    The server's `send` only waits where the connection takes no more: a client that reads more slowly than it is
    written to. Everywhere else it is done when it returns, so that no task has to be woken for an event.
    """

    def __init__(self, send_start: Send, send_body: Send, answer_ready: Callable[[], None]) -> None:
        """`send_body` may be the server's own, past all that only looks at how a response starts.

        `answer_ready` is called when the last events are there, before they wait to be sent.
        """
        self._send_start = send_start
        self._send_body = send_body
        self._answer_ready = answer_ready
        self._unsent: _Rest | None = None

    async def begin(self) -> None:
        await self._send_start({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})

    def send_now(self, events: list[bytes]) -> bool:
        """Sends from outside of the response's task. Returns False if the connection takes no more for now: then these
        are on their way, and before anything else a `send` has to wait for them."""
        assert self._unsent is None
        body = events[0] if len(events) == 1 else b"".join(events)
        sending = self._send_body({"type": "http.response.body", "body": body, "more_body": True}).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            return True
        self._unsent = _Rest(sending, waits_for)
        return False

    async def send(self, events: list[bytes]) -> None:
        await self._finish_sending()
        if events:
            await self._send_body({"type": "http.response.body", "body": b"".join(events), "more_body": True})

    async def end(self, events: list[bytes]) -> None:
        self._answer_ready()
        await self._finish_sending()
        await self._send_body({"type": "http.response.body", "body": b"".join(events)})

    async def _finish_sending(self) -> None:
        if self._unsent is not None:
            await self._unsent
            self._unsent = None


class _Rest:
    """What is left of a coroutine that has been run, outside of any task, up to where it waits for something.

    What `asyncio.Task(eager_start=True)` is for, of later versions of Python, without a task where none is needed.
    """

    def __init__(self, sending: Generator[Any, None, None], waits_for: Any) -> None:
        self._sending = sending
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield self._waits_for
        except BaseException as error:
            self._sending.throw(error)
            raise
        yield from self._sending


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
    best = best_choices(choices, answer.options.num_generated, answer.options.num_choices)

    def encoded() -> bytes:
        return _encode(answer.whole(best, usage))

    # Log-probabilities may be many, and running streams do not wait until all are written.
    await send_json(send, await asyncio.to_thread(encoded) if answer.has_logprobs else encoded())


async def send_json(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class EventWriter(Protocol):
    """Makes the events of one stream."""

    def begin(self) -> list[bytes]:
        """What comes before the first output."""
        ...

    def feed(self, outputs: list[Output]) -> list[bytes]: ...

    def end(self) -> list[bytes]:
        """What comes after the last output."""
        ...

    def fail(self, error: EngineError) -> list[bytes]:
        """The end of a stream that cannot go on."""
        ...


async def stream_outputs(stream: EventStream, collector: Collector, writer: EventWriter) -> list[bytes] | None:
    """Sends outputs as they come, and returns the last events, with which to end the stream; None if the client has
    left.

    Raises:
        EngineError: a request failed before it had any output. Nothing is sent then.
    """
    # Nothing is sent before there is output, so that a request that fails at once gets a status that says so.
    outputs = await collector.take()
    if not outputs:
        return None

    def pass_on(outputs: list[Output]) -> bool:
        events = writer.feed(outputs)
        return not events or stream.send_now(events)

    await stream.begin()
    events = writer.begin()
    try:
        while True:
            events += writer.feed(outputs)
            if not collector.num_unfinished:
                return events + writer.end()
            await stream.send(events)
            events = []
            outputs = await collector.take(pass_on)
            if collector.client_left:
                return None
    except EngineError as error:
        return events + writer.fail(error)


async def stream_events(
    stream: EventStream, answer: Answer, collector: Collector, requests: list[RunningRequest]
) -> None:
    events = await stream_outputs(stream, collector, _CompletionEvents(answer, collector, requests))
    if events is not None:
        await stream.end(events)


# Stands for new text in a chunk that is encoded beforehand: neither an id nor a model's name is this.
_TEXT_MARK = "\0"
_ENCODED_TEXT_MARK = _encode(_TEXT_MARK)


class _CompletionEvents:
    """The stream of a chat or of plain completions."""

    def __init__(self, answer: Answer, collector: Collector, requests: list[RunningRequest]) -> None:
        self._answer = answer
        self._collector = collector
        self._requests = requests
        self._num_prompt_tokens = _num_prompt_tokens(requests, answer.options.num_generated)
        self._num_tokens = 0
        # By choice, what comes before and after the text in the event of new text alone.
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def begin(self) -> list[bytes]:
        chunks = (self._answer.first_chunk(request.tag, request.prompt_token_ids) for request in self._requests)
        return [_event(chunk) for chunk in chunks if chunk is not None]

    def feed(self, outputs: list[Output]) -> list[bytes]:
        answer = self._answer
        events = []
        for choice, text, token_ids in outputs:
            index, finished = choice.index, choice.finished
            if finished is None and index in self._around_text:
                if text:
                    before, after = self._around_text[index]
                    events.append(before + _encode(text) + after)
                continue
            if answer.is_prompt_only:
                text, token_ids, finished = "", [], finished and _end_of_prompt(finished)
            if answer.logprobs is not None:
                answer.logprobs.add(index, token_ids, self._requests[index])
            self._num_tokens += len(token_ids)
            # Tokens that make no text yet, half a character or the possible start of a stop string, can wait.
            if text or finished is not None or answer.sees_every_token:
                chunk = answer.chunk(index, text, token_ids, finished)
                if chunk is not None:
                    if answer.options.continuous_usage:
                        chunk.usage = self._usage_so_far()
                    events.append(_event(chunk))
            if answer.is_plain(index) and finished is None:
                self._around_text[index] = self._split_event(index)
        return events

    def end(self) -> list[bytes]:
        events = [b"data: [DONE]\n\n"]
        if self._answer.with_usage:
            usage = _usage(self._answer, self._collector, self._requests)
            events.insert(0, _event(self._answer.usage_chunk(usage)))
        return events

    def fail(self, error: EngineError) -> list[bytes]:
        return [_event(error_body(error)), b"data: [DONE]\n\n"]

    def _split_event(self, index: int) -> tuple[bytes, bytes]:
        """The event of a chunk with new text and nothing else, before and after the text."""
        chunk = self._answer.chunk(index, _TEXT_MARK, [], None)
        assert chunk is not None
        before, _, after = _event(chunk).partition(_ENCODED_TEXT_MARK)
        return before, after

    def _usage_so_far(self) -> UsageSoFar:
        total = self._num_prompt_tokens + self._num_tokens
        return UsageSoFar(self._num_prompt_tokens, self._num_tokens, total)


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def _usage(answer: Answer, collector: Collector, requests: list[RunningRequest]) -> Usage:
    usage = usage_of(collector, requests, answer.options.num_generated)
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
