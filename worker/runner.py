"""Runs steps: takes what changed to the device, launches the step's programs, and brings the tokens back.

`execute` launches a step and returns at once; the tokens are read later, when the device has them. On a GPU a step is
padded to a size whose graph was captured: one graph for what it changes, one for the forward pass and one for the
head, a single one for the latter two in small decode steps, and a graph a layer beside those of a decode step where a
prompt is computed layer by layer. The largest steps run eagerly, where launches hide behind the work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial

import numpy as np
import torch

from protocol.config import EngineConfig
from protocol.messages import Step, StepMasks, unpack_ints
from worker.batch_state import RING_SIZE, SMALL_CHANGES, BatchState
from worker.graphs import (
    MOST_ROWS_OF_ONE_GRAPH,
    GraphCache,
    batch_buckets,
    bucket_for,
    layered_buckets,
    prefill_only_buckets,
    token_buckets,
)
from worker.kernels import Ops
from worker.models import Qwen3
from worker.sampler import SamplingVariant
from worker.slot_edits import SlotEdits
from worker.step_inputs import StepInputs, StepRows, pad
from worker.step_program import ForwardShape, StepProgram
from worker.step_results import PackedRows, PendingTokens, PromptStretch, StepResults

# To be run in inference mode.
WarmUp = Callable[[], None]


class GraphKind(Enum):
    """What a graph holds, on which its size depends."""

    PASS = auto()  # a forward pass, with or without the head
    PART = auto()  # a layer, a head, a step's changes


@dataclass(frozen=True, slots=True)
class Capture:
    """A graph to be made."""

    key: Hashable
    launch: Callable[[], None]
    kind: GraphKind
    warm_up: bool = True  # False where another capture's has done all of it, or a small step


@dataclass(frozen=True, slots=True)
class Head:
    """What is left of a step whose forward pass has been launched: drawing tokens and sending them back."""

    step: Step
    padded_rows: int
    sampling_slots: np.ndarray
    variant: SamplingVariant
    prompt_logprobs: list[PackedRows]


class StepRunner:
    """Owns the batch's state on the device and executes steps in the order given.

    A step that needs masks is held between its two parts until they come, which must be before the next step.
    """

    def __init__(self, config: EngineConfig, model: Qwen3, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        self._on_gpu = device.type == "cuda"
        max_rows, max_tokens = config.options.max_num_seqs, config.options.max_num_batched_tokens
        self._max_tokens = max_tokens
        self._max_model_len = config.max_model_len
        self._num_layers = config.model_config.num_layers
        self._row_buckets = batch_buckets(max_rows)
        # The other backends need the number of decode rows on the host, so their steps with prefill run eagerly.
        can_capture = config.attention_backend == "triton"
        self._token_buckets = token_buckets(max_tokens) if can_capture else []
        self._prefill_only_buckets = prefill_only_buckets(self._token_buckets)
        may_layer = can_capture and config.options.max_step_ms > 0 and self._num_layers > 1
        self._layered_buckets = layered_buckets(min(max_tokens, config.max_model_len)) if may_layer else []
        vocab_size, eos = config.model_config.vocab_size, config.model_config.eos_token_ids
        self.state = BatchState(max_rows, config.max_model_len, config.block_size, device, ops)
        self._edits = SlotEdits(max_rows, vocab_size, len(eos), device)
        self._inputs = StepInputs(max_rows, max_tokens, device)
        self.program = StepProgram(config, model, ops, self.state, self._edits.tables, self._inputs, device, dtype)
        self._results = StepResults(self.program, max_rows, vocab_size, device)
        self._measure_largest = partial(self._results.run_largest, config.model_config.hidden_size, dtype)
        self._decode_slots = np.empty(0, np.int32)
        self._sent_decode_rows: int | None = None  # rows of the decode step whose inputs are on the device
        self._graphs: GraphCache | None = None
        self._held: Head | None = None

    # --- a step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, step: Step) -> PendingTokens | None:
        """Launches a step. Its tokens come back as one int32 for each row that samples, in row order.

        Of a step that needs masks, launches the forward pass, and returns None: `finish` does the rest.
        """
        assert self._held is None, f"step {step.step_id} came before the masks of the step before"
        self._bring_changes(step)
        for admitted in step.admitted:
            self._edits.admit(admitted)
        decode_changed = step.decode_slots is not None
        if step.decode_slots is not None:
            self._decode_slots = unpack_ints(step.decode_slots)
        if step.prefill_num_layers:
            return self._execute_layered(step)
        return self._execute_mixed(step) if step.prefill_slots else self._execute_decode(step, decode_changed)

    @torch.inference_mode()
    def finish(self, masks: StepMasks) -> PendingTokens:
        """Launches what is left of the step that is held."""
        head, self._held = self._held, None
        assert head is not None, f"masks of step {masks.step_id}, and none waits"
        assert head.step.step_id == masks.step_id, f"masks of step {masks.step_id} for step {head.step.step_id}"
        self._edits.set_masks(masks)
        self._launch_head(head)
        return self._send_back(head)

    def reset(self) -> None:
        """Forgets all requests. Waits for what has been launched."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._held = None
        self._decode_slots = np.empty(0, np.int32)
        self._sent_decode_rows = None
        self.state.forget_all()

    def _bring_changes(self, step: Step) -> None:
        """Before the step runs, what it changes comes to its slots; in most steps that is nothing, or little."""
        state = self.state
        count = state.stage_changes(step)
        if not count:
            return
        if count > SMALL_CHANGES or not self._replay(("changes", state.staging.turn)):
            state.bring_changes(state.staging.turn, count)
        state.staging.note_sent()

    def _execute_decode(self, step: Step, changed: bool) -> PendingTokens | None:
        """A step of decode rows alone. One equal to the last step copies nothing to the device."""
        slots = self._decode_slots
        self.state.host_lens[slots] += 1
        rows = self._padded_rows(len(slots))
        if changed or self._sent_decode_rows != rows:
            self._inputs.send(self._decode_rows(slots, rows))
            self._sent_decode_rows = rows
        shape, head = self._decode_shape(rows), Head(step, rows, slots, self._variant(slots), [])
        # Steps that need masks are edited, and one graph for both parts is of those that are not.
        if self._replay((shape, head.variant)):
            return self._send_back(head)
        if not self._replay(shape):
            self.program.forward(shape)
        return self._finish_or_hold(head)

    def _execute_mixed(self, step: Step) -> PendingTokens | None:
        """A step with prefill rows."""
        state, decode = self.state, self._decode_slots
        state.host_lens[decode] += 1
        prefill, lens = unpack_ints(step.prefill_slots), unpack_ints(step.prefill_lens)
        starts = state.host_lens[prefill].copy()
        state.host_lens[prefill] += lens
        chunks = [
            state.known_tokens[slot][start : start + length]
            for slot, start, length in zip(prefill.tolist(), starts.tolist(), lens.tolist(), strict=True)
        ]
        query_start = np.concatenate([np.arange(len(decode)), len(decode) + np.cumsum(np.concatenate([[0], lens]))])
        samples = np.frombuffer(step.prefill_samples, np.bool_)
        last_tokens = query_start[len(decode) + 1 :] - 1
        row_slots = np.concatenate([decode, prefill])
        sample_slots = np.concatenate([decode, prefill[samples]])
        sample_tokens = np.concatenate([np.arange(len(decode)), last_tokens[samples]])
        num_tokens, sampling_rows = int(query_start[-1]), self._padded_rows(len(sample_slots))
        bucket = bucket_for(self._token_buckets, num_tokens) if self._graphs is not None else None
        if bucket is None:
            shape = ForwardShape(
                num_decode_rows=len(decode),
                num_rows=len(row_slots),
                num_tokens=num_tokens,
                num_sampling_rows=sampling_rows,
                max_query_len=int(lens.max()),
                max_kv_len=int(state.host_lens[row_slots].max()),
            )
        else:
            shape = self._mixed_shape(bucket, prefill_only=not len(decode) and bucket in self._prefill_only_buckets)
        self._inputs.send(
            StepRows(
                row_slots=pad(row_slots, shape.num_rows, state.null_slot),
                query_start=pad(query_start, shape.num_rows + 1, num_tokens),
                num_decode_rows=len(decode),
                sample_slots=pad(sample_slots, sampling_rows, state.null_slot),
                sample_tokens=pad(sample_tokens, shape.num_sampling_rows, 0),
                prefill_tokens=chunks,
            )
        )
        self._sent_decode_rows = None
        stretches = self._prompt_stretches(prefill, starts, query_start[len(decode) :])
        packed: list[PackedRows] = []
        if stretches:
            # They need all hidden states, which a graph does not keep: the step runs kernel by kernel, at that size.
            packed = self._results.measure_prompts(self.program.forward(shape), stretches)
        elif not self._replay(shape):
            self.program.forward(shape)
        return self._finish_or_hold(Head(step, sampling_rows, sample_slots, self._variant(sample_slots), packed))

    def _execute_layered(self, step: Step) -> PendingTokens | None:
        """The decode rows, then some layers of one prefill row, which may sample when its last layer is done.

        In this order, since the prefill row may find a block in the prefix cache that a decode row of this step fills.
        """
        state, decode, layered = self.state, self._decode_slots, self.program.layered
        (slot,), (length,) = unpack_ints(step.prefill_slots).tolist(), unpack_ints(step.prefill_lens).tolist()
        state.host_lens[decode] += 1
        sample_slots = np.append(decode, slot) if step.prefill_samples[0] else decode
        rows, sampling_rows = self._padded_rows(len(decode)), self._padded_rows(len(sample_slots))
        inputs = self._decode_rows(decode, rows)
        self._inputs.send(replace(inputs, sample_slots=pad(sample_slots, sampling_rows, state.null_slot)))
        self._sent_decode_rows = rows if len(sample_slots) == len(decode) else None
        if len(decode):
            shape = self._decode_shape(rows)
            if not self._replay(shape):
                self.program.forward(shape)
        first, end = step.prefill_first_layer, step.prefill_first_layer + step.prefill_num_layers
        if first == 0:
            start = int(state.host_lens[slot])
            tokens = state.known_tokens[slot][start : start + length]
            bucket = bucket_for(self._layered_buckets, length) if self._graphs is not None else None
            layered.begin(slot, tokens, start + length, bucket or length)
        layered.resume()
        for layer in range(first, end):
            if not self._replay(("layer", layered.num_tokens, layer)):
                self.program.run_layer(layer)
        if end == self._num_layers:
            layered.end()
            state.host_lens[slot] += length
        if step.prefill_samples[0]:
            self.program.sample_layered(len(decode))
        return self._finish_or_hold(Head(step, sampling_rows, sample_slots, self._variant(sample_slots), []))

    def _finish_or_hold(self, head: Head) -> PendingTokens | None:
        if head.step.needs_masks:
            self._held = head
            return None
        self._launch_head(head)
        return self._send_back(head)

    def _launch_head(self, head: Head) -> None:
        if head.padded_rows and not self._replay((head.padded_rows, head.variant)):
            self.program.head(head.padded_rows, head.variant)

    def _send_back(self, head: Head) -> PendingTokens:
        slots = head.sampling_slots
        wanted = self._wanted_logprobs(slots, head.variant)
        return self._results.send_back(head.step, len(slots), wanted, head.prompt_logprobs)

    def _wanted_logprobs(self, slots: np.ndarray, variant: SamplingVariant) -> np.ndarray | None:
        return self.state.host_logprobs[slots] if variant is SamplingVariant.LOGPROBS else None

    def _replay(self, key: Hashable) -> bool:
        return self._graphs is not None and self._graphs.replay(key)

    def _padded_rows(self, rows: int) -> int:
        return bucket_for(self._row_buckets, rows) or rows if self._on_gpu and rows else rows

    def _variant(self, sampling_slots: np.ndarray) -> SamplingVariant:
        return SamplingVariant(self.state.host_variant[sampling_slots].max(initial=0))

    def _prompt_stretches(self, slots: np.ndarray, starts: np.ndarray, query_start: np.ndarray) -> list[PromptStretch]:
        """Of the prefill rows, what is to be measured of the prompts: each token's successor in the prompt."""
        state = self.state
        stretches = []
        for slot, start, first, end in zip(slots.tolist(), starts.tolist(), query_start[:-1], query_start[1:]):
            wanted = state.host_prompt_logprobs[slot]
            if wanted >= -1:
                last = max(start, min(start + int(end - first), int(state.host_prompt_lens[slot]) - 1))
                positions = np.arange(start + 1, last + 1)
                token_ids = state.known_tokens[slot][start + 1 : last + 1]
                stretches.append(PromptStretch(int(first), positions, token_ids, int(wanted)))
        return stretches

    # --- shapes and inputs of padded steps --------------------------------------------------------------------------

    def _decode_shape(self, rows: int) -> ForwardShape:
        return ForwardShape(rows, rows, rows, rows, 1, self._max_model_len)

    def _mixed_shape(self, tokens: int, prefill_only: bool) -> ForwardShape:
        """Any mixture of rows in `tokens` tokens, of which as many are sampled from as there are rows."""
        rows = min(tokens, self.state.num_slots)
        return ForwardShape(0 if prefill_only else None, rows, tokens, rows, tokens, self._max_model_len)

    def _mixed_shapes(self) -> list[ForwardShape]:
        """Those of steps with prefill that are captured, largest first."""
        sizes = [(tokens, True) for tokens in self._prefill_only_buckets]
        sizes += [(tokens, False) for tokens in self._token_buckets]
        return [self._mixed_shape(tokens, prefill_only) for tokens, prefill_only in sorted(sizes, reverse=True)]

    def _decode_rows(self, slots: np.ndarray, rows: int) -> StepRows:
        counting = np.arange(rows + 1, dtype=np.int32)
        padded = pad(slots, rows, self.state.null_slot)
        return StepRows(padded, counting, rows, padded, counting[:-1])

    def _null_rows(self, rows: int, tokens: int, decode_rows: int = 0) -> StepRows:
        """Rows of the null slot: decode rows, then rows that share the other tokens as the context length allows."""
        slots = np.full(rows, self.state.null_slot)
        length = min(tokens, self._max_model_len)
        prefill_start = np.minimum(decode_rows + np.arange(rows - decode_rows + 1) * length, tokens)
        query_start = np.concatenate([np.arange(decode_rows), prefill_start])
        prefill_tokens = [np.zeros(tokens - decode_rows, np.int32)]
        return StepRows(slots, query_start, decode_rows, slots, np.zeros(rows), prefill_tokens)

    # --- start-up ---------------------------------------------------------------------------------------------------

    def largest_steps(self) -> list[WarmUp]:
        """The steps that need the most memory, on null slots: a full budget of prefill, the widest sampling."""
        rows, length = self._row_buckets[-1], min(self._max_tokens, self._max_model_len)
        shape = ForwardShape(0, rows, self._max_tokens, rows, length, length)
        return [partial(self._run_null_rows, shape), *self._heads(rows), self._measure_largest]

    def small_steps(self) -> list[WarmUp]:
        """Steps of a few tokens on null slots, so that what they use beside the largest steps and the graphs is
        compiled and initialised now, and not when the first request comes."""
        shapes = []
        for decode, prefill in ((1, 0), (2, 0), (9, 0), (17, 0), (65, 0), (0, 16), (1, 16)):
            prefill = min(prefill, self._max_tokens - decode)
            rows, tokens = decode + (prefill > 0), decode + prefill
            if rows <= self.state.num_slots and tokens:
                shapes.append(ForwardShape(decode, rows, tokens, rows, max(prefill, 1), tokens))
        steps = [partial(self._run_null_rows, shape) for shape in shapes]
        return [*steps, *self._heads(1), self.state.warm_up, self._edits.warm_up]

    def _heads(self, rows: int) -> list[WarmUp]:
        return [partial(self.program.head, rows, variant) for variant in SamplingVariant]

    def _run_null_rows(self, shape: ForwardShape) -> None:
        self._inputs.send(self._null_rows(shape.num_rows, shape.num_tokens, shape.num_decode_rows or 0))
        self._sent_decode_rows = None
        self.program.forward(shape)

    def capture_graphs(
        self,
        on_graph: Callable[[], None] | None = None,
        only_largest: bool = False,
        like: GraphCache | None = None,
        kind: GraphKind | None = None,
    ) -> GraphCache:
        """Captures the graphs of all steps, or of the `kind` given, largest first, so that the smaller fit in their
        memory, or in that of `like`, for which all has been warmed up. `on_graph` is called after each.

        The steps are run on null slots, so the batch's state stays as it is. `small_steps` are to be run before all are
        captured.
        """
        graphs = GraphCache(like)
        torch.cuda.empty_cache()
        with torch.inference_mode():
            for capture in self._captures(only_largest, kind):
                graphs.capture(capture.key, capture.launch, capture.warm_up and like is None)
                if on_graph is not None:
                    on_graph()
        torch.cuda.empty_cache()
        self._sent_decode_rows = None
        return graphs

    def num_graphs(self, kind: GraphKind | None = None) -> int:
        """How many graphs `capture_graphs` makes."""
        return len(self._captures(only_largest=False, kind=kind))

    def _captures(self, only_largest: bool, kind: GraphKind | None) -> list[Capture]:
        captures = [
            *self._mixed_captures(only_largest),
            *self._layered_captures(only_largest),
            *self._decode_captures(only_largest),
            *([] if only_largest else self._change_captures()),
        ]
        return [capture for capture in captures if kind in (None, capture.kind)]

    def _mixed_captures(self, only_largest: bool) -> list[Capture]:
        shapes = self._mixed_shapes()[: 1 if only_largest else None]
        return [Capture(shape, partial(self._run_null_mixed, shape), GraphKind.PASS) for shape in shapes]

    def _layered_captures(self, only_largest: bool) -> list[Capture]:
        """For each size of a chunk that is computed layer by layer, its layers."""
        captures = []
        for tokens in self._layered_buckets[-1:] if only_largest else self._layered_buckets[::-1]:
            for layer in range(1 if only_largest else self._num_layers):
                launch = partial(self._run_null_layer, tokens, layer)
                captures.append(Capture(("layer", tokens, layer), launch, GraphKind.PART, warm_up=layer == 0))
        return captures

    def _decode_captures(self, only_largest: bool) -> list[Capture]:
        """For each number of rows: the forward pass, the heads, and if a second launch can be felt, both in one."""
        captures: list[Capture] = []
        for rows in self._row_buckets[-1:] if only_largest else self._row_buckets[::-1]:
            shape = self._decode_shape(rows)
            captures.append(Capture(shape, partial(self._run_null_decode, shape), GraphKind.PASS))
            for variant in SamplingVariant:
                captures.append(Capture((rows, variant), partial(self.program.head, rows, variant), GraphKind.PART))
            if rows <= MOST_ROWS_OF_ONE_GRAPH:
                for variant in (SamplingVariant.GREEDY, SamplingVariant.PLAIN):
                    whole = partial(self.program.decode, shape, variant)
                    captures.append(Capture((shape, variant), whole, GraphKind.PASS, warm_up=False))
        return captures

    def _change_captures(self) -> list[Capture]:
        """For each staging buffer, bringing what is in it to the slots: launching copy and kernel one by one takes the
        host longer than replaying the forward pass. It is not run here, as who knows what is in the buffers."""
        return [
            Capture(
                ("changes", turn), partial(self.state.bring_changes, turn, SMALL_CHANGES), GraphKind.PART, warm_up=False
            )
            for turn in range(RING_SIZE)
        ]

    def _run_null_mixed(self, shape: ForwardShape) -> None:
        if not torch.cuda.is_current_stream_capturing():
            self._inputs.send(self._null_rows(shape.num_rows, shape.num_tokens))
        self.program.forward(shape)

    def _run_null_layer(self, tokens: int, layer: int) -> None:
        if not torch.cuda.is_current_stream_capturing():
            length = min(tokens, self._max_model_len)
            self.program.layered.begin(self.state.null_slot, np.zeros(length, np.int32), length, tokens)
            self.program.layered.resume()
        self.program.run_layer(layer)

    def _run_null_decode(self, shape: ForwardShape) -> None:
        if not torch.cuda.is_current_stream_capturing():
            self._inputs.send(self._decode_rows(np.empty(0, np.int32), shape.num_rows))
        self.program.forward(shape)

    def use_graphs(self, graphs: GraphCache) -> None:
        self._graphs = graphs
