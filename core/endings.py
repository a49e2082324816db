"""How a request ends: which of its rules a new token meets, and why one could not be drawn."""

from __future__ import annotations

from dataclasses import dataclass

from core.request import Request
from protocol.messages import FinishReason


@dataclass(frozen=True, slots=True)
class Ending:
    """`stop_reason` is the stop token that ended it, if one did; `is_complete` says that its grammar allows no more."""

    reason: FinishReason
    stop_reason: int | None = None
    is_complete: bool = False


def ending_of(request: Request, token: int, num_tokens: int, eos_token_ids: tuple[int, ...]) -> Ending | None:
    """How the token ends the request, which has `num_tokens` with it; None if it goes on.

    A grammar has been told of the token already.
    """
    params, grammar = request.params, request.grammar
    may_stop = num_tokens - request.num_prompt_tokens >= params.min_tokens
    if may_stop and token in params.stop_token_ids:
        return Ending("stop", token)
    if token in eos_token_ids and (grammar is not None or (may_stop and not params.ignore_eos)):
        return Ending("stop")
    if grammar is not None and grammar.is_complete:
        return Ending("stop", is_complete=True)
    return Ending("length") if num_tokens >= request.total_limit else None


def why_no_token(request: Request) -> str:
    """The error of a request whose row came back without a token."""
    params = request.params
    limits = {
        "structured_outputs": request.grammar is not None,
        "bad_words": bool(request.bad_words),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "min_tokens": params.min_tokens > 0,
    }
    if not any(limits.values()):
        return "the model's output is not a number (NaN): the weights may be damaged"
    return (
        f"no token can be drawn: either {' and '.join(name for name, given in limits.items() if given)} leave none, "
        "or the model's output is not a number (NaN)"
    )
