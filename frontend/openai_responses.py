"""Bodies that the OpenAI API answers with, whole and as stream chunks, with vLLM's additions.

Fields that are UNSET are left out of the JSON.
"""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

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


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
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


class Message(Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: Message
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextCompletion(Struct):
    """Also a chunk of its own stream, in which `usage` is UNSET, null, or at the very end the numbers."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
