"""What changes a request's logits before its tokens are drawn, as the worker is told: ids and numbers, no text."""

from __future__ import annotations

from msgspec import Struct

from protocol.arrays import Float32Array, Int32Array, require_same_count, require_whole


class LogitEdits(Struct, array_like=True, frozen=True, gc=False):
    """What changes a request's logits before its tokens are drawn.

    Attributes:
        presence_penalty, frequency_penalty, repetition_penalty: as in `SamplingParams`.
        suppressed_ids: tokens that are not drawn before position `suppressed_until`.
        bias_ids, biases: what is added to these tokens' logits.
        bad_words: sequences whose last token is not drawn after those before it.
        allowed_ids: the only tokens that may be drawn; None for all.
        is_masked: what may be drawn comes with each step, see `StepMasks`.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    suppressed_ids: Int32Array = b""
    suppressed_until: int = 0
    bias_ids: Int32Array = b""
    biases: Float32Array = b""
    bad_words: list[Int32Array] = []
    allowed_ids: Int32Array | None = None
    is_masked: bool = False

    def __post_init__(self) -> None:
        require_whole(self, ("suppressed_ids", "bias_ids", "biases"), 4)
        require_same_count(self, ("bias_ids", 4), ("biases", 4))
        if any(len(data) % 4 for data in (*self.bad_words, self.allowed_ids or b"")):
            raise ValueError("bad_words and allowed_ids must hold whole 32-bit numbers")
