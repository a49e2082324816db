"""The batch as it lives on the device: per-slot tensors, and the staging that brings a step's changes to them.

Everything a step changes travels in one copy from a ring of pinned buffers, and is brought to its slots by one kernel.
The host keeps what it needs to know without asking the device: known tokens and lengths.
"""

from __future__ import annotations

import numpy as np
import torch

from protocol.messages import AdmittedSlot, Step, unpack_ints
from worker.kernels import Ops
from worker.kernels.apply_changes import FIELDS
from worker.sampling_variant import variant_of

# Steps whose staging buffers may still be read by the device. More than are ever in flight.
RING_SIZE = 4
# Where a slot's number of log-probabilities is kept: it wants none. -1 is all.
NO_LOGPROBS = -2


class StagingRing:
    """Pinned host buffers in turn, each copied to the same device buffer.

    Copies and kernels share a stream, so the device buffer is overwritten only after the step before has read it; the
    ring is for the host, which writes a later step's values while earlier copies may not have begun.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = [
            torch.zeros(capacity, dtype=torch.int32, device="cpu", pin_memory=on_gpu) for _ in range(RING_SIZE)
        ]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in range(RING_SIZE)]
        self._turn = 0
        self.device_buffer = torch.zeros(capacity, dtype=torch.int32, device=device)

    def next_host_buffer(self) -> np.ndarray:
        """An int32 buffer to fill, once its last copy is done; `send` copies it."""
        self._turn = (self._turn + 1) % RING_SIZE
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._host[self._turn].numpy()

    def send(self, start: int, end: int) -> torch.Tensor:
        """Copies elements `start..end-1` to the device; returns them there."""
        target = self.device_buffer[start:end]
        target.copy_(self._host[self._turn][start:end], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()
        return target


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
        self._staging = StagingRing(num_slots * (FIELDS + 2 * self.max_blocks), device)
        # The host's own view, by slot.
        self.known_tokens: list[np.ndarray] = [np.empty(0, np.int32)] * num_slots
        self.host_lens = np.zeros(num_slots, np.int64)
        self.host_prompt_lens = np.zeros(num_slots, np.int64)
        self.host_logprobs = np.full(num_slots, NO_LOGPROBS, np.int32)
        self.host_prompt_logprobs = np.full(num_slots, NO_LOGPROBS, np.int32)
        self.host_variant = np.zeros(num_slots, np.int8)  # the `SamplingVariant` that its options need

    def apply_changes(self, step: Step) -> None:
        """Takes what a step changes into the host's view and, if anything did, to the device in one copy."""
        for slot in unpack_ints(step.released_slots).tolist():
            self.known_tokens[slot] = np.empty(0, np.int32)
        scalars = np.empty((FIELDS, len(step.admitted)), np.int32)
        slots = [unpack_ints(step.new_block_slots)]
        positions = [unpack_ints(step.new_block_positions)]
        blocks = [unpack_ints(step.new_block_ids)]
        for index, admitted in enumerate(step.admitted):
            scalars[:, index] = self._admit(admitted)
            block_ids = unpack_ints(admitted.block_ids)
            slots.append(np.full(len(block_ids), admitted.slot, np.int32))
            positions.append(np.arange(len(block_ids), dtype=np.int32))
            blocks.append(block_ids)
        entries = np.concatenate(slots) * self.max_blocks + np.concatenate(positions)
        if len(entries) or scalars.size:
            self._send(scalars.reshape(-1), entries, np.concatenate(blocks))

    def forget_all(self) -> None:
        """Empties the slots. What the device has of them is overwritten when they are taken."""
        self.known_tokens = [np.empty(0, np.int32)] * self.num_slots

    def warm_up(self) -> None:
        """Uses what `apply_changes` uses, on the null slot, which nothing reads."""
        scalars = np.zeros(FIELDS, np.int32)
        scalars[0] = self.null_slot
        self._send(scalars, np.array([self.null_slot * self.max_blocks]), np.zeros(1, np.int32))

    def _send(self, scalars: np.ndarray, entries: np.ndarray, blocks: np.ndarray) -> None:
        parts = (scalars, entries, blocks)
        total = sum(map(len, parts))
        np.concatenate(parts, out=self._staging.next_host_buffer()[:total])
        on_device = self._staging.send(0, total)
        fields, indices, block_ids = on_device.split([len(part) for part in parts])
        self._ops.apply_changes(
            fields.view(FIELDS, len(fields) // FIELDS), indices, block_ids, self.block_table, self.seq_lens,
            self.top_k, self.temperature, self.top_p, self.min_p, self.seed,
        )  # fmt: skip

    def _admit(self, admitted: AdmittedSlot) -> np.ndarray:
        slot = admitted.slot
        self.known_tokens[slot] = unpack_ints(admitted.token_ids)
        self.host_lens[slot] = admitted.num_computed_tokens
        self.host_prompt_lens[slot] = admitted.num_prompt_tokens
        self.host_logprobs[slot] = NO_LOGPROBS if admitted.num_logprobs is None else admitted.num_logprobs
        wanted = admitted.num_prompt_logprobs
        self.host_prompt_logprobs[slot] = NO_LOGPROBS if wanted is None else wanted
        self.host_variant[slot] = variant_of(admitted)
        floats = np.array([admitted.temperature, admitted.top_p, admitted.min_p], np.float32).view(np.int32)
        seed = np.array([admitted.seed], np.int64).view(np.int32)
        integers = [slot, admitted.num_computed_tokens, admitted.top_k]
        return np.concatenate([np.array(integers, np.int32), floats, seed])
