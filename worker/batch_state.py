"""The batch as it lives on the device: per-slot tensors, and the staging that brings a step's changes to them.

Everything a step changes travels in one copy from a ring of pinned buffers, and is brought to its slots by one kernel.
The host keeps what it needs to know without asking the device: known tokens and lengths.
"""

from __future__ import annotations

import numpy as np
import torch

from protocol.messages import AdmittedSlot, Step, unpack_ints
from worker.kernels import Ops
from worker.kernels.apply_changes import FIELDS, HEADER, pack_request
from worker.sampling_variant import variant_of

# Steps whose staging buffers may still be read by the device. More than are ever in flight.
RING_SIZE = 4
# Changes of a step, in int32, that a graph brings to the device, always so many: a request is 8, and 2 for each of its
# blocks. Only steps that admit hundreds of requests, or prompts of tens of thousands of tokens, have more.
SMALL_CHANGES = 4096
# Where a slot's number of log-probabilities is kept: it wants none. -1 is all.
NO_LOGPROBS = -2


class StagingRing:
    """Pinned host buffers in turn, each copied to the same device buffer.

    Copies and kernels share a stream, so the device buffer is overwritten only after the step before has read it; the
    ring is for the host, which writes a later step's values while earlier copies may not have begun.

    Attributes:
        turn: which host buffer is being filled, or was last.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = [
            torch.zeros(capacity, dtype=torch.int32, device="cpu", pin_memory=on_gpu) for _ in range(RING_SIZE)
        ]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in range(RING_SIZE)]
        self.turn = 0
        self.device_buffer = torch.zeros(capacity, dtype=torch.int32, device=device)

    def next_host_buffer(self) -> np.ndarray:
        """An int32 buffer to fill, once its last copy is done; `send` copies it."""
        self.turn = (self.turn + 1) % RING_SIZE
        copied = self._copied[self.turn]
        if copied is not None:
            copied.synchronize()
        return self._host[self.turn].numpy()

    def send(self, start: int, end: int) -> torch.Tensor:
        """Copies elements `start..end-1` to the device; returns them there."""
        target = self.copy(self.turn, start, end)
        self.note_sent()
        return target

    def copy(self, turn: int, start: int, end: int) -> torch.Tensor:
        """The copy alone, of any of the buffers, which can be captured. `note_sent` is to follow what launches it."""
        target = self.device_buffer[start:end]
        target.copy_(self._host[turn][start:end], non_blocking=True)
        return target

    def note_sent(self) -> None:
        """The buffer whose turn it is may be filled again once what has been launched so far is done."""
        copied = self._copied[self.turn]
        if copied is not None:
            copied.record()


class BatchState:
    """Per-slot tensors. Row `num_slots` is the null slot, which padding rows point at and nothing reads."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device, ops: Ops) -> None:
        self._ops = ops
        self.num_slots = num_slots
        self.null_slot = num_slots
        self.max_blocks = -(-max_model_len // block_size)
        rows = num_slots + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_table = zeros(rows, self.max_blocks)
        self.seq_lens = zeros(rows)  # tokens in the cache
        self.last_token = zeros(rows)  # the token that the next decode step computes
        self.temperature = zeros(rows, dtype=torch.float32)
        self.top_k = zeros(rows)
        self.top_p = zeros(rows, dtype=torch.float32)
        self.min_p = zeros(rows, dtype=torch.float32)
        self.seed = zeros(rows, dtype=torch.int64)
        # At most: every slot admitted with a full table, in one step.
        most_changes = HEADER + num_slots * (FIELDS + 2 * self.max_blocks)
        self.staging = StagingRing(max(most_changes, SMALL_CHANGES), device)
        # The host's own view, by slot.
        self.known_tokens: list[np.ndarray] = [np.empty(0, np.int32)] * num_slots
        self.host_lens = np.zeros(num_slots, np.int64)
        self.host_prompt_lens = np.zeros(num_slots, np.int64)
        self.host_logprobs = np.full(num_slots, NO_LOGPROBS, np.int32)
        self.host_prompt_logprobs = np.full(num_slots, NO_LOGPROBS, np.int32)
        self.host_variant = np.zeros(num_slots, np.int8)  # the `SamplingVariant` that its options need

    def stage_changes(self, step: Step) -> int:
        """Takes what a step changes into the host's view, and what of it the device must know into a staging buffer.

        Returns how many int32 that is; 0 if nothing changes.
        """
        for slot in unpack_ints(step.released_slots).tolist():
            self.known_tokens[slot] = np.empty(0, np.int32)
        if not step.admitted and not step.new_block_slots:
            return 0
        for admitted in step.admitted:
            self._admit(admitted)
        entries = [unpack_ints(step.new_block_slots) * self.max_blocks + unpack_ints(step.new_block_positions)]
        blocks = [unpack_ints(step.new_block_ids)]
        for admitted in step.admitted:
            blocks.append(unpack_ints(admitted.block_ids))
            entries.append(admitted.slot * self.max_blocks + np.arange(len(blocks[-1]), dtype=np.int32))
        return self._stage(list(map(pack_request, step.admitted)), entries, blocks)

    def bring_changes(self, turn: int, count: int) -> None:
        """Copies `count` int32 of a staging buffer to the device, and applies what they say. Can be captured."""
        self._ops.apply_changes(
            self.staging.copy(turn, 0, count), self.block_table, self.seq_lens, self.top_k, self.temperature,
            self.top_p, self.min_p, self.seed,
        )  # fmt: skip

    def forget_all(self) -> None:
        """Empties the slots. What the device has of them is overwritten when they are taken."""
        self.known_tokens = [np.empty(0, np.int32)] * self.num_slots

    def warm_up(self) -> None:
        """Uses what a step's changes use, on the null slot, which nothing reads."""
        admitted = AdmittedSlot(self.null_slot, b"", 0, 0, b"", 0.0, 0, 0.0, 0.0, 0)
        entry, block = np.array([self.null_slot * self.max_blocks], np.int32), np.zeros(1, np.int32)
        count = self._stage([pack_request(admitted)], [entry], [block])
        self.bring_changes(self.staging.turn, count)
        self.staging.note_sent()

    def _stage(self, requests: list[bytes], entries: list[np.ndarray], blocks: list[np.ndarray]) -> int:
        """Writes what `apply_changes` reads; returns how many int32."""
        host = self.staging.next_host_buffer()
        host[:HEADER] = len(requests), sum(map(len, entries))
        end = HEADER
        for values in (unpack_ints(b"".join(requests)), *entries, *blocks):
            host[end : end + len(values)] = values
            end += len(values)
        return end

    def _admit(self, admitted: AdmittedSlot) -> None:
        slot = admitted.slot
        self.known_tokens[slot] = unpack_ints(admitted.token_ids)
        self.host_lens[slot] = admitted.num_computed_tokens
        self.host_prompt_lens[slot] = admitted.num_prompt_tokens
        self.host_logprobs[slot] = NO_LOGPROBS if admitted.num_logprobs is None else admitted.num_logprobs
        wanted = admitted.num_prompt_logprobs
        self.host_prompt_logprobs[slot] = NO_LOGPROBS if wanted is None else wanted
        self.host_variant[slot] = variant_of(admitted)
