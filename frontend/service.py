"""What HTTP and IPC have in common: the engine's state, and everything a request passes through on its way to the core.

Owns the link to the core, the tokenizer and the table of running requests.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from frontend.admission import Admission, AdmissionLimits
from frontend.answer_parser import AnswerFormat, answer_format
from frontend.core_link import CoreLink
from frontend.deadlines import timeout_of
from frontend.generation_config import load_sampling_defaults
from frontend.metrics import RequestMetrics
from frontend.prompts import Prompts
from frontend.requests import RequestTable
from frontend.structured_output import AnswerGrammars
from frontend.tokenizer import Tokenizer
from frontend.tokenizer_file import tokenizer_file
from protocol.config import EngineConfig, parse_size
from protocol.errors import EngineUnavailableError
from protocol.launcher_messages import EngineFailed, ProcessLost
from protocol.messages import EngineInfo, Failed, Stats, StepOutputs
from protocol.threads import deep_thread_pool

logger = logging.getLogger(__name__)

# Longer than a step takes, between which the core answers, and shorter than a monitor waits.
_STATS_TIMEOUT_S = 5.0

State = Literal["starting", "ready", "recovering", "stopping", "failed"]
_REASONS: dict[State, str] = {
    "starting": "the engine is starting",
    "recovering": "the engine is recovering",
    "stopping": "the engine is stopping",
    "failed": "the engine has failed",
}


class Service:
    """The engine as its users see it.

    Attributes:
        max_body_bytes: of an HTTP request.
        state: "starting" until `start` returns; "recovering" while the core or the worker is being replaced: what runs
            waits, and so do new requests; "failed" when that was given up.
        engine: what clients are told of the engine. Like the attributes below it set by `start`.
    """

    engine: EngineInfo
    tokenizer: Tokenizer | None
    answer_format: AnswerFormat
    prompts: Prompts
    grammars: AnswerGrammars
    requests: RequestTable

    def __init__(self, context: zmq.Context, config: EngineConfig) -> None:
        """Raises ConfigError if the model's generation_config.json cannot be used."""
        self.config = config
        self.max_body_bytes = parse_size(config.options.max_body_size)
        self.sampling_defaults = load_sampling_defaults(Path(config.model_path))
        self.state: State = "starting"
        self.metrics = RequestMetrics(config.max_model_len)
        self._why_unavailable: str | None = None
        self._epoch = config.epoch  # which the last loss began
        self._met_epoch = config.epoch  # of which the core has said that there is a worker
        self.admission = Admission(AdmissionLimits.of(config.options))
        self.core = CoreLink(context, config.core_address(config.epoch), self)
        # Two threads, so that one very long text does not hold up all others.
        self._executor = deep_thread_pool(2, "tokenizer")

    async def start(self) -> None:
        """Waits for the core, loading the tokenizer meanwhile.

        Raises:
            ConfigError: the tokenizer cannot be loaded.
            EngineError: the core refuses this frontend, or is gone.
        """
        engine, self.tokenizer = await asyncio.gather(self.core.ready, self._load_tokenizer())
        if self.core.is_lost:
            raise EngineUnavailableError("the engine core went away")
        self.engine = msgspec.structs.replace(
            engine,
            model=self.config.model_name,
            has_tokenizer=self.tokenizer is not None,
            sampling_defaults=msgspec.structs.asdict(self.sampling_defaults),
            max_waiting=self.config.options.max_waiting or None,
        )
        self.answer_format = answer_format(self.config.options, self.tokenizer)
        self.prompts = Prompts(self.tokenizer, self.engine, self._executor)
        self.grammars = AnswerGrammars(self.tokenizer, self.answer_format, self._executor)
        self.requests = RequestTable(self.core, self.tokenizer, self.engine.vocab_size, self.metrics, self.admission)
        self.state = "ready"

    async def _load_tokenizer(self) -> Tokenizer | None:
        if self.config.options.skip_tokenizer_init:
            return None
        model_path = Path(self.config.model_path)
        file = await tokenizer_file(model_path, Path(self.config.run_directory))
        vocab_size = self.config.model_config.vocab_size
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, Tokenizer.load, model_path, file, vocab_size)

    @property
    def unavailable_reason(self) -> str | None:
        """Why no request can be served now, or None if one can."""
        return None if self.state == "ready" else self._why_unavailable or _REASONS[self.state]

    def require_ready(self) -> None:
        """Raises EngineUnavailableError, with the reason, if no request can be taken now, not even to wait."""
        if self.state not in ("ready", "recovering"):
            raise EngineUnavailableError(str(self.unavailable_reason))

    def timeout_of(self, given: float | None) -> float | None:
        """The seconds that a request gets which asks for these. Raises InvalidRequestError for what is no time."""
        return timeout_of(given, self.config.options.request_timeout)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets the running ones finish for so long, and ends the rest where they are."""
        if self.state not in ("ready", "recovering"):
            return
        self.state, self._why_unavailable = "stopping", None
        try:
            await asyncio.wait_for(self.requests.wait_until_idle(), timeout_s)
        except TimeoutError:
            logger.warning("aborting %d requests that were still running", len(self.requests))
            self.requests.abort_all()

    async def engine_stats(self) -> Stats | None:
        """The core's counters, or None while it starts, when it is gone and when it does not answer in time."""
        if self.state in ("starting", "failed"):
            return None
        answer: asyncio.Future[Stats | None] = asyncio.get_running_loop().create_future()

        def on_stats(stats: Stats | None) -> None:
            if not answer.done():
                answer.set_result(stats)

        self.core.query_stats(on_stats)
        try:
            return await asyncio.wait_for(answer, _STATS_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the engine core did not answer within %g s", _STATS_TIMEOUT_S)
            return None

    def on_step(self, step: StepOutputs) -> None:
        if self.state != "starting":
            self.requests.on_step(step)

    def on_steps_taken(self) -> None:
        if self.state != "starting":
            self.requests.flush_steps()

    def on_failed(self, failed: Failed) -> None:
        if self.state != "starting":
            self.requests.on_failed(failed)

    def on_core_lost(self) -> None:
        self._recover("the engine core went away")

    def on_core_ready(self, epoch: int, is_new: bool) -> None:
        if is_new:
            self.requests.replay()
        self._met_epoch = epoch
        # Something else may have been lost meanwhile.
        if self.state == "recovering" and epoch >= self._epoch:
            self.state, self._why_unavailable = "ready", None

    def on_launcher(self, _: bytes, message: Any) -> None:
        """Takes what the launcher says."""
        if isinstance(message, ProcessLost):
            self._epoch = message.epoch
            self.metrics.restarts[message.process] += 1
            # The core may have been quicker to say that there is a worker again.
            if message.epoch > self._met_epoch:
                self._recover(message.reason)
            if message.process == "core":
                self.core.reconnect(self.config.core_address(message.epoch))
        elif isinstance(message, EngineFailed):
            is_serving, self.state = self.state in ("ready", "recovering", "stopping"), "failed"
            self._why_unavailable = message.reason
            if is_serving:
                self.requests.fail_all(message.reason)

    def _recover(self, reason: str) -> None:
        if self.state in ("ready", "recovering"):
            self.state, self._why_unavailable = "recovering", reason

    def close(self) -> None:
        self.core.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
