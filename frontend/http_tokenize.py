"""POST /tokenize and /detokenize, as vLLM has them: what the engine makes of a prompt, and what ids stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frontend.http_completions import read_body
from frontend.http_errors import require_model
from frontend.openai_types import RequestType
from frontend.service import Service
from protocol.errors import InvalidRequestError
from protocol.messages import ChatPrompt, TextPrompt


class TokenizeFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """Either a text or a conversation. None means that the field was not given."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    prompt: str


_OF_CHATS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
TOKENIZE_REQUEST = RequestType(TokenizeFields, (), {"chat_template": (), "mm_processor_kwargs": ()})
DETOKENIZE_REQUEST = RequestType(DetokenizeFields, (), {})


class _Endpoint(ABC):
    """An ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.require_ready()
        with self._service.admission.reserve() as place:
            body = await read_body(scope, receive, self._service.max_body_bytes, place)
            if body is None:
                return
            self._service.require_ready()
            place.add(num_requests=1)
            answer = msgspec.json.encode(await self._answer(body))
        await Response(answer, media_type="application/json")(scope, receive, send)

    @abstractmethod
    async def _answer(self, body: bytes) -> Struct: ...


class TokenizeEndpoint(_Endpoint):
    async def _answer(self, body: bytes) -> Tokenized:
        fields: TokenizeFields = TOKENIZE_REQUEST.decode(body)
        require_model(fields.model, self._service.engine.model)
        prompts = self._service.prompts
        token_ids = await prompts.tokenize(_prompt_of(fields), fields.add_special_tokens)
        strings = prompts.token_strings(token_ids) if fields.return_token_strs else None
        return Tokenized(len(token_ids), self._service.engine.max_model_len, token_ids, strings)


class DetokenizeEndpoint(_Endpoint):
    async def _answer(self, body: bytes) -> Detokenized:
        fields: DetokenizeFields = DETOKENIZE_REQUEST.decode(body)
        require_model(fields.model, self._service.engine.model)
        return Detokenized(await self._service.prompts.detokenize(fields.tokens, "tokens"))


def _prompt_of(fields: TokenizeFields) -> TextPrompt | ChatPrompt:
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("either prompt or messages must be given, and not both", "prompt")
    if fields.messages is None:
        for name in _OF_CHATS:
            if getattr(fields, name) is not None:
                raise InvalidRequestError(f"{name} goes with messages, not with a prompt", name)
        assert fields.prompt is not None
        return TextPrompt(fields.prompt)
    options = dict(fields.chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message"):
        if getattr(fields, name) is not None:
            options[name] = getattr(fields, name)
    return ChatPrompt(fields.messages, fields.tools, options)
