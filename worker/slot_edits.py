"""Fills the tables of what changes logits when a request takes a slot, from all that is known of it then.

What comes later (counts, latest tokens) the head keeps up on the device. A request that was preempted brings the tokens
it has generated, so its tables are then what they were.
"""

from __future__ import annotations

import numpy as np
import torch

from protocol.arrays import pack_ints, unpack_floats, unpack_ints
from protocol.logit_edits import LogitEdits
from protocol.messages import AdmittedSlot, StepMasks
from protocol.sampling import MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from worker.batch_state import StagingRing
from worker.kernels.edit_logits import (
    HAS_ALLOWED,
    HAS_LISTS,
    HAS_PENALTIES,
    IN_PROMPT,
    MOST_COUNTED,
    WORD_TOKENS,
    EditTables,
)


class SlotEdits:
    """Owns the tables of all slots."""

    def __init__(self, num_slots: int, vocab_size: int, num_eos: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._is_edited = np.zeros(num_slots, np.bool_)
        self._masks = StagingRing(num_slots * (1 + -(-vocab_size // 32)), device)
        # A bad word has a sequence for itself, and one for itself after a space.
        self.tables = EditTables.allocate(
            num_slots, vocab_size, MAX_LOGIT_BIASES + MAX_STOP_TOKEN_IDS + num_eos, 2 * MAX_BAD_WORDS, device
        )

    def admit(self, admitted: AdmittedSlot) -> None:
        """Sets the slot's tables. Costs nothing if neither this request nor the slot's last one is edited."""
        slot, edits = admitted.slot, admitted.edits
        if edits is not None:
            self._fill(admitted, edits)
        elif self._is_edited[slot]:
            self.tables.headers[slot].zero_()
        self._is_edited[slot] = edits is not None

    def set_masks(self, masks: StepMasks) -> None:
        """Sets what slots may draw in the step that is about to sample, in one copy.

        On the device's stream that is after all that earlier steps read.
        """
        slots, bits = unpack_ints(masks.slots), unpack_ints(masks.masks)
        if not len(slots):
            return
        total = len(slots) + len(bits)
        host = self._masks.next_host_buffer()
        host[: len(slots)], host[len(slots) : total] = slots, bits
        on_device = self._masks.send(0, total)
        self.tables.allowed[on_device[: len(slots)]] = on_device[len(slots) :].view(len(slots), -1)

    def warm_up(self) -> None:
        """Uses what `set_masks` uses, on the null slot, which nothing reads."""
        null = len(self.tables.allowed) - 1
        self.set_masks(StepMasks(0, pack_ints([null]), pack_ints(np.zeros(self.tables.allowed.shape[1]))))

    def _fill(self, admitted: AdmittedSlot, edits: LogitEdits) -> None:
        tables, slot = self.tables, admitted.slot
        known = unpack_ints(admitted.token_ids)
        prompt, generated = np.split(known, [admitted.num_prompt_tokens])
        suppressed, biases = unpack_ints(edits.suppressed_ids), unpack_floats(edits.biases)
        suppressed = suppressed[suppressed < self._vocab_size]  # a model may name an end that its vocabulary lacks
        bias_ids = np.concatenate([suppressed, unpack_ints(edits.bias_ids)])
        biases = np.concatenate([np.full(len(suppressed), -np.inf, np.float32), biases])
        words = np.full((len(edits.bad_words), WORD_TOKENS), -1, np.int32)
        for row, word in zip(words, map(unpack_ints, edits.bad_words)):
            row[-len(word) :] = word
        penalties = [edits.repetition_penalty, edits.frequency_penalty, edits.presence_penalty, 0.0]
        applies = 0
        if penalties[:3] != [1.0, 0.0, 0.0]:
            applies |= HAS_PENALTIES
            self._fill_counts(slot, prompt, generated)
        if edits.allowed_ids is not None:
            applies |= HAS_ALLOWED
            tables.allowed[slot] = self._to_device(_bitmask(unpack_ints(edits.allowed_ids), self._vocab_size))
        if edits.is_masked:
            applies |= HAS_ALLOWED  # `set_masks` comes before each token is drawn
        if len(bias_ids) or len(words):
            applies |= HAS_LISTS
        counts = [len(suppressed), edits.suppressed_until, len(bias_ids), len(words)]
        header = np.array([applies, len(prompt), *counts, 0, 0], np.int32)
        parts = [header, np.array(penalties, np.float32), _latest(known), bias_ids, biases, words.reshape(-1)]
        sizes = [len(part) for part in parts]
        on_device = self._to_device(np.concatenate([part.view(np.int32) for part in parts])).split(sizes)
        tables.headers[slot] = on_device[0]
        tables.penalties[slot] = on_device[1].view(torch.float32)
        tables.recent[slot] = on_device[2]
        tables.bias_ids[slot, : len(bias_ids)] = on_device[3]
        tables.biases[slot, : len(bias_ids)] = on_device[4].view(torch.float32)
        tables.bad_words[slot, : len(words)] = on_device[5].view(words.shape)

    def _fill_counts(self, slot: int, prompt: np.ndarray, generated: np.ndarray) -> None:
        ids, counts = np.unique(generated, return_counts=True)
        parts = [prompt, ids.astype(np.int32), np.minimum(counts, MOST_COUNTED).astype(np.int32)]
        in_prompt, ids_on_device, counts_on_device = self._to_device(np.concatenate(parts)).split(
            [len(part) for part in parts]
        )
        row = self.tables.counts[slot]
        row.zero_()
        row.index_fill_(0, in_prompt.long(), IN_PROMPT)
        row[ids_on_device] += counts_on_device.to(torch.int16)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        """int32 values, copied without waiting: torch reuses a pinned buffer only after its copy."""
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


def _latest(known: np.ndarray) -> np.ndarray:
    """[WORD_TOKENS] the last tokens, each in the column of its position."""
    latest = np.full(WORD_TOKENS, -1, np.int32)
    positions = np.arange(max(0, len(known) - WORD_TOKENS), len(known))
    latest[positions % WORD_TOKENS] = known[positions]
    return latest


def _bitmask(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """[ceil(vocab / 32)] int32, bit i % 32 of word i // 32 set for each id i."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[ids] = True
    return np.packbits(allowed, bitorder="little").view("<i4")
