"""Bodies of the OpenAI API, requests and responses, with vLLM's additions.

A request's field is either served, or accepted with the value that changes nothing, or refused by name and value:
nothing is ignored silently. Knows the form of bodies, not what is done with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from frontend.generation_config import SamplingDefaults
from frontend.tool_choice import NamedToolChoice
from protocol.errors import InvalidRequestError, shown
from protocol.limits import MAX_JSON_DEPTH, MAX_JSON_NODES, require_shallow
from protocol.sampling import MAX_CHOICES, SamplingParams

# --- requests -------------------------------------------------------------------------------------------------------

Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    def __post_init__(self) -> None:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage to be true")


class RequestFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What all kinds of requests have. None means that the field was not given."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: str | list[str] | None = None
    allowed_token_ids: list[int] | None = None
    n: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    timeout: float | None = None

    def logprobs_wanted(self) -> tuple[int | None, int | None]:
        """How many alternatives are wanted for each token of the answer and of the prompt; None asks for nothing."""
        return None, self.prompt_logprobs


class ChatFields(RequestFields, kw_only=True, forbid_unknown_fields=True):
    messages: list[dict[str, Any]]
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def logprobs_wanted(self) -> tuple[int | None, int | None]:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs needs logprobs to be true, got {self.top_logprobs} without it", "top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None, self.prompt_logprobs


class CompletionFields(RequestFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    echo: bool | None = None
    best_of: int | None = None

    def logprobs_wanted(self) -> tuple[int | None, int | None]:
        if not self.echo or self.logprobs is None:
            return self.logprobs, self.prompt_logprobs
        # The prompt is written as part of the answer then, and the most that is wanted in either place is measured.
        widths = (self.logprobs, self.logprobs if self.prompt_logprobs is None else self.prompt_logprobs)
        return self.logprobs, -1 if -1 in widths else max(widths)

    def best_of_more(self) -> int | None:
        """How many answers to a prompt are generated where not all of them are returned; else None.

        Raises:
            InvalidRequestError: it is fewer than are returned or too many, or the answers cannot be chosen among.
        """
        num_returned = self.n or 1
        if self.best_of is None or self.best_of == num_returned:
            return None
        if not num_returned <= self.best_of <= MAX_CHOICES:
            expected = f"from n, which is {num_returned}, to {MAX_CHOICES}"
            raise InvalidRequestError.out_of_range("best_of", self.best_of, expected)
        where = "in a stream" if self.stream else "where max_tokens is 0" if self.max_tokens == 0 else None
        if where is not None:
            raise InvalidRequestError.out_of_range("best_of", self.best_of, f"{num_returned}, as n is, {where}")
        return self.best_of

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts, all texts or all token ids.

        Raises:
            InvalidRequestError: there is none, or they are of several kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        if len(kinds) != 1:
            problem = "mixes strings, token ids and lists" if kinds else "is an empty list"
            raise InvalidRequestError(
                f"prompt {problem}: it must be a string, a list of strings, a list of token ids or several such lists",
                "prompt",
            )
        return [self.prompt] if int in kinds else self.prompt  # type: ignore[return-value]


# Fields that say something about the request without changing its answer: any value will do.
_NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id")

# Fields that are not served, with the values, besides null, that ask for nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}
_ONLY_CHAT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_ONLY_COMPLETION: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "suffix": ("",),
}


class RequestType:
    """One kind of request body: the fields that are served, and those that are only tolerated.

    Attributes:
        type: with all of these fields.
        only: the fields that are not served, with the values that ask for nothing.
    """

    def __init__(self, fields: type[Struct], no_effect: tuple[str, ...], only: dict[str, tuple[Any, ...]]) -> None:
        self.only = only
        tolerated = [(name, Any, None) for name in (*no_effect, *only)]
        self.type: type[Struct] = msgspec.defstruct(
            fields.__name__, tolerated, bases=(fields,), kw_only=True, forbid_unknown_fields=True
        )
        self._decoder = msgspec.json.Decoder(self.type)

    def decode(self, body: bytes) -> Any:
        """The request.

        Raises:
            InvalidRequestError: not JSON, a field is unknown or has a wrong or unsupported value.
        """
        num_nodes = body.count(b"{") + body.count(b"[")
        if num_nodes > MAX_JSON_NODES:
            raise InvalidRequestError(
                f"the body has {num_nodes} opening brackets, of which {MAX_JSON_NODES} are allowed"
            )
        try:
            request = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _validation_error(str(error), body) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
        if num_nodes > MAX_JSON_DEPTH:
            for name in request.__struct_fields__:
                require_shallow(getattr(request, name), name)
        for name, allowed in self.only.items():
            value = getattr(request, name)
            if value is not None and not _is_one_of(value, allowed):
                accepted = " or ".join(msgspec.json.encode(choice).decode() for choice in (*allowed, None))
                raise InvalidRequestError(
                    f"{name} is not supported: it can only be {accepted}, got {shown(value)}", name
                )
        return request


# Characters of a wrong value that its error shows.
_LONGEST_VALUE = 100


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    # In Python 0 equals False, in JSON it does not.
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed)


def _validation_error(message: str, body: bytes) -> InvalidRequestError:
    """msgspec's message with the field it is about, which it gives as a path such as `$.stop[2]`, and its value."""
    reason, _, path = message.partition(" - at `")
    unknown = re.search(r"unknown field `(.*)`", reason)
    missing = re.search(r"missing required field `(.*)`", reason)
    inner = path.rstrip("`").removeprefix("$").removeprefix(".")
    if unknown:
        name = f"{inner}.{unknown[1]}" if inner else unknown[1]
        return InvalidRequestError(f"{name} is not a field of this request", name)
    if missing:
        name = f"{inner}.{missing[1]}" if inner else missing[1]
        return InvalidRequestError(f"{name} is missing", name)
    if not inner:
        return InvalidRequestError(f"the body is wrong: {reason}")
    name = re.split(r"[.\[]", inner)[0]
    try:
        value = msgspec.json.encode(msgspec.json.decode(body).get(name)).decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Of a body that goes wrong twice, the field was only the first.
        return InvalidRequestError(f"the body is not valid JSON: {error}")
    got = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
    return InvalidRequestError(f"{inner}: {reason[:1].lower()}{reason[1:]} (got {got})", name)


CHAT_REQUEST = RequestType(ChatFields, _NO_EFFECT, _ONLY | _ONLY_CHAT)
COMPLETION_REQUEST = RequestType(CompletionFields, _NO_EFFECT, _ONLY | _ONLY_COMPLETION)


# Fields that become a sampling parameter of the same name as they are. What the answer must be is read elsewhere.
_SAMPLING_FIELDS = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in RequestFields.__struct_fields__ and name not in ("max_tokens", "structured_outputs")
)


def sampling_params(request: RequestFields, defaults: SamplingDefaults, max_tokens: int | None) -> SamplingParams:
    """Raises InvalidRequestError if a value is out of its range."""
    given = msgspec.structs.asdict(defaults)
    given.update((name, value) for name in _SAMPLING_FIELDS if (value := getattr(request, name)) is not None)
    given["logprobs"], given["prompt_logprobs"] = request.logprobs_wanted()
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    return SamplingParams(**given)


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors about a sampling parameter name the field of the request that it came from, where that is another."""
    try:
        yield
    except InvalidRequestError as error:
        name = names.get(error.param or "")
        if name is None or error.param is None:
            raise
        raise InvalidRequestError(error.message.replace(error.param, name, 1), name) from error
