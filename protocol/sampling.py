"""How the next token is chosen and when a request ends, as a user states it.

Names, defaults and meanings are vLLM's. Every value is checked where the object is made, so that a
`SamplingParams` that exists is one that can be served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
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
        presence_penalty: taken from the logit of each token that was generated before, -2 to 2.
        frequency_penalty: the same, times how often it was generated, -2 to 2.
        repetition_penalty: the logit of each token of the prompt and of those generated is divided by this if it is
            positive, else multiplied; above 0, 1 changes nothing.
        logit_bias: token id to what is added to its logit, -100 to 100. Stored as pairs.
        bad_words: strings that are not generated, with or without a space before them, as the tokens that the
            tokenizer makes of them; other tokens may still spell one.
        allowed_token_ids: the only tokens that may be generated; None allows all.
        n: answers to give, 1 to 128. Seeds of the others are made from that of the first, see `choice`.
        max_tokens: most tokens to generate, at least 1; None means up to the context length.
        min_tokens: no end-of-sequence token, stop token or stop string ends the answer within so many tokens: the
            tokens are not generated there, the strings not looked for.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: token ids that end the answer, besides the model's end-of-sequence tokens.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        detokenize: whether text is wanted back; False returns token ids only.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: leave what ended the answer, stop string or stop token, in the text.
        logprobs: give each generated token's log-probability and those of so many most likely tokens, 0 to 20; -1
            gives the whole vocabulary's. They are of the model's distribution, before penalties and temperature.
        prompt_logprobs: the same of the prompt's tokens, the first excepted. The prompt is then computed as a whole,
            whatever the prefix cache holds.
        truncate_prompt_tokens: use only so many of the prompt's last tokens; -1 as many as the context holds.
        structured_outputs: what the answer must be: JSON of a schema, one of several strings, in a grammar's language.
            It ends where that is complete, whatever `ignore_eos` and `min_tokens` say.

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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    n: int = 1
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        # A user may pass a list, or one string: accept what vLLM accepts, store one form.
        msgspec.structs.force_setattr(self, "stop", _as_tuple(self.stop, "stop", str))
        msgspec.structs.force_setattr(self, "stop_token_ids", _as_tuple(self.stop_token_ids, "stop_token_ids", int))
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            _require_number(name, getattr(self, name))
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
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
        _require_strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop needs text: it cannot be used with detokenize=False", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError.out_of_range(
                "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} ids"
            )
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, _INT32_MAX, "made of token ids")
        self._check_logit_edits()
        self._check_counts()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidRequestError.out_of_range(
                "structured_outputs", self.structured_outputs, "StructuredOutputsParams or None"
            )

    def _check_logit_edits(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise InvalidRequestError.out_of_range(name, getattr(self, name), "between -2 and 2")
        # A float32 holds it and its reciprocal.
        if not 1e-30 <= self.repetition_penalty <= 1e30:
            raise InvalidRequestError.out_of_range("repetition_penalty", self.repetition_penalty, "above 0")
        if self.logit_bias != ():
            msgspec.structs.force_setattr(self, "logit_bias", _as_biases(self.logit_bias))
        if self.bad_words != ():
            msgspec.structs.force_setattr(self, "bad_words", _as_tuple(self.bad_words, "bad_words", str))
            _require_strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        if self.allowed_token_ids is not None:
            allowed = _as_tuple(self.allowed_token_ids, "allowed_token_ids", int)
            msgspec.structs.force_setattr(self, "allowed_token_ids", allowed)
            if not allowed:
                raise InvalidRequestError.out_of_range("allowed_token_ids", [], "None or hold at least one token id")
            for token in allowed:
                _require_int("allowed_token_ids", token, 0, _INT32_MAX, "made of token ids")

    def _check_counts(self) -> None:
        _require_int("n", self.n, 1, MAX_CHOICES, f"1 to {MAX_CHOICES}")
        _require_int("min_tokens", self.min_tokens, 0, _INT32_MAX, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError.out_of_range(
                "min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), -1, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or -1 (all tokens)")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            expected = "at least 1, or -1 (as many as the context holds)"
            _require_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, _INT32_MAX, expected)

    def choice(self, index: int) -> SamplingParams:
        """The parameters of one of the `n` answers, which are requests of their own.

        With a seed, the first answer is the one that `n=1` gives, and the others have seeds that follow from it.
        """
        if self.n == 1:
            return self
        seed = self.seed
        if seed is not None and index:
            seed = int.from_bytes(sha256(f"{seed}/{index}".encode()).digest()[:8], "little", signed=True)
        return msgspec.structs.replace(self, n=1, seed=seed)

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


def _as_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """From a mapping, whose keys may be ids written as strings, as they are in JSON, or from pairs."""
    if value is None:
        return ()
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise InvalidRequestError.out_of_range("logit_bias", value, "a mapping from token ids to numbers")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidRequestError.out_of_range("logit_bias", pair, "a mapping from token ids to numbers")
        token, bias = pair
        if isinstance(token, str) and token.isdecimal() and token.isascii():
            token = int(token)
        _require_int("logit_bias", token, 0, _INT32_MAX, "a mapping whose keys are token ids")
        _require_number("logit_bias", bias)
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequestError.out_of_range("logit_bias", bias, "made of numbers between -100 and 100")
        biases[token] = float(bias)
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequestError.out_of_range("logit_bias", len(biases), f"at most {MAX_LOGIT_BIASES} tokens")
    return tuple(biases.items())


def _require_strings(name: str, strings: tuple[str, ...], most: int, most_chars: int) -> None:
    if len(strings) > most:
        raise InvalidRequestError.out_of_range(name, len(strings), f"at most {most} strings")
    for text in strings:
        if not 1 <= len(text) <= most_chars:
            raise InvalidRequestError.out_of_range(name, text, f"made of strings of 1 to {most_chars} characters")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError.out_of_range(name, value, "a finite number")


def _require_int(name: str, value: object, low: int, high: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError.out_of_range(name, value, expected)
