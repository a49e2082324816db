"""What the worker is told about a request's penalties, bias and tokens that may not be drawn."""

from __future__ import annotations

from core.request import Request
from protocol.arrays import pack_floats, pack_ints
from protocol.logit_edits import LogitEdits


def logit_edits(request: Request, eos_token_ids: tuple[int, ...]) -> LogitEdits | None:
    """None for a request whose logits are left as they are, which most are."""
    params = request.params
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    suppressed: set[int] = set()
    # A grammar's masks say all of what may be drawn, see `MaskMaker`.
    allowed = params.allowed_token_ids if request.grammar is None else None
    if params.min_tokens and request.grammar is None:
        # Tokens that would end it. Where the model's own do not, they are drawn like any other.
        suppressed = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    if (
        penalties == (0.0, 0.0, 1.0)
        and not suppressed
        and not params.logit_bias
        and not request.bad_words
        and allowed is None
        and request.grammar is None
    ):
        return None
    return LogitEdits(
        *penalties,
        suppressed_ids=pack_ints(sorted(suppressed)),
        suppressed_until=request.num_prompt_tokens + params.min_tokens,
        bias_ids=pack_ints([token for token, _ in params.logit_bias]),
        biases=pack_floats([bias for _, bias in params.logit_bias]),
        bad_words=request.bad_words,
        allowed_ids=None if allowed is None else pack_ints(allowed),
        is_masked=request.grammar is not None,
    )
