"""How the next token is chosen and when a request ends, as a user states it.

Names, defaults and meanings are vLLM's. Every value is checked where the object is made, so that a
`SamplingParams` that exists is one that can be served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from protocol.errors import InvalidRequestError

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
_INT32_MAX = 2**31 - 1


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, array_like=True):
    """Sampling and stopping options of one request.

    Attributes:
        temperature: softmax temperature, 0 to 100; 0 (and anything below 1e-5) takes the most likely token.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep the tokens that are at least this likely relative to the most likely one, 0 to 1; 0 keeps all.
            Comes before top_k, and top_k before top_p: each filters what the one before has left.
        seed: makes the draw reproducible, a signed 64-bit integer; None draws a seed on arrival.
        max_tokens: most tokens to generate, at least 1; None means up to the context length.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: token ids that end the answer, besides the model's end-of-sequence tokens.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        detokenize: whether text is wanted back; False returns token ids only.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: a value is out of its range; the error names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        # A user may pass a list, or one string: accept what vLLM accepts, store one form.
        msgspec.structs.force_setattr(self, "stop", _as_tuple(self.stop, "stop", str))
        msgspec.structs.force_setattr(self, "stop_token_ids", _as_tuple(self.stop_token_ids, "stop_token_ids", int))
        for name in ("temperature", "top_p", "min_p"):
            _require_number(name, getattr(self, name))
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError.out_of_range(name, getattr(self, name), "true or false")
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidRequestError.out_of_range("temperature", self.temperature, "between 0 and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError.out_of_range("top_p", self.top_p, "above 0 and at most 1")
        _require_int("top_k", self.top_k, -1, _INT32_MAX, "-1 or 0 (all tokens) or a positive integer")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequestError.out_of_range("min_p", self.min_p, "between 0 and 1")
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**63 - 1, "a signed 64-bit integer")
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, _INT32_MAX, "at least 1")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError.out_of_range("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequestError.out_of_range(
                    "stop", text, f"made of strings of 1 to {MAX_STOP_STRING_CHARS} characters"
                )
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop needs text: it cannot be used with detokenize=False", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError.out_of_range(
                "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} ids"
            )
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, _INT32_MAX, "made of token ids")

    @property
    def is_greedy(self) -> bool:
        # Below this, dividing by the temperature overflows, and the most likely token is all that is ever drawn.
        return self.temperature < 1e-5 or self.top_k == 1


def _as_tuple(value: object, name: str, kind: type) -> tuple:
    if value is None:
        return ()
    if isinstance(value, kind):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequestError.out_of_range(name, value, f"{kind.__name__} or a list of {kind.__name__}")
    items = tuple(value)
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise InvalidRequestError.out_of_range(name, item, f"made of {kind.__name__} values")
    return items


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError.out_of_range(name, value, "a finite number")


def _require_int(name: str, value: object, low: int, high: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError.out_of_range(name, value, expected)
