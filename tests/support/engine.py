"""The core and the worker in one process, without sockets: the real scheduler drives the real runner.

What the processes do in `core.engine` and `worker.main`, in a loop that a test can count in. Everything but the
transport is what serves users.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from threading import Event
from typing import Any

from core.engine import PIPELINE_DEPTH, grammars_of, scheduler_config
from core.masks import MaskMaker
from core.scheduler import Scheduler
from core.step_time import StepTimeModel
from protocol.config import EngineConfig, make_options
from protocol.logprobs import TokenLogprob, unpack_logprobs
from protocol.messages import AddRequest, Failed, Finished, StepOutputs, pack_ints, unpack_ints
from protocol.resolve import resolve
from protocol.sampling import SamplingParams
from worker.startup import make_runner
from worker.step_results import PendingTokens


def make_config(model: Path | str, **options: Any) -> EngineConfig:
    """One thread, unless `options` say otherwise: see tests/worker/conftest.py."""
    return resolve(make_options({"model": str(model), "num_threads": 1, **options}), Path("/nonexistent"))


class InProcessEngine:
    """Generates for a list of prompts; keeps its prefix cache and statistics between calls.

    No times are measured, so that the same calls make the same steps: prefill beside decodes is bounded only by what a
    given `step_time` model has been taught.
    """

    def __init__(self, model: Path | str, step_time: StepTimeModel | None = None, **options: Any) -> None:
        self.config = make_config(model, **options)
        self.runner, ready = make_runner(self.config)
        self.scheduler = Scheduler(scheduler_config(self.config, ready), step_time=step_time)
        self.depth = PIPELINE_DEPTH if self.config.options.async_scheduling else 1
        self.finished: dict[int, str] = {}
        self.ended: dict[int, Finished] = {}
        # Of the last call, by prompt: an entry a token, and by position in the prompt.
        self.logprobs: list[list[TokenLogprob]] = []
        self.prompt_logprobs: list[dict[int, TokenLogprob]] = []
        self._next_id = 0
        self._grammar_is_ready = Event()
        self._grammars = grammars_of(self.config, self._grammar_is_ready.set)
        self._masks = MaskMaker(self.config.model_config.vocab_size, self.config.model_config.eos_token_ids)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        bad_words: list[list[list[int]]] | None = None,
        grammars: list[str | None] | None = None,
    ) -> list[list[int]]:
        """Token ids of each prompt's answer, all prompts submitted together. Bad words come as token ids, and grammars
        in llguidance's form, as from a frontend."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        first = self._next_id
        tokens: dict[int, list[int]] = {}
        words = bad_words or [[]] * len(prompts)
        self.logprobs, self.prompt_logprobs = [[] for _ in prompts], [{} for _ in prompts]
        for prompt, sampling, sequences, grammar in zip(
            prompts, each, words, grammars or [None] * len(prompts), strict=True
        ):
            tokens[self._next_id] = []
            request = AddRequest(
                self._next_id,
                pack_ints(prompt),
                sampling,
                bad_words=[pack_ints(ids) for ids in sequences],
                grammar=grammar,
            )
            self.scheduler.add(0, request)
            if grammar is not None:
                self.start_grammar((0, self._next_id), grammar)
            self._next_id += 1
        for message in self.run():
            assert isinstance(message, StepOutputs), message
            request_ids = unpack_ints(message.request_ids, "<i8").tolist()
            for request_id, token in zip(request_ids, unpack_ints(message.token_ids).tolist()):
                tokens[request_id].append(token)
            for table in message.logprobs:
                for row, measured in unpack_logprobs(table):
                    self.logprobs[request_ids[row] - first].append(measured)
            for stretch in message.prompt_logprobs:
                self.prompt_logprobs[stretch.request_id - first].update(unpack_logprobs(stretch.tokens))
            for finished in message.finished:
                self.finished[finished.request_id] = finished.reason
                self.ended[finished.request_id] = finished
        return [tokens[request_id] for request_id in range(first, self._next_id)]

    def start_grammar(self, key: tuple[int, int], grammar: str) -> None:
        """Lets a request go on that waits for its grammar."""
        failed = self.compile_grammar(key, grammar)
        assert failed is None, failed

    def compile_grammar(self, key: tuple[int, int], grammar: str) -> Failed | None:
        self._grammar_is_ready.clear()
        self._grammars.compile(key, grammar)
        assert self._grammar_is_ready.wait(60)
        ((compiled_for, compiled),) = self._grammars.take_ready()
        assert compiled_for == key
        return self.scheduler.start_grammar(key, compiled)

    def run(self):
        """Runs steps until nothing is left, as the two processes would; yields what the frontend would get."""
        pending: deque[PendingTokens] = deque()
        while True:
            self._finish_masked(pending)
            while self.scheduler.num_in_flight < self.depth:
                step = self.scheduler.schedule()
                if step is None:
                    break
                launched = self.runner.execute(step)
                if launched is not None:
                    pending.append(launched)
                self._finish_masked(pending)
            if not pending:
                return
            done = pending.popleft()
            effects = self.scheduler.apply(done.result())
            for _, message in effects.messages(0):
                yield message
            self.scheduler.sharing.register_prefilled()

    def _finish_masked(self, pending: deque[PendingTokens]) -> None:
        masked = self.scheduler.take_masked_rows()
        if masked is not None:
            pending.append(self.runner.finish(self._masks.masks(*masked)))
