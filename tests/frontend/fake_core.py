"""A test double of the engine core's side of the protocol: a thread on the core's address with simple token rules.

Not an engine: an answer is the prompt's own tokens again, followed by the end-of-sequence token, one token a step, so
that tests know every token and every text in advance. Tests can hold it still, make it fail, or make it disappear.
"""

from __future__ import annotations

import threading
import time

import zmq

from protocol.logprobs import PromptLogprobs, TokenLogprob, pack_logprobs
from protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    CoreHello,
    CoreReady,
    EngineInfo,
    Failed,
    Finished,
    FrontendToCore,
    GetStats,
    Stats,
    StepOutputs,
    pack_ints,
    unpack_ints,
)
from protocol.transport import Channel, open_socket

BLOCK_SIZE = 16


def logprob_of(token: int, width: int) -> TokenLogprob:
    """What this core says of a token: its alternatives are the ids after it."""
    return TokenLogprob(-token / 8, 1 + token, [token + i for i in range(width)], [-i / 4 for i in range(width)])


class _Running:
    def __init__(self, identity: bytes, request: AddRequest, eos: int) -> None:
        self.identity = identity
        self.request = request
        prompt = unpack_ints(request.prompt_token_ids).tolist()
        self.num_cached_tokens = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
        self.planned = prompt if request.params.ignore_eos else [*prompt, eos]
        self.num_generated = len(unpack_ints(request.generated_token_ids))

    def prompt_tail(self) -> list[tuple[int, int]]:
        """(position, token) of the prompt's tokens but the first."""
        return list(enumerate(unpack_ints(self.request.prompt_token_ids).tolist()))[1:]

    def next_token(self) -> int:
        token = self.planned[self.num_generated % len(self.planned)]
        self.num_generated += 1
        return token


class FakeCore(threading.Thread):
    """Attributes, written by this thread and read by tests after what they wait for has happened:
    added, aborted: the requests that arrived, and the ids of those that were aborted.
    """

    def __init__(
        self, address: str, *, epoch: int = 0, eos: int, vocab_size: int = 640, max_model_len: int = 512
    ) -> None:
        super().__init__(name="fake core", daemon=True)
        self.added: list[AddRequest] = []
        self.aborted: list[int] = []
        self.protocol_version = PROTOCOL_VERSION
        self.epoch = epoch
        self.step_seconds = 0.0
        # Set by tests: whether it says that it is ready, whether it makes steps, and what it refuses requests with.
        self.may_be_ready = threading.Event()
        self.may_step = threading.Event()
        # With a semaphore here, one step for each release of it.
        self.permits: threading.Semaphore | None = None
        self.failure: Failed | None = None
        self.fail_after: int | None = None
        self._eos = eos
        self._engine = EngineInfo("core", max_model_len, vocab_size, BLOCK_SIZE, 64)
        self._stopping = threading.Event()
        self._running: dict[tuple[bytes, int], _Running] = {}
        self._waiting: list[bytes] = []
        self._num_steps = 0
        self._context = zmq.Context()
        self._channel = Channel(open_socket(self._context, zmq.ROUTER, bind=address), FrontendToCore)
        self.may_be_ready.set()
        self.may_step.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            idle = not self._running or not self.may_step.is_set()
            received = self._channel.receive(5 if idle else 0)
            while received is not None:
                self._handle(*received)
                received = self._channel.receive()
            if self._waiting and self.may_be_ready.is_set():
                for identity in self._waiting:
                    self._send(identity, CoreReady(self.protocol_version, self.epoch, self._engine))
                self._waiting = []
            may_step = self._running and self.may_step.is_set()
            if may_step and (self.permits is None or self.permits.acquire(timeout=0.005)):
                self._step()
                time.sleep(self.step_seconds)
        self._channel.close()
        self._context.term()

    def stop(self) -> None:
        """Closes its socket, as a process that ends does."""
        self._stopping.set()
        self.join()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _handle(self, identity: bytes, message: object) -> None:
        if isinstance(message, CoreHello):
            self._waiting.append(identity)
        elif isinstance(message, AddRequest):
            self.added.append(message)
            if self.failure is not None and self.fail_after is None:
                self._fail(identity, message.request_id)
            else:
                self._running[identity, message.request_id] = _Running(identity, message, self._eos)
        elif isinstance(message, AbortRequests):
            for request_id in unpack_ints(message.request_ids, "<i8").tolist():
                self.aborted.append(request_id)
                self._running.pop((identity, request_id), None)
        elif isinstance(message, GetStats):
            stats = Stats(message.query_id, num_running=len(self._running), num_steps=self._num_steps)
            self._send(identity, stats)
        else:
            raise AssertionError(message)

    def _fail(self, identity: bytes, request_id: int) -> None:
        assert self.failure is not None
        self._send(identity, Failed(request_id, self.failure.kind, self.failure.message, self.failure.param))

    def _step(self) -> None:
        self._num_steps += 1
        for identity in {running.identity for running in self._running.values()}:
            rows: list[tuple[int, int]] = []
            finished: list[Finished] = []
            logprobs: list[tuple[int, TokenLogprob]] = []
            prompt_logprobs: list[PromptLogprobs] = []
            for key, running in list(self._running.items()):
                if key[0] != identity:
                    continue
                request_id, params = running.request.request_id, running.request.params
                if self.failure is not None and self.fail_after == running.num_generated:
                    del self._running[key]
                    self._fail(identity, request_id)
                    continue
                if not running.num_generated and params.prompt_logprobs is not None:
                    entries = [(i, logprob_of(token, params.prompt_logprobs)) for i, token in running.prompt_tail()]
                    for half in (entries[:2], entries[2:]):  # as a prompt comes that is computed in chunks
                        prompt_logprobs += [PromptLogprobs(request_id, table) for table in pack_logprobs(half)]
                token = running.next_token()
                if params.logprobs is not None:
                    # The worker gives all rows as many as the one that wants most.
                    logprobs.append((len(rows), logprob_of(token, 20)))
                rows.append((request_id, token))
                end: tuple[str, int | None] | None = None
                if token == self._eos and not params.ignore_eos:
                    end = ("stop", None)
                elif token in params.stop_token_ids:
                    end = ("stop", token)
                elif running.num_generated == params.max_tokens:
                    end = ("length", None)
                if end is not None:
                    finished.append(Finished(request_id, end[0], end[1], running.num_cached_tokens))
                    del self._running[key]
            ids, tokens = [row[0] for row in rows], [row[1] for row in rows]
            packed = pack_ints(ids, "<i8"), pack_ints(tokens)
            self._send(identity, StepOutputs(self.epoch, *packed, finished, pack_logprobs(logprobs), prompt_logprobs))

    def _send(self, identity: bytes, message: object) -> None:
        self._channel.send(message, identity)
