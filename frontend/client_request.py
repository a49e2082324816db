"""A request as its client keeps it: what was asked, what has come back, and who waits for it.

Also turns what users pass as prompts and sampling parameters into what the protocol carries. Knows no sockets.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from frontend.failures import error_of
from frontend.outputs import (
    CompletionOutput,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    position_logprobs,
)
from protocol.errors import EngineError, InvalidRequestError
from protocol.logprobs import TokenLogprob, TokenLogprobs, unpack_logprobs
from protocol.messages import ChatPrompt, Failed, Finished, Prompt, TextPrompt, TokenPrompt, pack_ints
from protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from frontend.client_batch import Batch

PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"


class ClientRequest:
    """One request in flight, which is one answer. Used from the client's event loop only."""

    __slots__ = (
        "batch",
        "error",
        "finished",
        "index",
        "logprobs",
        "metrics",
        "params",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "taken",
        "text_parts",
        "token_ids",
        "waiter",
        "waits_for_end",
    )

    def __init__(
        self,
        request_id: int,
        prompt: Prompt,
        params: SamplingParams,
        prompt_token_ids: list[int],
        arrival_time: float,
        index: int = 0,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.index = index  # which answer to the prompt
        self.prompt_token_ids = prompt_token_ids
        self.token_ids: list[int] = []
        self.text_parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finished: Finished | None = None
        self.error: EngineError | None = None
        self.metrics = RequestMetrics(arrival_time)
        self.batch: Batch | None = None  # is told of its end in place of a waiter
        self.taken = 0  # tokens that a stream has handed out
        self.waiter: asyncio.Future[None] | None = None
        self.waits_for_end = False  # whoever waits need not be woken for tokens

    @property
    def is_over(self) -> bool:
        return self.finished is not None or self.error is not None

    def wake(self) -> None:
        if self.batch is not None:
            if self.is_over:
                self.batch.put(self)
        elif self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Until `wake`."""
        await wait_for_any([self])

    def fail(self, failed: Failed) -> None:
        """Ends this request with the error, and wakes who waits for it."""
        self.error = error_of(failed)
        self.wake()

    def take_chunk(self) -> StreamChunk:
        """What is new since the last chunk."""
        chunk = StreamChunk("".join(self.text_parts), self.token_ids[self.taken :], index=self.index)
        chunk.logprobs = self._logprobs_from(self.taken)
        if not self.taken:
            chunk.prompt_logprobs = self._measured_prompt()
        self.taken = len(self.token_ids)
        self.text_parts = []
        if self.finished is not None:
            chunk.finish_reason = self.finished.reason
            chunk.stop_reason = self.finished.stop_reason
        return chunk

    def _logprobs_from(self, start: int) -> list[PositionLogprobs] | None:
        if self.params.logprobs is None:
            return None
        return list(map(position_logprobs, self.token_ids[start:], self.logprobs[start:]))

    def _measured_prompt(self) -> list[PositionLogprobs | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        measured: list[PositionLogprobs | None] = [None] * len(self.prompt_token_ids)
        for stretch in self.prompt_logprobs:
            for position, entry in unpack_logprobs(stretch):
                measured[position] = position_logprobs(self.prompt_token_ids[position], entry)
        return measured

    def answer(self) -> CompletionOutput:
        """The answer. Raises what went wrong, if something did."""
        if self.error is not None:
            raise self.error
        assert self.finished is not None
        return CompletionOutput(
            self.index,
            "".join(self.text_parts),
            self.token_ids,
            self.finished.reason,
            self.finished.stop_reason,
            self._logprobs_from(0),
            None if self.params.logprobs is None else sum((measured.logprob for measured in self.logprobs), 0.0),
        )

    def output(self, others: Sequence[ClientRequest] = ()) -> RequestOutput:
        """The result, with other answers to the prompt. Raises what went wrong, if something did."""
        answers = [request.answer() for request in (self, *others)]
        assert self.finished is not None
        return RequestOutput(
            request_id=str(self.request_id),
            prompt=self.prompt.text if isinstance(self.prompt, TextPrompt) else None,
            prompt_token_ids=self.prompt_token_ids,
            outputs=answers,
            finished=True,
            metrics=self.metrics,
            num_cached_tokens=self.finished.num_cached_tokens,
            prompt_logprobs=self._measured_prompt(),
        )


async def wait_for_any(requests: Sequence[ClientRequest]) -> None:
    """Until one of them is woken."""
    waiter = asyncio.get_running_loop().create_future()
    for request in requests:
        request.waiter = waiter
    try:
        await waiter
    finally:
        for request in requests:
            request.waiter = None


def as_prompts(prompts: PromptInput | Sequence[PromptInput]) -> list[Prompt]:
    """The prompts of a call: one text, one list of ids, or a list of either, as vLLM takes them.

    Raises:
        InvalidRequestError: something else.
    """
    if isinstance(prompts, str | bytes | bytearray | Mapping) or _as_ids(prompts):
        return [as_prompt(prompts)]  # type: ignore[arg-type]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError.out_of_range("prompts", prompts, "text, token ids, or a list of them")
    return [as_prompt(prompt) for prompt in prompts]  # type: ignore[arg-type]


def as_prompt(prompt: PromptInput) -> Prompt:
    """One prompt: a text, a list of ids, or a mapping with one of them as `prompt` or `prompt_token_ids`.

    Raises:
        InvalidRequestError: something else.
    """
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if isinstance(prompt, Mapping):
        for name, value in prompt.items():
            if name not in ("prompt", "prompt_token_ids") and value is not None:
                raise InvalidRequestError(
                    f"prompt can have only prompt or prompt_token_ids, got {name}: {value!r}", "prompt"
                )
        if prompt.get("prompt_token_ids") is not None:
            return _as_token_prompt(prompt["prompt_token_ids"])
        if isinstance(prompt.get("prompt"), str):
            return TextPrompt(prompt["prompt"])
    return _as_token_prompt(prompt)


def _as_token_prompt(value: object) -> TokenPrompt:
    ids = _as_ids(value)
    if ids is None:
        raise InvalidRequestError.out_of_range("prompt", value, "text or a list of token ids")
    try:
        return TokenPrompt(pack_ints(ids))
    except OverflowError:
        worst = max(ids, key=abs)
        raise InvalidRequestError(f"prompt holds {worst}, which is no token id", "prompt") from None


def _as_ids(value: object) -> Sequence[int] | None:
    """A flat sequence or array of integers (or of nothing) in plain types, or None if the value is something else."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value if isinstance(value, Sequence) and all(type(item) is int for item in value) else None


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or several, told apart by whether the first element is a message.

    Raises:
        InvalidRequestError: neither.
    """
    if isinstance(messages, Sequence) and messages:
        if isinstance(messages[0], Mapping):
            return [messages]  # type: ignore[list-item]
        if all(isinstance(conversation, Sequence) and not isinstance(conversation, str) for conversation in messages):
            return list(messages)  # type: ignore[arg-type]
    raise InvalidRequestError.out_of_range("messages", messages, "a list of messages, or a list of such lists")


def as_chat_prompt(
    conversation: Conversation, tools: Sequence[Mapping[str, Any]] | None, template_options: Mapping[str, Any] | None
) -> ChatPrompt:
    """A conversation to be rendered by the engine, which looks at what is in the messages.

    Raises:
        InvalidRequestError: a message or a tool is not an object.
    """
    return ChatPrompt(
        _as_objects("messages", conversation),
        None if tools is None else _as_objects("tools", tools),
        _as_object("chat_template_kwargs", template_options or {}),
    )


def _as_objects(param: str, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InvalidRequestError.out_of_range(param, values, "a list of objects")
    return [_as_object(param, value) for value in values]


def _as_object(param: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidRequestError.out_of_range(param, value, "made of objects, whose names are strings")
    return dict(value)


def params_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One set of parameters for each of `count` prompts.

    Raises:
        InvalidRequestError: something else, or a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequestError.out_of_range("sampling_params", params, "SamplingParams or a list of them")
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} sampling_params for {count} prompts", "sampling_params")
    return list(params)


def check_options(priority: object = 0, cache_salt: object = None, timeout: object = None) -> None:
    """The types of what goes with a request. A message with wrong ones would not be understood by the engine.

    Raises:
        InvalidRequestError: one of them is of another type.
    """
    if type(priority) is not int or not -(2**31) <= priority < 2**31:
        raise InvalidRequestError.out_of_range("priority", priority, "a signed 32-bit integer")
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise InvalidRequestError.out_of_range("cache_salt", cache_salt, "a string")
    if timeout is not None and (not _is_number(timeout) or not 0 < timeout < math.inf):
        raise InvalidRequestError.out_of_range("timeout", timeout, "a positive number of seconds")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
