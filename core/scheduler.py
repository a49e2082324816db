"""Decides what each step computes: continuous batching with chunked prefill under a token budget.

Read `schedule` first: decodes go first, then running prefills, then admissions. `apply` takes a step's tokens back.
The scheduler owns requests, slots, blocks and the prefix cache; it knows nothing of sockets, text, tensors or clocks.
It may be asked for step N+1 before step N's tokens are applied: lengths are known in advance, tokens are not needed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from core.block_pool import BlockPool
from core.block_sharing import BlockSharing
from core.client_shares import ClientShares
from core.counters import Counters
from core.endings import ending_of, why_no_token
from core.grammar import GrammarState
from core.logit_edits import logit_edits
from core.prefill_budget import PrefillBudget, num_pairs
from core.prefix_cache import PrefixCache
from core.request import Phase, Request
from core.results import StepEffects
from core.slots import SlotTable
from core.step_plan import LayeredChunk, PrefillChunks, StepInFlight
from core.step_time import StepTimeModel, StepWork
from core.waiting_queue import WaitingQueue
from protocol.messages import (
    AddRequest,
    AdmittedSlot,
    Failed,
    Stats,
    Step,
    StepResult,
    pack_ints,
    unpack_ints,
)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    eos_token_ids: tuple[int, ...]
    max_client_share: float = 1.0


class Scheduler:
    """The policy. One total order, (priority, arrival), decides who goes first and who is preempted last. When blocks
    are short, those of a client that holds more than its share come after those of others: see `ClientShares`.

    With a `step_time` model, prefill beside decodes is bounded by the time that it predicts.
    """

    def __init__(self, config: SchedulerConfig, epoch: int = 0, step_time: StepTimeModel | None = None) -> None:
        self.config = config
        self.epoch = epoch
        self.step_time = step_time
        self.table = SlotTable(config.max_num_seqs, config.max_model_len, config.block_size)
        self.cache = PrefixCache()
        self.sharing = BlockSharing(self.table, self.cache, config.block_size, config.enable_prefix_caching)
        self.pool = BlockPool(config.num_blocks, on_reuse=self.cache.forget)
        self._requests: dict[tuple[int, int], Request] = {}
        self._waiting = WaitingQueue()
        self._shares = ClientShares(config.max_client_share, self.pool.num_usable)
        self._running: list[Request] = []  # in a slot, in order
        self._prefilling: list[Request] = []  # those of them with known tokens still to compute, in order
        self._layered: LayeredChunk | None = None  # what of a prompt is being computed layer by layer
        self._decode_slots: np.ndarray | None = None  # None when the set of decoding requests changed
        self._sent_decode_slots: np.ndarray | None = None
        self._released_slots: list[int] = []
        self._in_flight: deque[StepInFlight] = deque()
        self._num_arrivals = 0
        self._counters = Counters()

    # --- requests in and out --------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, frontend_index: int, message: AddRequest, now: float = 0.0) -> None:
        """Queues a request, or if it has a grammar, lets it wait for `start_grammar`.

        `now`, here and in `schedule`, is the time in seconds, of which queue times are made.

        Raises:
            ValueError: its prompt does not fit, or its id is in use.
        """
        request = Request(frontend_index, message, self._num_arrivals, self.config.max_model_len)
        if not 1 <= request.num_prompt_tokens < self.config.max_model_len:
            raise ValueError(
                f"prompt must have 1 to {self.config.max_model_len - 1} tokens, got {request.num_prompt_tokens}"
            )
        if len(request.token_ids) >= request.total_limit:
            raise ValueError(
                f"{len(request.token_ids)} tokens of prompt and answer leave nothing of the {request.total_limit} "
                "that there may be"
            )
        if request.key in self._requests:
            raise ValueError(f"request id {request.request_id} is already in use")
        request.queued_at = now
        self._num_arrivals += 1
        self._counters.prompt_tokens += request.num_prompt_tokens
        self._requests[request.key] = request
        self._shares.add(request)
        if request.awaits_grammar:
            self._waiting.hold(request)
        else:
            self._waiting.push(request)

    def start_grammar(self, key: tuple[int, int], grammar: GrammarState | str) -> Failed | None:
        """Queues a request that has waited for its grammar, or ends it if that cannot be compiled.

        Its place in the order is that of its arrival. One that has ended meanwhile is left alone.
        """
        request = self._requests.get(key)
        if request is None or not request.awaits_grammar:
            return None
        if isinstance(grammar, str):
            self._finish(request)
            self._counters.finished += 1
            return Failed(
                request.request_id,
                "invalid_request",
                f"structured_outputs cannot be followed: {grammar}",
                "structured_outputs",
            )
        try:
            for token in request.token_ids[request.num_prompt_tokens :].tolist():
                grammar.advance(token)
        except ValueError as error:
            return self.fail(request, f"structured_outputs cannot be followed any further: {error}")
        request.awaits_grammar, request.grammar = False, grammar
        self._waiting.release(request)
        return None

    def fail(self, request: Request, message: str) -> Failed:
        """Ends a request that cannot be computed."""
        self._finish(request)
        self._counters.finished += 1
        return Failed(request.request_id, "failed", message)

    def abort(self, frontend_index: int, request_ids: Iterable[int]) -> None:
        """Ends requests that nobody waits for any more. Ids that are unknown or finished are ignored."""
        for request_id in request_ids:
            request = self._requests.get((frontend_index, request_id))
            if request is not None:
                self._finish(request)
                self._counters.aborted += 1

    def abort_frontend(self, frontend_index: int) -> None:
        self.abort(frontend_index, [request_id for index, request_id in self._requests if index == frontend_index])

    # --- when the worker is lost -----------------------------------------------------------------------------------

    def restart(self, epoch: int) -> list[Request]:
        """The worker is gone, and the next one will know nothing: what it computed waits again, in its order.

        Tokens of steps in flight are lost and will be drawn again. Returns the requests that may have been in them.
        """
        computed = list(self._running)
        for step in self._in_flight:
            for request in step.detached.values():
                request.num_in_flight = 0
                if request.phase is Phase.WAITING and request not in computed:
                    computed.append(request)
        self._in_flight.clear()
        for request in list(self._running):
            self._leave_slot(request, Phase.WAITING)
            self._waiting.push(request)
        self.cache.clear()
        self._released_slots = []
        self._decode_slots = self._sent_decode_slots = None
        self.epoch = epoch
        return computed

    def admit_only(self, requests: Collection[Request] | None) -> None:
        """Takes all but these requests out of their slots, and lets no others in. None ends that."""
        self._waiting.restrict(requests)
        if requests is not None:
            for request in [running for running in self._running if running not in requests]:
                self._preempt(request)

    def num_known(self, request: Request) -> int:
        """Tokens of a request whose ids are known, its prompt's included."""
        return int(self.table.num_known[request.slot]) if request.slot >= 0 else len(request.token_ids)

    def stats(self, query_id: int = 0) -> Stats:
        num_running = len(self._running)
        num_waiting = len(self._requests) - num_running
        return self._counters.stats(query_id, num_running, num_waiting, self.pool, self.cache)

    # --- a step out -----------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> Step | None:
        """The next step, or None if there is nothing to compute. What it returns must be sent."""
        self._preempt_until_decodes_fit()
        block_slots, block_positions, block_ids = self._extend_decodes()
        decode_slots = self._take_decodes()
        context = int(self.table.num_computed[decode_slots].sum())
        budget = self._prefill_budget(len(decode_slots), context)
        chunks = PrefillChunks()
        admitted = self._take_prefills(budget, chunks)
        for new in admitted:
            self._end_queueing(self.table.requests[new.slot], now)
        if not len(decode_slots) and not chunks.slots:
            return None
        rows = decode_slots
        if any(chunks.samples):
            sampling = [slot for slot, samples in zip(chunks.slots, chunks.samples, strict=True) if samples]
            rows = np.concatenate([decode_slots, np.array(sampling, np.int64)])
        masked_rows = np.flatnonzero(self.table.has_grammar[rows])
        step = Step(
            step_id=self._counters.num_steps,
            epoch=self.epoch,
            released_slots=pack_ints(self._released_slots),
            admitted=admitted,
            new_block_slots=pack_ints(block_slots),
            new_block_positions=pack_ints(block_positions),
            new_block_ids=pack_ints(block_ids),
            decode_slots=None if decode_slots is self._sent_decode_slots else pack_ints(decode_slots),
            prefill_slots=pack_ints(chunks.slots),
            prefill_lens=pack_ints(chunks.lens),
            prefill_samples=bytes(chunks.samples),
            prefill_first_layer=chunks.first_layer,
            prefill_num_layers=chunks.num_layers,
            needs_masks=len(masked_rows) > 0,
        )
        work = StepWork(context, budget.num_tokens, budget.num_pairs, is_layered=chunks.num_layers > 0)
        generations = self.table.generation[rows]
        self._in_flight.append(StepInFlight(step.step_id, rows, generations, work, chunks.measured, masked_rows))
        self._sent_decode_slots = decode_slots
        self._released_slots = []
        self._counters.num_steps += 1
        self._counters.computed_tokens += len(decode_slots) + budget.num_tokens
        return step

    def take_masked_rows(self) -> tuple[int, list[tuple[int, Request, int]]] | None:
        """A step that waits for masks that can be made now, as all tokens before it are back; None if none does.

        Masks are due before the next step is sent. They are those of (slot, request, number of its known tokens) each;
        rows whose requests have ended are left out, those of preempted ones are not: their tokens will be kept.
        """
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.masks_are_sent or not len(step.masked_rows):
            return None
        step.masks_are_sent = True
        table, rows = self.table, []
        for row in step.masked_rows.tolist():
            slot = int(step.slots[row])
            if row in step.detached:
                request = step.detached[row]
                if request.phase is not Phase.FINISHED:
                    rows.append((slot, request, len(request.token_ids)))
            elif table.generation[slot] == step.generations[row]:
                owner = table.requests[slot]
                assert owner is not None
                rows.append((slot, owner, int(table.num_known[slot])))
        return step.step_id, rows

    def _end_queueing(self, request: Request | None, now: float) -> None:
        assert request is not None
        if request.queued_at is not None:
            self._counters.queue_time.observe(now - request.queued_at)
            # After a preemption it waits for blocks, not for its turn.
            request.queued_at = None

    def _decoding_slots(self) -> np.ndarray:
        if self._decode_slots is None:
            slots = [request.slot for request in self._running if request.phase is Phase.DECODING]
            self._decode_slots = np.array(slots, np.int64)
        return self._decode_slots

    def _slots_without_room(self) -> np.ndarray:
        """Decoding slots whose next token starts a new block."""
        slots = self._decoding_slots()
        return slots[self.table.num_computed[slots] >= self.table.capacity[slots]]

    def _preempt_until_decodes_fit(self) -> None:
        while len(self._slots_without_room()) > self.pool.num_free:
            self._preempt(self._shares.victim(self._running))

    def _extend_decodes(self) -> tuple[np.ndarray, list[int], list[int]]:
        """Gives a block to each decoding slot that needs one: (slots, positions in their tables, block ids)."""
        slots = self._slots_without_room()
        blocks = self.pool.allocate(len(slots))
        positions = []
        for slot, block in zip(slots.tolist(), blocks, strict=True):
            request = self.table.requests[slot]
            assert request is not None
            positions.append(len(request.block_ids))
            request.block_ids.append(block)
        self.table.capacity[slots] += self.config.block_size
        return slots, positions, blocks

    def _take_decodes(self) -> np.ndarray:
        """Every decoding request computes one token."""
        slots = self._decoding_slots()
        if not len(slots):
            return slots
        table = self.table
        table.num_computed[slots] += 1
        for slot in slots[table.num_computed[slots] + 1 >= table.total_limit[slots]].tolist():
            self._set_phase(table.requests[slot], Phase.DRAINING)
        return slots

    def _prefill_budget(self, num_decodes: int, context: int) -> PrefillBudget:
        """Prefill takes the tokens that decodes leave, and while any decode, no longer than they should wait."""
        tokens = self.config.max_num_batched_tokens - num_decodes
        if self.step_time is None or not num_decodes:
            return PrefillBudget(tokens, self.config.block_size)
        return self.step_time.prefill_budget(tokens, self.config.block_size, num_decodes, context, self.queued_work())

    def queued_work(self) -> StepWork:
        """Known tokens that are still to be computed, by requests that wait or prefill; some may turn out cached."""
        tokens, pairs = self._waiting.num_tokens, self._waiting.num_pairs
        for request in self._prefilling:
            start = int(self.table.num_computed[request.slot])
            length = int(self.table.num_known[request.slot]) - start
            tokens += length
            pairs += num_pairs(start, length)
        return StepWork(0, tokens, pairs)

    def _take_prefills(self, budget: PrefillBudget, chunks: PrefillChunks) -> list[AdmittedSlot]:
        """Requests whose prompt was cut off by an earlier step's budget, and new ones, in the one order of them all."""
        table = self.table
        admitted: list[AdmittedSlot] = []
        if self._layered is not None and self._layered.is_due:
            self._layered.is_due = False
            self._prefill_layers(self._layered, budget, chunks)
            return admitted
        for request in self._prefilling.copy():
            self._admit(budget, chunks, admitted, before=request)
            if self._layered is not None and request is self._layered.request:
                # Where something more urgent came in between, it goes on with the next step.
                self._layered.is_due = budget.num_tokens > 0
                if not self._layered.is_due:
                    self._prefill_layers(self._layered, budget, chunks)
                return admitted
            start = int(table.num_computed[request.slot])
            length, in_layers = self._next_chunk(request, start, int(table.num_known[request.slot]) - start, budget)
            if not length:
                return admitted
            self._compute(request, start, length, in_layers, budget, chunks)
        self._admit(budget, chunks, admitted)
        return admitted

    def _admit(
        self,
        budget: PrefillBudget,
        chunks: PrefillChunks,
        admitted: list[AdmittedSlot],
        before: Request | None = None,
    ) -> None:
        """Takes waiting requests in order, of those that go before `before`, while there are slots, blocks, budget."""
        # Each decoding request may need a block soon; taking the last ones now would mean preempting at once.
        reserve = len(self._decoding_slots())
        while not budget.is_spent and self.table.num_free:
            over = self._shares.clients_over(self._running) if self._blocks_are_short(reserve) else ()
            request = self._waiting.first(over)
            if request is None:
                break
            if before is not None and request.order > before.order:
                break
            if request.num_in_flight:
                break  # preempted with tokens still to come back, one of which may end it
            if reserve + 1 > self.pool.num_free:
                break  # it needs a block at least; looking up how many costs more the longer the prompt
            num_blocks = -(-len(request.token_ids) // self.config.block_size)
            cached = self.sharing.find(request)
            num_revived = sum(map(self.pool.is_free, cached))
            if num_blocks - len(cached) + num_revived + reserve > self.pool.num_free:
                break
            start = len(cached) * self.config.block_size
            length, in_layers = self._next_chunk(request, start, len(request.token_ids) - start, budget)
            if not length:
                break
            self._waiting.pop(over)
            self.pool.share(cached)
            request.block_ids = cached + self.pool.allocate(num_blocks - len(cached))
            admitted.append(self._start(request, len(cached)))
            self._compute(request, start, length, in_layers, budget, chunks)

    def _blocks_are_short(self, reserve: int) -> bool:
        """Whether what waits does not fit into the blocks that are free, beside `reserve` of them.

        Asked before anyone is admitted, since the head of the queue may always fit into what has just become free.
        """
        return self._waiting.num_tokens > (self.pool.num_free - reserve) * self.config.block_size

    def _start(self, request: Request, num_cached_blocks: int) -> AdmittedSlot:
        num_cached_tokens = num_cached_blocks * self.config.block_size
        if not request.was_admitted:
            request.was_admitted = True
            # A request that another core had begun may find some of its answer, too.
            request.num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)
            self.sharing.count(request)
        slot = self.table.assign(request, num_cached_tokens, num_cached_blocks)
        insort(self._running, request, key=lambda r: r.order)
        self._set_phase(request, Phase.PREFILLING)
        params = request.params
        request.is_measuring = not request.prompt_is_measured
        return AdmittedSlot(
            slot=slot,
            token_ids=pack_ints(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_cached_tokens,
            block_ids=pack_ints(request.block_ids),
            temperature=0.0 if params.is_greedy else params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=request.seed,
            edits=logit_edits(request, self.config.eos_token_ids),
            num_logprobs=params.logprobs,
            num_prompt_logprobs=params.prompt_logprobs if request.is_measuring else None,
        )

    def _next_chunk(self, request: Request, start: int, wanted: int, budget: PrefillBudget) -> tuple[int, bool]:
        """How long the next chunk of a request is, and whether it is computed layer by layer: one at a time is, and
        none of a prompt that is measured, which takes the hidden states of all its tokens."""
        is_measured = request.is_measuring or not request.prompt_is_measured
        if self._layered is None and not is_measured and (length := budget.layered_length(start, wanted)):
            return length, True
        return budget.take(start, wanted), False

    def _compute(
        self, request: Request, start: int, length: int, in_layers: bool, budget: PrefillBudget, chunks: PrefillChunks
    ) -> None:
        """Adds a chunk to the step, or some of its layers."""
        if in_layers:
            self._layered = LayeredChunk(request, start, length, budget.num_layers)
            self._prefill_layers(self._layered, budget, chunks)
        else:
            self._prefill(request, length, chunks)

    def _prefill_layers(self, chunk: LayeredChunk, budget: PrefillBudget, chunks: PrefillChunks) -> None:
        """Adds the next layers of a chunk to the step. With the last of them the chunk is computed."""
        chunks.first_layer = chunk.next_layer
        chunks.num_layers = budget.take_layers(chunk.start, chunk.length, chunk.next_layer, chunk.num_layers)
        chunk.next_layer += chunks.num_layers
        if chunk.next_layer == chunk.num_layers:
            self._layered = None
            self._prefill(chunk.request, chunk.length, chunks)
        else:
            chunks.slots.append(chunk.request.slot)
            chunks.lens.append(chunk.length)
            chunks.samples.append(False)

    def _prefill(self, request: Request, length: int, chunks: PrefillChunks) -> None:
        """Adds the request's next chunk to the step."""
        table, slot = self.table, request.slot
        known = int(table.num_known[slot])
        table.num_computed[slot] += length
        samples = int(table.num_computed[slot]) == known
        chunks.slots.append(slot)
        chunks.lens.append(length)
        chunks.samples.append(samples)
        if request.is_measuring:
            chunks.measured.append((request, int(table.num_computed[slot]) >= request.num_prompt_tokens))
        self.sharing.note_prefilled(slot)
        if samples:
            self._set_phase(request, Phase.DECODING if known + 1 < request.total_limit else Phase.DRAINING)

    def _preempt(self, request: Request) -> None:
        """Takes slot and blocks away; the request is recomputed later, mostly from the prefix cache.

        Its tokens still in flight will be kept: until they are back it is not admitted again.
        """
        for step in self._in_flight:
            mine = (step.slots == request.slot) & (step.generations == self.table.generation[request.slot])
            for row in np.flatnonzero(mine).tolist():
                step.detached[row] = request
                request.num_in_flight += 1
        self._leave_slot(request, Phase.WAITING)
        self._waiting.push(request)
        self._counters.num_preemptions += 1

    # --- a step's tokens back -------------------------------------------------------------------------------------

    def apply(self, result: StepResult, seconds: float | None = None) -> StepEffects:
        """Takes the tokens of the oldest step in flight: extends requests, ends those that are done.

        Rows whose request has left its slot are dropped (it ended in an earlier step), or, if it was preempted, kept.
        `seconds` is how long the step took, where that was measured.
        """
        step = self._in_flight.popleft()
        assert step.step_id == result.step_id, f"result of step {result.step_id}, expected {step.step_id}"
        if self.step_time is not None and seconds is not None:
            self.step_time.observe(step.work, seconds)
        tokens = unpack_ints(result.token_ids)
        effects = StepEffects(result.logprobs)
        for (request, is_end), tokens_of_prompt in zip(step.measured, result.prompt_logprobs, strict=True):
            if request.phase is not Phase.FINISHED:
                request.prompt_is_measured |= is_end
                effects.add_prompt_logprobs(request, tokens_of_prompt)
        live = self.table.generation[step.slots] == step.generations
        if live.all():
            self._apply_rows(step.slots, tokens, effects)
        else:
            self._apply_rows(step.slots[live], tokens[live], effects, np.flatnonzero(live))
        for row, request in step.detached.items():
            self._apply_detached(request, int(tokens[row]), row, effects)
        return effects

    def _apply_rows(
        self, slots: np.ndarray, tokens: np.ndarray, effects: StepEffects, rows: np.ndarray | None = None
    ) -> None:
        table = self.table
        positions = table.num_known[slots]
        table.token_ids[slots, positions] = tokens
        table.num_known[slots] = positions + 1
        self._counters.generation_tokens += len(slots)
        failed = tokens < 0
        ended = failed | (positions + 1 >= table.total_limit[slots])
        ends_at_eos = table.ends_at_eos[slots]
        for eos in self.config.eos_token_ids:
            ended |= ends_at_eos & (tokens == eos)
        # Stop token ids differ by request, so the few rows that have them are looked at one by one.
        ended |= table.has_stop_ids[slots]
        # A grammar is to be told of each token.
        ended |= table.has_grammar[slots]
        self.sharing.register_full(slots)
        sound = ~failed
        keep = sound if failed.any() else None
        effects.add_rows(table.frontend[slots], table.request_id[slots], tokens, keep, rows)
        for row in np.flatnonzero(ended).tolist():
            request = table.requests[slots[row]]
            assert request is not None
            self._end_if_done(request, int(tokens[row]), int(positions[row]) + 1, effects)

    def _apply_detached(self, request: Request, token: int, row: int, effects: StepEffects) -> None:
        request.num_in_flight -= 1
        if request.phase is Phase.FINISHED:
            return
        if token >= 0:
            request.append(token)
            self._waiting.count_token(request)
            self._counters.generation_tokens += 1
            effects.add_row(request.frontend_index, request.request_id, token, row)
        self._end_if_done(request, token, len(request.token_ids), effects)

    def _end_if_done(self, request: Request, token: int, num_tokens: int, effects: StepEffects) -> None:
        if token < 0:
            self.sharing.distrust(request)
            self._fail(request, why_no_token(request), effects)
            return
        if request.grammar is not None:
            try:
                request.grammar.advance(token)
            except ValueError as error:
                self._fail(request, f"structured_outputs cannot be followed any further: {error}", effects)
                return
        ending = ending_of(request, token, num_tokens, self.config.eos_token_ids)
        if ending is not None:
            effects.finish(request, ending.reason, ending.stop_reason, ending.is_complete)
            self._finish(request)
            self._counters.finished += 1

    def _fail(self, request: Request, message: str, effects: StepEffects) -> None:
        effects.fail(request, message)
        self._finish(request)
        self._counters.finished += 1

    # --- shared -----------------------------------------------------------------------------------------------------

    def _set_phase(self, request: Request | None, phase: Phase) -> None:
        assert request is not None
        if Phase.DECODING in (request.phase, phase):
            self._decode_slots = None
        if request.phase is Phase.PREFILLING:
            self._prefilling.remove(request)
        if phase is Phase.PREFILLING:
            insort(self._prefilling, request, key=lambda r: r.order)
        request.phase = phase

    def _leave_slot(self, request: Request, phase: Phase) -> None:
        self.sharing.register_prefilled()
        if self._layered is not None and self._layered.request is request:
            self._layered = None
        self._set_phase(request, phase)
        self._running.remove(request)
        self._released_slots.append(request.slot)
        self.table.release(request)
        # Steps run in the order sent, so the next step may already give these blocks to someone else.
        self.pool.release(request.block_ids)
        request.block_ids = []

    def _finish(self, request: Request) -> None:
        del self._requests[request.key]
        self._shares.remove(request)
        if request.slot >= 0:
            self._leave_slot(request, Phase.FINISHED)
        else:
            self._waiting.forget(request)
        request.phase = Phase.FINISHED
