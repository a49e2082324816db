"""Bodies of the OpenAI Responses API: the fields of a request, and a response with its items.

As for completions, a request's field is served, accepted with the value that changes nothing, or refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from frontend.openai_types import RequestFields, RequestType
from frontend.tool_choice import NamedFunction, NamedToolChoice
from protocol.errors import InvalidRequestError
from protocol.limits import MAX_METADATA_KEY_CHARS, MAX_METADATA_PAIRS, MAX_METADATA_VALUE_CHARS, require_few

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class FlatToolChoice(Struct, forbid_unknown_fields=True):
    """`{"type": "function", "name": …}`"""

    type: Literal["function"]
    name: str


class ResponsesFields(RequestFields, kw_only=True, forbid_unknown_fields=True):
    """What a request has beside the fields of all kinds. None means that the field was not given."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    text: dict[str, Any] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_NO_EFFECT = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields that are not served, some of them because they are other APIs', with the values that ask for nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "include": ([],),
    "logprobs": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "n": (1,),
    "prompt": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "stream_options": ({"include_obfuscation": False},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
RESPONSES_REQUEST = RequestType(ResponsesFields, _NO_EFFECT, _ONLY)


def check_fields(fields: ResponsesFields) -> None:
    """Raises InvalidRequestError for what is inside `text` and `reasoning` and is not served, or too much metadata."""
    require_few(len(fields.metadata or ()), MAX_METADATA_PAIRS, "metadata", "pairs")
    for name, text in (fields.metadata or {}).items():
        require_few(len(name), MAX_METADATA_KEY_CHARS, "metadata", "characters in a key")
        require_few(len(text), MAX_METADATA_VALUE_CHARS, "metadata", "characters in a value")
    for name, value in (fields.reasoning or {}).items():
        if value is not None:
            raise InvalidRequestError(
                f"reasoning.{name} is not supported: it can only be null, got {value!r}", f"reasoning.{name}"
            )
    for name, value in (fields.text or {}).items():
        if name == "format" and not isinstance(value, dict | None):
            raise InvalidRequestError.out_of_range("text.format", value, "an object")
        if value is not None and name != "format":
            raise InvalidRequestError(
                f"text.{name} is not supported: it can only be null, got {value!r}", f"text.{name}"
            )


def text_format(fields: ResponsesFields) -> dict[str, Any]:
    return (fields.text or {}).get("format") or {"type": "text"}


def nested_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as completions are given it."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def nested_tool_choice(
    choice: Literal["none", "auto", "required"] | FlatToolChoice | None,
) -> Literal["none", "auto", "required"] | NamedToolChoice | None:
    return NamedToolChoice("function", NamedFunction(choice.name)) if isinstance(choice, FlatToolChoice) else choice


# --- responses ------------------------------------------------------------------------------------------------------


class ReasoningText(Struct):
    text: str
    type: str = "reasoning_text"


class ReasoningItem(Struct, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText]
    status: ItemStatus = "in_progress"
    summary: list[Any] = []


class OutputText(Struct):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    type: str = "output_text"


class MessageItem(Struct, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: ItemStatus = "in_progress"
    role: str = "assistant"


class FunctionCallItem(Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


OutputItem = ReasoningItem | MessageItem | FunctionCallItem


class InputTokensDetails(Struct):
    cached_tokens: int
    # What writing to the cache costs: nothing here.
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    code: str
    message: str


class IncompleteDetails(Struct):
    reason: str


class ReasoningOptions(Struct, frozen=True):
    effort: None = None
    summary: None = None


class ResponseBody(Struct, kw_only=True):
    """A response, also one that is not finished. Most fields say again what the request said."""

    id: str
    created_at: int
    model: str
    status: ResponseStatus = "in_progress"
    output: list[OutputItem] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    top_p: float
    tool_choice: str | FlatToolChoice
    tools: list[dict[str, Any]]
    background: bool = False
    reasoning: ReasoningOptions = ReasoningOptions()
    text: dict[str, Any]
    truncation: str = "disabled"
    object: str = "response"
