"""The requests that the core is working on, and where their tokens go.

Gives each request an id of its own towards the core, turns a step's tokens into text where text is wanted, and hands
both to the request's sink. Knows nothing of HTTP or of Python clients beyond the `Sink` interface.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Iterable
from typing import Protocol

import msgspec

from frontend.admission import Admission
from frontend.core_link import CoreLink
from frontend.deadlines import seconds_left, timeout_error
from frontend.failures import failed_of
from frontend.metrics import RequestMetrics
from frontend.text_output import TextOutput
from frontend.token_options import bad_word_ids, check_token_options
from frontend.tokenizer import Tokenizer
from protocol.errors import EngineUnavailableError, InvalidRequestError
from protocol.logprobs import TokenLogprob, TokenLogprobs, unpack_logprobs
from protocol.messages import AbortRequests, AddRequest, Failed, Finished, StepOutputs, pack_ints, unpack_ints
from protocol.sampling import SamplingParams

logger = logging.getLogger(__name__)

MAX_CACHE_SALT_CHARS = 1024
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


class Sink(Protocol):
    """Receives the outputs of one or more requests. Calls of one step, or of several, are followed by one `flush`."""

    def add(self, request: RunningRequest, token_id: int, text: str) -> None:
        """A token of a streaming request, and the text that became final with it.

        The token is the request's last; so is the log-probability, if they are wanted. Those of the prompt are there.
        """
        ...

    def finish(self, request: RunningRequest, text: str, finished: Finished) -> None:
        """The end: for a streaming request the last of its text, otherwise all of it. No calls follow."""
        ...

    def fail(self, request: RunningRequest, failed: Failed) -> None:
        """The request could not be finished. No calls follow."""
        ...

    def flush(self) -> None: ...


class RunningRequest:
    """One request while the core has it.

    Attributes:
        core_id: its id towards the core.
        tag: its id towards the sink.
        token_ids: the tokens generated so far.
        logprobs: what is known of each of them, if that is wanted.
        prompt_logprobs: stretches of the prompt as they come, all of them before the first token.
        text: detokenizer and stop strings, or None if no text is needed before the end.
        text_parts: the text so far of a request that has stop strings and does not stream.
        message: what the core was sent.
        arrival_time, last_token_time: of `time.perf_counter()`.
        timer: ends it when its time is over, if that is bounded.
    """

    __slots__ = (
        "arrival_time",
        "core_id",
        "last_token_time",
        "logprobs",
        "message",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
        "sink",
        "stream",
        "tag",
        "text",
        "text_parts",
        "timer",
        "token_ids",
        "wants_text",
    )

    def __init__(
        self,
        message: AddRequest,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        tag: int,
        stream: bool,
        tokenizer: Tokenizer | None,
        arrival_time: float,
    ) -> None:
        self.message = message
        self.core_id = message.request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.sink = sink
        self.tag = tag
        self.stream = stream
        self.arrival_time = self.last_token_time = arrival_time
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.wants_text = params.detokenize and tokenizer is not None
        self.timer: asyncio.TimerHandle | None = None
        self.text: TextOutput | None = None
        self.text_parts: list[str] = []
        if tokenizer is not None and params.detokenize and (stream or params.stop):
            self.text = TextOutput(
                tokenizer.detokenizer(params.skip_special_tokens),
                params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    @property
    def prompt_is_measured(self) -> bool:
        """Whether the prompt's log-probabilities are wanted and all there."""
        if self.params.prompt_logprobs is None:
            return False
        return sum(stretch.num_rows for stretch in self.prompt_logprobs) == len(self.prompt_token_ids) - 1

    def measured_prompt(self) -> list[TokenLogprob | None]:
        """What is known of each token of the prompt, once all is there; nothing of the first."""
        found = dict(entry for stretch in self.prompt_logprobs for entry in unpack_logprobs(stretch))
        return [found.get(position) for position in range(len(self.prompt_token_ids))]

    def add_prompt_logprobs(self, stretch: TokenLogprobs) -> None:
        if self.token_ids:
            return  # they have been handed out, and come again after a preemption
        if unpack_ints(stretch.rows)[:1].tolist() == [1]:
            self.prompt_logprobs = []  # from the beginning, again if the request was preempted in its prompt
        self.prompt_logprobs.append(stretch)


class RequestTable:
    """All running requests of this frontend."""

    def __init__(
        self,
        core: CoreLink,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        metrics: RequestMetrics,
        admission: Admission,
    ) -> None:
        self._core = core
        self._admission = admission
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._running: dict[int, RunningRequest] = {}
        self._core_ids = itertools.count(1)
        # Sinks with outputs of steps that they have not been told to pass on, and those of them with first tokens.
        self._touched: set[Sink] = set()
        self._begun: set[Sink] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._running)

    async def wait_until_idle(self) -> None:
        await self._idle.wait()

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        tag: int = 0,
        *,
        stream: bool,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        grammar: str | None = None,
        timeout: float | None = None,
        client: int = 0,
    ) -> RunningRequest:
        """Hands a checked request to the core. Each of several choices is one: see `SamplingParams.choice`.

        `grammar` is that of the parameters' structured outputs, see `AnswerGrammars`.

        It arrived at `arrival_time`, if it was not just now, and fails `timeout` seconds after that. `client` is as in
        `AddRequest`.

        Raises:
            InvalidRequestError: a field that only this place can check is wrong.
            EngineUnavailableError: the core does not take requests.
        """
        if not _INT32_MIN <= priority <= _INT32_MAX:
            raise InvalidRequestError.out_of_range("priority", priority, "a signed 32-bit integer")
        if cache_salt == "":
            raise InvalidRequestError("cache_salt must not be empty", "cache_salt")
        if cache_salt is not None and len(cache_salt) > MAX_CACHE_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt must have at most {MAX_CACHE_SALT_CHARS} characters, got {len(cache_salt)}", "cache_salt"
            )
        if params.stop and self._tokenizer is None:
            raise InvalidRequestError(
                "stop needs text, and the engine runs without a tokenizer (--skip-tokenizer-init)", "stop"
            )
        if params.n != 1:
            raise InvalidRequestError.out_of_range("n", params.n, "1 here: each choice is a request of its own")
        check_token_options(params, len(prompt_token_ids), self._vocab_size)
        bad_words = [pack_ints(ids) for ids in bad_word_ids(params.bad_words, self._tokenizer)]
        arrived = time.perf_counter() if arrival_time is None else arrival_time
        # Stop strings are found here: the core knows no text. The seed is drawn here, so that another core, if this one
        # dies, goes on as this one would have.
        seed = random.getrandbits(63) if params.seed is None else params.seed
        core_params = msgspec.structs.replace(params, seed=seed, stop=(), bad_words=(), structured_outputs=None)
        prompt = pack_ints(prompt_token_ids)
        core_id = next(self._core_ids)
        message = AddRequest(core_id, prompt, core_params, priority, cache_salt, bad_words, grammar, client=client)
        request = RunningRequest(message, prompt_token_ids, params, sink, tag, stream, self._tokenizer, arrived)
        # While the core is being replaced, requests wait here for `replay`.
        if not self._core.send(message) and not self._core.is_lost:
            raise EngineUnavailableError("the engine core does not take requests at the moment")
        self._running[request.core_id] = request
        self._admission.begin(len(prompt_token_ids))
        if timeout is not None:
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(seconds_left(arrived, timeout), self._expire, request, timeout)
        self._idle.clear()
        return request

    def replay(self) -> None:
        """Hands every running request to a core that knows none of them, each with what it has generated so far."""
        for request in list(self._running.values()):
            message = request.message
            if request.token_ids:
                # What was measured of the prompt has been handed out with the first token.
                params = msgspec.structs.replace(message.params, prompt_logprobs=None)
                generated = pack_ints(request.token_ids)
                message = msgspec.structs.replace(message, params=params, generated_token_ids=generated)
            if not self._core.send(message) and self._forget(request):
                self._count_end(request, "error")
                reason = "the engine has recovered, and does not take this request again: too many wait"
                request.sink.fail(request, Failed(request.tag, "unavailable", reason))
                request.sink.flush()

    def abort(self, requests: Iterable[RunningRequest]) -> None:
        """Forgets requests whose sink has left, and tells the core. Ended ones among them are left alone."""
        left = [request for request in requests if self._forget(request)]
        for request in left:
            self._count_end(request, "abort")
        self._abort_in_core([request.core_id for request in left])

    def abort_all(self) -> None:
        """Ends every request with what it has so far and the finish reason "abort"."""
        self.end(list(self._running.values()))

    def end(self, requests: Iterable[RunningRequest]) -> None:
        """Ends those of the requests that are running with what they have so far and the finish reason "abort"."""
        requests = [request for request in requests if request.core_id in self._running]
        self._abort_in_core([request.core_id for request in requests])
        for request in requests:
            self._finish(request, Finished(request.core_id, "abort"))
        self._flush({request.sink for request in requests})

    def _expire(self, request: RunningRequest, timeout: float) -> None:
        """Fails a request whose time is over."""
        if self._forget(request):
            self._count_end(request, "error")
            self._abort_in_core([request.core_id])
            request.sink.fail(request, failed_of(request.tag, timeout_error(timeout)))
            request.sink.flush()

    def fail_all(self, message: str) -> None:
        """Ends every request with an error: the engine is gone."""
        requests = list(self._running.values())
        for request in requests:
            # A sink that finds its receiver gone has its other requests aborted meanwhile.
            if self._forget(request):
                self._count_end(request, "error")
                request.sink.fail(request, Failed(request.tag, "unavailable", message))
        self._flush({request.sink for request in requests})

    def on_step(self, step: StepOutputs) -> None:
        """Distributes what one step produced; `flush_steps` then passes it on. A request has at most one token in a
        step."""
        running = self._running
        # The token that ended a request, an end-of-sequence or stop token, is not part of its text unless asked for.
        ended_by_token = {
            finished.request_id for finished in step.finished if finished.reason == "stop" and not finished.is_complete
        }
        for measured in step.prompt_logprobs:
            if measured.request_id in running:
                running[measured.request_id].add_prompt_logprobs(measured.tokens)
        logprobs = dict(entry for table in step.logprobs for entry in unpack_logprobs(table))
        touched, begun = self._touched, self._begun
        stopped: list[int] = []
        now = time.perf_counter()
        earlier_tokens: list[float] = []  # when each row's request had the token before this one
        ids, tokens = unpack_ints(step.request_ids, "<i8").tolist(), unpack_ints(step.token_ids).tolist()
        for row, (core_id, token_id) in enumerate(zip(ids, tokens, strict=True)):
            request = running.get(core_id)
            if request is None:
                continue
            if request.token_ids:
                earlier_tokens.append(request.last_token_time)
            else:
                begun.add(request.sink)
                self._metrics.time_to_first_token.observe(now - request.arrival_time)
                self._admission.end(len(request.prompt_token_ids), is_answered=True)
            request.last_token_time = now
            request.token_ids.append(token_id)
            if request.params.logprobs is not None:
                request.logprobs.append(logprobs[row].narrowed(request.params.logprobs))
            if request.text is not None and (
                core_id not in ended_by_token or request.params.include_stop_str_in_output
            ):
                text = request.text.feed(token_id)
                if request.stream:
                    request.sink.add(request, token_id, text)
                    touched.add(request.sink)
                elif text:
                    request.text_parts.append(text)
                if request.text.stopped_by is not None:
                    stopped.append(core_id)
                    self._finish(request, Finished(core_id, "stop", request.text.stopped_by))
                    touched.add(request.sink)
            elif request.stream:
                request.sink.add(request, token_id, "")
                touched.add(request.sink)
        for finished in step.finished:
            request = running.get(finished.request_id)
            if request is not None:
                self._finish(request, finished)
                touched.add(request.sink)
        self._metrics.inter_token_latency.observe_since(now, earlier_tokens)
        self._abort_in_core(stopped)

    def flush_steps(self) -> None:
        """Has sinks pass on what the steps since the last time brought.

        Where steps come faster than they can be passed on one by one, there are several, and a stream's tokens go
        together.
        """
        touched, begun = self._touched, self._begun
        self._touched, self._begun = set(), set()
        # First tokens go first. A response begins in a task of its own, which this wakes: the others, 10 µs and more
        # each, come after it.
        begun &= touched
        self._flush(begun)
        # What is left when nothing runs any more may be the last that a server does before it stops.
        if begun and self._running:
            asyncio.get_running_loop().call_soon(self._flush, touched - begun)
        else:
            self._flush(touched - begun)

    def on_failed(self, failed: Failed) -> None:
        """The core refused a request or could not finish it."""
        request = self._running.get(failed.request_id)
        if request is not None:
            self._forget(request)
            self._count_end(request, "error")
            request.sink.fail(request, Failed(request.tag, failed.kind, failed.message, failed.param))
            request.sink.flush()

    def _finish(self, request: RunningRequest, finished: Finished) -> None:
        if not self._forget(request):
            return
        parts = request.text_parts
        stop_reason = finished.stop_reason
        reason = finished.reason
        if request.text is not None:
            if request.text.stopped_by is None:
                parts.append(request.text.flush())
            if request.text.stopped_by is not None:
                reason, stop_reason = "stop", request.text.stopped_by
        elif request.wants_text and self._tokenizer is not None:
            ended_by_token = reason == "stop" and not finished.is_complete
            is_last_left_out = ended_by_token and not request.params.include_stop_str_in_output
            ids = request.token_ids[:-1] if is_last_left_out else request.token_ids
            parts.append(self._tokenizer.decode(ids, request.params.skip_special_tokens))
        self._count_end(request, reason)
        ended = Finished(request.tag, reason, stop_reason, finished.num_cached_tokens)
        request.sink.finish(request, "".join(parts), ended)

    def _forget(self, request: RunningRequest) -> bool:
        """Whether the request was still running."""
        if self._running.pop(request.core_id, None) is None:
            return False
        if request.timer is not None:
            request.timer.cancel()
        if not request.token_ids:
            self._admission.end(len(request.prompt_token_ids), is_answered=False)
        if not self._running:
            self._idle.set()
        return True

    def _count_end(self, request: RunningRequest, reason: str) -> None:
        seconds = time.perf_counter() - request.arrival_time
        self._metrics.request_ended(reason, seconds, len(request.prompt_token_ids), len(request.token_ids))

    def _abort_in_core(self, core_ids: list[int]) -> None:
        if core_ids:
            # A core that cannot take this any more is gone, and its requests with it.
            self._core.send(AbortRequests(pack_ints(core_ids, "<i8")))

    @staticmethod
    def _flush(sinks: Iterable[Sink]) -> None:
        for sink in sinks:
            try:
                sink.flush()
            except Exception:
                # A bug in one costs its outputs, and not those of the others.
                logger.exception("outputs could not be passed on")
