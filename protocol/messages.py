"""Every message on a request's way between processes, grouped by the arrow it travels on.

Messages are msgspec Structs, tagged by class name and encoded as msgpack arrays. Integer arrays travel as raw
little-endian bytes (`Int32Array`, `Int64Array`), which NumPy reads without a copy: see `protocol/arrays.py`.

    Python client ⇄ frontend     Hello Generate Abort Heartbeat Received GetStats
                                 | Welcome Refused Started Outputs Failed Stats
    frontend ⇄ core              CoreHello AddRequest AbortRequests GetStats
                                 | CoreReady StepOutputs Failed Refused Stats
    core ⇄ worker                Step StepMasks Shutdown | WorkerReady StepResult

Those between the launcher and the processes it has started are in `protocol/launcher_messages.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.arrays import Int32Array, Int64Array, pack_ints, require_same_count, require_whole, unpack_ints
from protocol.histogram import HistogramCounts
from protocol.logit_edits import LogitEdits
from protocol.logprobs import PromptLogprobs, TokenLogprobs
from protocol.sampling import SamplingParams

__all__ = ["pack_ints", "unpack_ints"]

PROTOCOL_VERSION = 6

FinishReason = Literal["stop", "length", "abort"]
Count = Annotated[int, Meta(ge=0)]


class Message(Struct, array_like=True, tag=True, frozen=True):
    """Base of cold messages."""


class HotMessage(Message, frozen=True, gc=False):
    """Base of messages sent every step: they hold no reference cycles, so the collector need not look at them."""


class GetStats(Message, frozen=True):
    """Client → frontend → core: asks for `Stats`, which come back with the same id."""

    query_id: int


class Stats(Message, frozen=True):
    """Counters since start-up and gauges of now, from the core.

    `num_free_blocks` counts cached blocks that nobody holds; `prefix_cache_queries` and `_hits` count tokens;
    `queue_time` is of seconds from arrival at the core to the step that first computed something of a request.
    """

    query_id: int = 0
    num_running: Count = 0
    num_waiting: Count = 0
    num_blocks: Count = 0
    num_free_blocks: Count = 0
    prefix_cache_queries: Count = 0
    prefix_cache_hits: Count = 0
    num_preemptions: Count = 0
    num_steps: Count = 0
    prompt_tokens: Count = 0
    computed_tokens: Count = 0
    generation_tokens: Count = 0
    finished_requests: Count = 0
    aborted_requests: Count = 0
    queue_time: HistogramCounts = HistogramCounts()


class EngineInfo(Struct, array_like=True, frozen=True):
    """What a peer must know of the engine before it sends a request.

    `sampling_defaults` are the values, by name, that the model recommends, and `max_waiting` the most requests that may
    wait, if there is a limit; the frontend adds both.
    """

    model: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    has_tokenizer: bool = True
    sampling_defaults: dict[str, Any] = msgspec.field(default_factory=dict)
    max_waiting: int | None = None


# --- Python client ⇄ frontend ---------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a client. `heartbeat_s` is how often it will send `Heartbeat` when it is otherwise silent."""

    protocol_version: int
    heartbeat_s: float = 5.0


class Welcome(Message, frozen=True):
    protocol_version: int
    engine: EngineInfo


class Refused(Message, frozen=True):
    """Answer to a message that cannot be accepted: an unknown version, malformed bytes, an engine that is stopping."""

    reason: str


class TextPrompt(Message, frozen=True):
    text: str


class TokenPrompt(Message, frozen=True):
    token_ids: Int32Array

    def __post_init__(self) -> None:
        require_whole(self, ("token_ids",), 4)


class ChatPrompt(Message, frozen=True):
    """A conversation to be rendered with the model's chat template, which sees `template_options` by name."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = {}


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Generate(Message, frozen=True):
    """One request of a client. `request_id` is the client's own.

    Without `stream`, tokens and text come back when the request ends, in one `Outputs`. `timeout` is in seconds, from
    arrival to end.
    """

    request_id: int
    prompt: Prompt
    params: SamplingParams
    stream: bool = True
    priority: int = 0
    cache_salt: str | None = None
    timeout: float | None = None


class Abort(Message, frozen=True):
    request_ids: list[int]


class Heartbeat(Message, frozen=True):
    pass


class Received(Message, frozen=True):
    """Client → frontend, now and then: how many bytes of messages it has taken in all. What waits for it is bounded."""

    num_bytes: Count


class Started(Message, frozen=True):
    """The request was tokenized and handed to the core: its prompt's ids, for clients that sent text."""

    request_id: int
    prompt_token_ids: Int32Array


class Finished(Struct, array_like=True, frozen=True):
    """The end of one request. `stop_reason` is the stop string or stop token id that ended it, if one did.

    With the reason "stop", the last token is the one that said so, and no part of the text. Not so if `is_complete`:
    after it the request's grammar leaves nothing to come.
    """

    request_id: int
    reason: FinishReason
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    is_complete: bool = False


class Outputs(HotMessage, frozen=True):
    """One client's share of a step, or of several that came together.

    Token `i` belongs to request `request_ids[i]`; a request's are in order of generation.
    `texts` holds the text that became final for requests that want text; `finished` the requests that ended.
    `logprobs` are of those of the tokens whose requests want them; their rows are indices into `token_ids`.
    `prompt_logprobs` come with a request's first token, or with its end.
    """

    request_ids: Int64Array
    token_ids: Int32Array
    texts: list[tuple[int, str]] = []
    finished: list[Finished] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []

    def __post_init__(self) -> None:
        require_whole(self, ("request_ids",), 8)
        require_whole(self, ("token_ids",), 4)
        require_same_count(self, ("request_ids", 8), ("token_ids", 4))


ErrorKind = Literal["invalid_request", "unavailable", "failed", "overloaded", "timeout"]


class Failed(Message, frozen=True):
    """Core → frontend → client: the request was refused or could not be finished. `param` names the field at fault.

    `retry_after` are the seconds after which a request that was refused as "overloaded" may be taken.

    Also the answer to a `GetStats` that cannot be answered, with the query's id.
    """

    request_id: int
    kind: ErrorKind
    message: str
    param: str | None = None
    retry_after: float | None = None


ClientMessage = Hello | Generate | Abort | Heartbeat | Received | GetStats
FrontendMessage = Welcome | Refused | Started | Outputs | Failed | Stats

# --- frontend ⇄ core ------------------------------------------------------------------------------------------------


class CoreHello(Message, frozen=True):
    protocol_version: int


class CoreReady(Message, frozen=True):
    """The answer to `CoreHello`, once there is a worker; again after each time that the worker was replaced."""

    protocol_version: int
    epoch: int
    engine: EngineInfo


class AddRequest(Message, frozen=True):
    """A checked and tokenized request. `request_id` is unique within the frontend that sends it.

    `bad_words` are the token sequences of the words that must not be generated: the core knows no text. `grammar` is
    what the answer must be, in llguidance's form. `generated_token_ids` are there already if another core, which is
    gone, has begun the answer. `client` says whose request it is, for the cap on what one may hold: a number that is
    the same for all requests of a client of that frontend.
    """

    request_id: int
    prompt_token_ids: Int32Array
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    bad_words: list[Int32Array] = []
    grammar: str | None = None
    generated_token_ids: Int32Array = b""
    client: int = 0

    def __post_init__(self) -> None:
        require_whole(self, ("prompt_token_ids", "generated_token_ids"), 4)


class AbortRequests(Message, frozen=True):
    request_ids: Int64Array

    def __post_init__(self) -> None:
        require_whole(self, ("request_ids",), 8)


class StepOutputs(HotMessage, frozen=True):
    """All that one step produced for one frontend: one row a sampled token, and the requests that ended.

    `logprobs` as in `Outputs`. `prompt_logprobs` come as the prompt is computed, stretch by stretch; one that was
    computed again after a preemption comes again.
    """

    epoch: int
    request_ids: Int64Array
    token_ids: Int32Array
    finished: list[Finished] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []

    def __post_init__(self) -> None:
        require_whole(self, ("request_ids",), 8)
        require_whole(self, ("token_ids",), 4)
        require_same_count(self, ("request_ids", 8), ("token_ids", 4))


FrontendToCore = CoreHello | AddRequest | AbortRequests | GetStats
CoreToFrontend = CoreReady | StepOutputs | Failed | Refused | Stats

# --- core ⇄ worker --------------------------------------------------------------------------------------------------


class AdmittedSlot(Struct, array_like=True, frozen=True, gc=False):
    """A request that takes a slot: everything the worker keeps for it.

    `token_ids` are all known tokens (prompt, and after a preemption the tokens generated so far), of which the first
    `num_prompt_tokens` are the prompt and the first `num_computed_tokens` are in the cache already.
    `num_logprobs` and `num_prompt_logprobs` are as in `SamplingParams`.
    """

    slot: int
    token_ids: Int32Array
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: Int32Array
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    edits: LogitEdits | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        require_whole(self, ("token_ids", "block_ids"), 4)


# Tokens of a prefill row from which on it may be computed some layers a step, rather than cut. In one piece it takes
# less time, but decodes beside it read the weights for themselves: on an H200, with the shape of Qwen3-0.6B, both
# should come to about the same at 4,000 tokens.
LEAST_LAYERED_TOKENS = 4096


class Step(HotMessage, frozen=True):
    """One forward pass, as the difference from the step before it. Fields apply in the order they are listed.

    New blocks: block `new_block_ids[i]` becomes entry `new_block_positions[i]` of the table of slot
    `new_block_slots[i]`. Decoding rows come first and each computes one token: `decode_slots` is None when they are
    the last step's. Prefill row `i` computes the next `prefill_lens[i]` known tokens of slot `prefill_slots[i]` and
    samples if `prefill_samples[i]`. One token comes back for each decoding row and each prefill row that samples.

    If `prefill_num_layers` is not 0, the step's one prefill row computes no more than that many layers, from
    `prefill_first_layer` on, beside the decoding rows rather than together with them. Other steps bring the others, in
    order; the row counts as computed, and may sample, in the one with the last layer.

    If `needs_masks`, rows wait for a grammar's mask: the forward pass can run, the sampler waits for `StepMasks`.
    """

    step_id: int
    epoch: int
    released_slots: Int32Array = b""
    admitted: list[AdmittedSlot] = []
    new_block_slots: Int32Array = b""
    new_block_positions: Int32Array = b""
    new_block_ids: Int32Array = b""
    decode_slots: Int32Array | None = None
    prefill_slots: Int32Array = b""
    prefill_lens: Int32Array = b""
    prefill_samples: bytes = b""
    prefill_first_layer: int = 0
    prefill_num_layers: int = 0
    needs_masks: bool = False

    def __post_init__(self) -> None:
        arrays = ("released_slots", "new_block_slots", "new_block_positions", "new_block_ids")
        require_whole(self, (*arrays, "prefill_slots", "prefill_lens"), 4)
        if self.decode_slots is not None:
            require_whole(self, ("decode_slots",), 4)
        require_same_count(self, *((name, 4) for name in arrays[1:]))
        require_same_count(self, ("prefill_slots", 4), ("prefill_lens", 4), ("prefill_samples", 1))


class StepMasks(HotMessage, frozen=True):
    """What the grammars of a step's rows allow, sent once the tokens before are known, and before the next step.

    `masks` holds a row for each of `slots`: a bit a token of the vocabulary, in 32-bit words, the lowest bit first.
    Rows that need a mask and are not here belong to requests that have ended: what they draw is dropped.
    """

    step_id: int
    slots: Int32Array
    masks: Int32Array

    def __post_init__(self) -> None:
        require_whole(self, ("slots", "masks"), 4)


class StepResult(HotMessage, frozen=True):
    """The tokens of a step's sampling rows, in row order. -1 means that no token could be drawn: the row's logits were
    not numbers, or none was left that may be drawn.

    `logprobs` are of the tokens whose slots want them; their rows are indices into `token_ids`. `prompt_logprobs` has
    an entry for each prefill row whose slot wants them, in row order; their rows are positions in the prompt.
    """

    step_id: int
    epoch: int
    token_ids: Int32Array
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []

    def __post_init__(self) -> None:
        require_whole(self, ("token_ids",), 4)


class WorkerReady(Message, frozen=True):
    """All slots are empty. Sent first on a connection, whose epoch it names."""

    protocol_version: int
    epoch: int
    num_blocks: Count
    block_size: Count
    max_model_len: Count


class Shutdown(Message, frozen=True):
    pass


CoreToWorker = Step | StepMasks | Shutdown
WorkerToCore = WorkerReady | StepResult


class Malformed(msgspec.Struct, frozen=True):
    """What a receiver gets in place of a message that could not be decoded. Never travels itself."""

    reason: str
