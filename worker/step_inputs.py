"""What a step reads on the device, and the one copy that brings it there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from worker.batch_state import StagingRing


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step's rows as the host planned them, padded to the sizes of the program that will run them."""

    row_slots: np.ndarray  # slot of each row: decode rows, prefill rows, padding
    query_start: np.ndarray  # [rows + 1] first token of each row
    num_decode_rows: int
    sample_slots: np.ndarray  # slot of each sampling row
    sample_tokens: np.ndarray  # the token whose hidden state it samples from
    prefill_tokens: list[np.ndarray] = field(default_factory=list)  # ids of the tokens after the decode rows'


class StepInputs:
    """The device buffers that a step reads, filled by one copy.

    Row arrays come first, at fixed places, then the tokens of prefill chunks, so that a copy ends where the step's
    tokens end. The ids of decode rows' tokens are the device's to write.
    """

    def __init__(self, max_rows: int, max_tokens: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._tokens_at = 4 * max_rows + 2
        self._ring = StagingRing(self._tokens_at + max_tokens, device)
        buffer = self._ring.device_buffer
        self.row_slots, self.sample_slots, self.sample_tokens = (
            buffer[i * max_rows : (i + 1) * max_rows] for i in range(3)
        )
        self.query_start = buffer[3 * max_rows : 4 * max_rows + 1]
        self.decode_rows = buffer[4 * max_rows + 1 : self._tokens_at]
        self.token_ids = buffer[self._tokens_at :]

    def send(self, rows: StepRows) -> None:
        """Fills the buffers."""
        host, most = self._ring.next_host_buffer(), self._max_rows
        host[: len(rows.row_slots)] = rows.row_slots
        host[most : most + len(rows.sample_slots)] = rows.sample_slots
        host[2 * most : 2 * most + len(rows.sample_tokens)] = rows.sample_tokens
        host[3 * most : 3 * most + len(rows.query_start)] = rows.query_start
        host[4 * most + 1] = rows.num_decode_rows
        end = self._tokens_at
        if rows.prefill_tokens:
            end += rows.num_decode_rows
        for tokens in rows.prefill_tokens:
            host[end : end + len(tokens)] = tokens
            end += len(tokens)
        self._ring.send(0, end)


def pad(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """`values` followed by as many `fill` as make `size` entries."""
    return np.concatenate([values, np.full(size - len(values), fill)]) if size > len(values) else values
