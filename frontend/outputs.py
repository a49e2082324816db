"""What a client gives back: results shaped as vLLM's, so that code written for it goes on working."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `text` is empty where none was asked for or the engine has no tokenizer.

    `stop_reason` is the stop string or stop token id that ended the answer, or None if the model's own
    end-of-sequence token or the limit did.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


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
    """One request and its answer. `prompt` is the text that was sent, or None for token ids and chats."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0


@dataclass(slots=True)
class StreamChunk:
    """What is new in a stream: text that became final, the tokens that came, and in the last chunk how it ended."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
