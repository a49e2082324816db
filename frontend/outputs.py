"""What a client gives back: results shaped as vLLM's, so that code written for it goes on working."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from protocol.logprobs import TokenLogprob


@dataclass(slots=True)
class Logprob:
    """A token's log-probability, and how many tokens are at least as likely, itself included."""

    logprob: float
    rank: int


# At one position, by token id: the token that is there, then the most likely ones.
PositionLogprobs: TypeAlias = "dict[int, Logprob]"


def position_logprobs(token_id: int, measured: TokenLogprob) -> PositionLogprobs:
    """What is known of the position at which the token stands."""
    found = {token_id: Logprob(measured.logprob, measured.rank)}
    for rank, (other, logprob) in enumerate(zip(measured.top_ids, measured.top_logprobs, strict=True), 1):
        found.setdefault(other, Logprob(logprob, rank))
    return found


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `text` is empty where none was asked for or the engine has no tokenizer.

    `stop_reason` is the stop string or stop token id that ended the answer, or None if the model's own
    end-of-sequence token or the limit did. `logprobs` has an entry a token, and `cumulative_logprob` is their sum; both
    are None if none were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of `time.perf_counter()`, taken in the client.

    `token_times` has an entry a token as they arrived; a request that does not stream gets them all at its end.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """One request and its answers. `prompt` is the text that was sent, or None for token ids and chats.

    `prompt_logprobs` has an entry a token of the prompt, None for the first. Metrics are those of the first answer.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None


@dataclass(slots=True)
class StreamChunk:
    """What is new in a stream: text that became final, the tokens that came, and in the last chunk how it ended.

    `index` says of which answer, if there are several. `logprobs` has an entry a token, and the first chunk of an
    answer has the prompt's, if they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    index: int = 0
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
