"""Runs steps: takes what changed to the device, runs the forward pass, draws tokens, and brings them back.

`execute` launches a step and returns at once; the tokens are read later, when the device has them. A step is two
device programs with fixed buffers between them: *forward* (rows and tokens to last hidden states) and *head* (output
head and sampler). On a GPU both are padded to bucket sizes, captured as CUDA graphs where that pays, and run eagerly
by the same functions where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from protocol.config import EngineConfig
from protocol.messages import Step, unpack_ints
from worker.attention import AttentionMetadata, create_backend
from worker.batch_state import RING_SIZE, BatchState, StagingRing
from worker.graphs import GraphCache, batch_buckets, bucket_for
from worker.kernels import Ops
from worker.models import Qwen3
from worker.sampler import SamplingVariant, sample_tokens

CaptureProgress = Callable[[int, int], None]


@dataclass(slots=True)
class PendingTokens:
    """A launched step's tokens, on their way to the host."""

    step_id: int
    epoch: int
    buffer: torch.Tensor
    copied: torch.cuda.Event | None

    def is_ready(self) -> bool:
        return self.copied is None or self.copied.query()

    def tobytes(self) -> bytes:
        """int32 tokens of the sampling rows; waits for the copy if need be."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.buffer.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """All that the host must know to launch a forward pass; equal shapes may share a graph."""

    num_decode_rows: int
    num_rows: int
    num_tokens: int
    num_sampling_rows: int
    max_query_len: int
    max_kv_len: int


class StepInputs:
    """The device buffers that a step reads, filled by one copy.

    Row arrays come first, at fixed places, then the tokens of prefill chunks, so that a copy ends where the step's
    tokens end. A step equal to the last one in all of these copies nothing.
    """

    def __init__(self, max_rows: int, max_tokens: int, device: torch.device) -> None:
        self._rows = max_rows
        self._ring = StagingRing(4 * max_rows + 1 + max_tokens, device)
        buffer = self._ring.device_buffer
        self.row_slots, self.sample_slots, self.sample_tokens = (
            buffer[i * max_rows : (i + 1) * max_rows] for i in range(3)
        )
        self.query_start = buffer[3 * max_rows : 4 * max_rows + 1]
        self.token_ids = buffer[4 * max_rows + 1 :]

    def send(
        self, row_slots: np.ndarray, sample_slots: np.ndarray, sample_tokens: np.ndarray, query_start: np.ndarray,
        num_decode_tokens: int, prefill_tokens: list[np.ndarray],
    ) -> None:  # fmt: skip
        """Fills the buffers. The ids of the first `num_decode_tokens` tokens are the device's to write."""
        host, rows = self._ring.next_host_buffer(), self._rows
        host[: len(row_slots)] = row_slots
        host[rows : rows + len(sample_slots)] = sample_slots
        host[2 * rows : 2 * rows + len(sample_tokens)] = sample_tokens
        host[3 * rows : 3 * rows + len(query_start)] = query_start
        end = start = 4 * rows + 1 + num_decode_tokens
        for tokens in prefill_tokens:
            host[end : end + len(tokens)] = tokens
            end += len(tokens)
        self._ring.send(0, end if prefill_tokens else start)


class StepRunner:
    """Owns the batch's state on the device and executes steps in the order given."""

    def __init__(self, config: EngineConfig, model: Qwen3, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._model = model
        self._ops = ops
        self._device = device
        self._dtype = dtype
        self._on_gpu = device.type == "cuda"
        max_rows, max_tokens = config.options.max_num_seqs, config.options.max_num_batched_tokens
        self._max_tokens = max_tokens
        self._buckets = batch_buckets(max_rows)
        self.state = BatchState(max_rows, config.max_model_len, config.block_size, device)
        self._inputs = StepInputs(max_rows, max_tokens, device)
        self._positions = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._cache_slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._kv_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._head_input = torch.zeros((max_rows, config.model_config.hidden_size), dtype=dtype, device=device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._attention = create_backend(
            config.attention_backend,
            num_heads=config.model_config.num_heads,
            num_kv_heads=config.model_config.num_kv_heads,
            head_dim=config.model_config.head_dim,
            block_size=config.block_size,
            max_rows=max_rows,
            max_blocks_per_row=self.state.max_blocks,
            device=device,
            dtype=dtype,
        )
        self._results = [torch.zeros(max_rows, dtype=torch.int32, pin_memory=self._on_gpu) for _ in range(RING_SIZE)]
        self._copied = [torch.cuda.Event() if self._on_gpu else None for _ in range(RING_SIZE)]
        self._turn = 0
        self._decode_slots = np.empty(0, np.int32)
        self._sent_shape: ForwardShape | None = None
        self._kv_cache = torch.empty(0, device=device)
        self._graphs: GraphCache | None = None

    def set_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. Graphs captured before hold the old one."""
        self._kv_cache = kv_cache

    # --- a step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, step: Step) -> PendingTokens:
        """Launches a step. Its tokens come back as one int32 for each row that samples, in row order."""
        self.state.apply_changes(step)
        shape, sampling_slots = self._send_inputs(step)
        self._forward(shape)
        num_sampled = len(sampling_slots)
        if num_sampled:
            self._head(shape.num_sampling_rows, self._variant(sampling_slots))
        return self._send_back(step, num_sampled)

    def _send_inputs(self, step: Step) -> tuple[ForwardShape, np.ndarray]:
        """Plans the step's rows and brings them to the device, unless they are what is there already."""
        state = self.state
        unchanged = step.decode_slots is None and not step.prefill_slots
        if step.decode_slots is not None:
            self._decode_slots = unpack_ints(step.decode_slots)
        decode = self._decode_slots
        state.host_lens[decode] += 1
        if not step.prefill_slots:
            rows = self._padded(len(decode))
            shape = self._decode_shape(rows)
            if not (unchanged and self._sent_shape == shape):
                slots = self._pad(decode, rows, state.null_slot)
                counting = np.arange(rows + 1, dtype=np.int32)
                self._inputs.send(slots, slots, counting[:-1], counting, rows, [])
            self._sent_shape = shape
            return shape, decode
        return self._send_mixed_inputs(step, decode)

    def _send_mixed_inputs(self, step: Step, decode: np.ndarray) -> tuple[ForwardShape, np.ndarray]:
        state = self.state
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
        sampling_slots = np.concatenate([decode, prefill[samples]])
        sample_tokens = np.concatenate([np.arange(len(decode)), last_tokens[samples]])
        row_slots = np.concatenate([decode, prefill])
        sampling_rows = self._padded(len(sampling_slots))
        shape = ForwardShape(
            num_decode_rows=len(decode),
            num_rows=len(row_slots),
            num_tokens=int(query_start[-1]),
            num_sampling_rows=sampling_rows,
            max_query_len=int(lens.max()),
            max_kv_len=int(state.host_lens[row_slots].max()),
        )
        self._inputs.send(
            row_slots,
            self._pad(sampling_slots, sampling_rows, state.null_slot),
            self._pad(sample_tokens, sampling_rows, 0),
            query_start,
            len(decode),
            chunks,
        )
        self._sent_shape = None
        return shape, sampling_slots

    def _padded(self, rows: int) -> int:
        return bucket_for(self._buckets, rows) if self._on_gpu and rows else rows

    @staticmethod
    def _pad(values: np.ndarray, size: int, fill: int) -> np.ndarray:
        return np.concatenate([values, np.full(size - len(values), fill)]) if size > len(values) else values

    def _variant(self, sampling_slots: np.ndarray) -> SamplingVariant:
        if self.state.host_filters[sampling_slots].any():
            return SamplingVariant.FULL
        if self.state.host_temperature[sampling_slots].any():
            return SamplingVariant.PLAIN
        return SamplingVariant.GREEDY

    def _send_back(self, step: Step, num_sampled: int) -> PendingTokens:
        self._turn = (self._turn + 1) % RING_SIZE
        buffer, copied = self._results[self._turn][:num_sampled], self._copied[self._turn]
        buffer.copy_(self._tokens[:num_sampled], non_blocking=True)
        if copied is not None:
            copied.record()
        return PendingTokens(step.step_id, step.epoch, buffer, copied)

    # --- device programs ------------------------------------------------------------------------------------------

    def _forward(self, shape: ForwardShape) -> None:
        if self._graphs is None or not self._graphs.replay(shape):
            self.forward_eagerly(shape)

    def _head(self, rows: int, variant: SamplingVariant) -> None:
        if self._graphs is None or not self._graphs.replay((rows, variant)):
            self.head_eagerly(rows, variant)

    def forward_eagerly(self, shape: ForwardShape) -> None:
        """From the step's inputs to the hidden states that `head_eagerly` reads. Device work only, but for the torch
        backend."""
        inputs, state = self._inputs, self.state
        rows, tokens, decode = shape.num_rows, shape.num_tokens, shape.num_decode_rows
        row_slots = inputs.row_slots[:rows]
        metadata = AttentionMetadata(
            num_decode_rows=decode,
            row_slots=row_slots,
            query_start=inputs.query_start[: rows + 1],
            kv_lens=self._kv_lens[:rows],
            positions=self._positions[:tokens],
            cache_slots=self._cache_slots[:tokens],
            block_table=state.block_table,
            max_query_len=shape.max_query_len,
            max_kv_len=shape.max_kv_len,
        )
        self._ops.step_metadata(
            row_slots, metadata.query_start, state.seq_lens, state.block_table, self._config.block_size,
            metadata.positions, metadata.cache_slots, metadata.kv_lens,
        )  # fmt: skip
        self._attention.prepare(metadata)
        token_ids = inputs.token_ids[:tokens]
        if decode:
            token_ids[:decode] = state.last_token[row_slots[:decode]]
        hidden = self._model.forward(token_ids, self._kv_cache, self._attention, metadata)
        sampled = inputs.sample_tokens[: shape.num_sampling_rows]
        self._head_input[: shape.num_sampling_rows] = hidden[sampled]
        # Padding rows all write the null slot's own length, 0.
        state.seq_lens[row_slots] = metadata.kv_lens

    def head_eagerly(self, rows: int, variant: SamplingVariant) -> None:
        """From hidden states to tokens, which are kept as their slots' last."""
        state = self.state
        slots = self._inputs.sample_slots[:rows]
        logits = self._model.logits(self._head_input[:rows])
        tokens = sample_tokens(logits, slots, state.seq_lens[slots], state, variant, self._ops)
        # A failed row's -1 goes back to the host; the device needs an id that the embedding has.
        state.last_token[slots] = tokens.clamp(min=0)
        self._tokens[:rows] = tokens

    # --- start-up ---------------------------------------------------------------------------------------------------

    def _decode_shape(self, rows: int) -> ForwardShape:
        return ForwardShape(rows, rows, rows, rows, 1, self._config.max_model_len)

    @torch.inference_mode()
    def run_largest_steps(self) -> None:
        """Runs the steps that need the most memory, on null slots: a full budget of prefill, the widest sampling."""
        tokens, rows = self._max_tokens, self._buckets[-1]
        # One row of all tokens, as far as the context reaches, the rest in rows of their own.
        length = min(tokens, self._config.max_model_len)
        starts = np.minimum(np.arange(rows + 1) * length, tokens)
        slots = np.full(rows, self.state.null_slot)
        self._inputs.send(slots, slots, np.zeros(rows), starts, 0, [np.zeros(tokens, np.int32)])
        self.forward_eagerly(ForwardShape(0, rows, tokens, rows, length, length))
        for variant in SamplingVariant:
            self.head_eagerly(rows, variant)
        self._sent_shape = None

    @torch.inference_mode()
    def run_small_steps(self) -> None:
        """Runs steps of a few tokens on null slots, so that what they use beside the largest steps and the graphs is
        compiled and initialised now, and not when the first request comes."""
        for decode, prefill in ((1, 0), (0, 16), (1, 16)):
            prefill = min(prefill, self._max_tokens - decode)
            rows, tokens = decode + (prefill > 0), decode + prefill
            if rows > self.state.num_slots or not tokens:
                continue
            slots = np.full(rows, self.state.null_slot)
            starts = np.array([*range(decode + 1), *([tokens] if prefill else [])])
            chunks = [np.zeros(prefill, np.int32)] if prefill else []
            self._inputs.send(slots, slots[:1], np.zeros(1), starts, decode, chunks)
            self.forward_eagerly(ForwardShape(decode, rows, tokens, 1, max(prefill, 1), tokens))
        for variant in SamplingVariant:
            self.head_eagerly(1, variant)
        self._sent_shape = None

    def _null_inputs(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        slots = np.full(rows, self.state.null_slot)
        counting = np.arange(rows + 1)
        return slots, slots, counting[:-1], counting

    @torch.inference_mode()
    def capture_graphs(self, progress: CaptureProgress, only_largest: bool = False) -> GraphCache:
        """Captures the forward pass of decode steps and the head, for every bucket, largest first.

        The steps are run on null slots, so the batch's state stays as it is.
        """
        graphs = GraphCache()
        buckets = self._buckets[-1:] if only_largest else self._buckets[::-1]
        variants = list(SamplingVariant)[::-1]
        total = len(buckets) * (1 + len(variants))
        for rows in buckets:
            self._inputs.send(*self._null_inputs(rows), rows, [])
            shape = self._decode_shape(rows)
            graphs.capture(shape, lambda shape=shape: self.forward_eagerly(shape))  # type: ignore[misc]
            progress(len(graphs), total)
            for variant in variants:
                graphs.capture((rows, variant), lambda rows=rows, v=variant: self.head_eagerly(rows, v))  # type: ignore[misc]
                progress(len(graphs), total)
        self._sent_shape = None
        return graphs

    def use_graphs(self, graphs: GraphCache) -> None:
        self._graphs = graphs
