"""Bodies that the OpenAI API answers with, whole and as stream chunks, with vLLM's additions.

Fields that are UNSET are left out of the JSON.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from frontend.openai_logprobs import ChatLogprobs, PromptLogprobs, TextLogprobs
from protocol.messages import FinishReason


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(Struct):
    error: ErrorBody


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class UsageSoFar(Struct):
    """Of a stream that goes on."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Usage(UsageSoFar):
    prompt_tokens_details: PromptTokensDetails


class ModelCard(Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "mini-vllm"


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class FunctionCall(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCall(Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class ToolCallDelta(Struct):
    """All but `index` and new text of the arguments is in the first delta of a call only."""

    index: int
    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


ChatFinishReason = FinishReason | Literal["tool_calls"]


class Message(Struct):
    """`reasoning_content` and `reasoning` are the same: older and newer clients read one or the other."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(Struct):
    """Also a chunk of its own stream, in which `usage` is UNSET, null, or at the very end the numbers, which may also
    be asked for in each chunk."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: UsageSoFar | UnsetType | None = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    finish_reason: ChatFinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: UsageSoFar | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
