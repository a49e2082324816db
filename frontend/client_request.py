"""A request as its client keeps it: what was asked, what has come back, and who waits for it.

Also turns what users pass as prompts and sampling parameters into what the protocol carries. Knows no sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
from protocol.errors import EngineError, EngineUnavailableError, InvalidRequestError, RequestFailedError
from protocol.messages import ChatPrompt, Failed, Finished, Prompt, TextPrompt, TokenPrompt, pack_ints
from protocol.sampling import SamplingParams

PromptInput: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"


class ClientRequest:
    """One request in flight. Used from the client's event loop only."""

    __slots__ = (
        "error",
        "finished",
        "metrics",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "taken",
        "text_parts",
        "token_ids",
        "waiter",
    )

    def __init__(self, request_id: int, prompt: Prompt, prompt_token_ids: list[int], arrival_time: float) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.token_ids: list[int] = []
        self.text_parts: list[str] = []
        self.finished: Finished | None = None
        self.error: EngineError | None = None
        self.metrics = RequestMetrics(arrival_time)
        self.taken = 0  # tokens that a stream has handed out
        self.waiter: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.finished is not None or self.error is not None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Until `wake`."""
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    def fail(self, failed: Failed) -> None:
        if failed.kind == "invalid_request":
            self.error = InvalidRequestError(failed.message, failed.param)
        elif failed.kind == "unavailable":
            self.error = EngineUnavailableError(failed.message)
        else:
            self.error = RequestFailedError(failed.message)

    def take_chunk(self) -> StreamChunk:
        """What is new since the last chunk."""
        chunk = StreamChunk("".join(self.text_parts), self.token_ids[self.taken :])
        self.taken = len(self.token_ids)
        self.text_parts = []
        if self.finished is not None:
            chunk.finish_reason = self.finished.reason
            chunk.stop_reason = self.finished.stop_reason
        return chunk

    def output(self) -> RequestOutput:
        """The result. Raises what went wrong, if something did."""
        if self.error is not None:
            raise self.error
        assert self.finished is not None
        answer = CompletionOutput(
            0, "".join(self.text_parts), self.token_ids, self.finished.reason, self.finished.stop_reason
        )
        return RequestOutput(
            request_id=str(self.request_id),
            prompt=self.prompt.text if isinstance(self.prompt, TextPrompt) else None,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[answer],
            finished=True,
            metrics=self.metrics,
            num_cached_tokens=self.finished.num_cached_tokens,
        )


def as_prompts(prompts: PromptInput | Sequence[PromptInput]) -> list[Prompt]:
    """The prompts of a call: one text, one list of ids, or a list of either, as vLLM takes them.

    Raises:
        InvalidRequestError: something else.
    """
    if isinstance(prompts, str | Mapping) or (_is_ids(prompts) and len(prompts)):
        return [as_prompt(prompts)]  # type: ignore[arg-type]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError.out_of_range("prompts", prompts, "text, token ids, or a list of them")
    return [as_prompt(prompt) for prompt in prompts]  # type: ignore[arg-type]


def as_prompt(prompt: PromptInput) -> Prompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return as_prompt(prompt["prompt_token_ids"])
        if isinstance(prompt.get("prompt"), str):
            return TextPrompt(prompt["prompt"])
    elif _is_ids(prompt):
        try:
            return TokenPrompt(pack_ints(prompt))
        except OverflowError:
            worst = max(prompt, key=abs)
            raise InvalidRequestError(f"prompt holds {worst}, which is no token id", "prompt") from None
    raise InvalidRequestError.out_of_range("prompt", prompt, "text or a list of token ids")


def _is_ids(value: object) -> bool:
    """Whether a value is a flat sequence of integers (or of nothing)."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(item) is int for item in value)


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
    return ChatPrompt(
        [dict(message) for message in conversation],
        None if tools is None else [dict(tool) for tool in tools],
        dict(template_options or {}),
    )


def params_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One set of parameters for each of `count` prompts.

    Raises:
        InvalidRequestError: a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} sampling_params for {count} prompts", "sampling_params")
    return list(params)
