"""What a step brings back: its tokens, and log-probabilities where they are wanted, on their way to the host.

Everything is copied without waiting, behind one event: tokens and what belongs to them through a ring of pinned
buffers, the log-probabilities of prompts, which are as long as those are, through buffers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from protocol.arrays import pack_ints
from protocol.logprobs import TokenLogprobs
from protocol.messages import Step, StepResult
from worker.batch_state import RING_SIZE
from worker.logprobs import packed_size, table_of
from worker.step_program import StepProgram

# Hidden states that go through the head together to measure a prompt: enough that reading its weights does not decide.
_PIECE_TOKENS = 128
_PIECE_TOKENS_OF_ALL = 8  # the same where the whole vocabulary is wanted


@dataclass(frozen=True, slots=True)
class PromptStretch:
    """Tokens of a prompt to be measured, each by the hidden state of the token before it."""

    first: int  # index of the first of those hidden states among the step's tokens
    positions: np.ndarray
    token_ids: np.ndarray
    num_logprobs: int  # as in `SamplingParams`


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Packed log-probabilities in the host's memory, once the step's event has come."""

    packed: torch.Tensor
    names: np.ndarray  # what the table calls the rows
    width: int
    picked: np.ndarray | None = None  # the rows of `packed` that count; None for all

    def table(self) -> TokenLogprobs:
        packed = self.packed.numpy()
        return table_of(packed if self.picked is None else packed[self.picked], self.names, self.width)


@dataclass(slots=True)
class PendingTokens:
    """A launched step's tokens, on their way to the host."""

    step_id: int
    epoch: int
    buffer: torch.Tensor
    copied: torch.cuda.Event | None
    logprobs: list[PackedRows] = field(default_factory=list)
    prompt_logprobs: list[PackedRows] = field(default_factory=list)

    def is_ready(self) -> bool:
        return self.copied is None or self.copied.query()

    def result(self) -> StepResult:
        """The message to the core; waits for the copies if need be."""
        if self.copied is not None:
            self.copied.synchronize()
        return StepResult(
            self.step_id,
            self.epoch,
            pack_ints(self.buffer.numpy()),
            [rows.table() for rows in self.logprobs],
            [rows.table() for rows in self.prompt_logprobs],
        )


class StepResults:
    """Owns the buffers on the host's side of a step."""

    def __init__(self, program: StepProgram, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._program = program
        self._vocab_size = vocab_size
        self._device = device
        self._on_gpu = device.type == "cuda"
        width = program.logprobs.shape[1]
        self._tokens = [self._host_buffer(max_rows) for _ in range(RING_SIZE)]
        self._logprobs = [self._host_buffer(max_rows, width) for _ in range(RING_SIZE)]
        self._copied = [torch.cuda.Event() if self._on_gpu else None for _ in range(RING_SIZE)]
        self._turn = 0

    def send_back(
        self, step: Step, num_sampled: int, wanted: np.ndarray | None, prompt_logprobs: list[PackedRows]
    ) -> PendingTokens:
        """Sends what the step has computed on its way.

        Args:
            wanted: [num_sampled] log-probabilities that each row wants: 0 and more, -1 for all, less for none; None if
                no row wants any.
        """
        self._turn = (self._turn + 1) % RING_SIZE
        buffer, copied = self._tokens[self._turn][:num_sampled], self._copied[self._turn]
        buffer.copy_(self._program.tokens[:num_sampled], non_blocking=True)
        logprobs = [] if wanted is None else self._sampled_logprobs(wanted)
        if copied is not None:
            copied.record()
        return PendingTokens(step.step_id, step.epoch, buffer, copied, logprobs, prompt_logprobs)

    def _sampled_logprobs(self, wanted: np.ndarray) -> list[PackedRows]:
        found = []
        some = np.flatnonzero(wanted >= 0)
        if len(some):
            buffer = self._logprobs[self._turn][: len(wanted)]
            buffer.copy_(self._program.logprobs[: len(wanted)], non_blocking=True)
            width = min(int(wanted[some].max()), self._program.num_alternatives)
            found.append(PackedRows(buffer, some, width, picked=some))
        # Rare and long: a row at a time, whose logits are computed again.
        for row in np.flatnonzero(wanted == -1).tolist():
            packed = self._packed(1, self._vocab_size)
            self._program.measure_sampled(row, packed)
            found.append(PackedRows(self._to_host(packed), np.array([row]), self._vocab_size))
        return found

    def measure_prompts(self, hidden: torch.Tensor, stretches: Sequence[PromptStretch]) -> list[PackedRows]:
        """Log-probabilities of prompt tokens, by the hidden states of all the step's tokens."""
        return [self._measure_prompt(hidden, stretch) for stretch in stretches]

    def _measure_prompt(self, hidden: torch.Tensor, stretch: PromptStretch) -> PackedRows:
        wants_all = stretch.num_logprobs == -1
        width = self._vocab_size if wants_all else self._program.num_alternatives
        piece = _PIECE_TOKENS_OF_ALL if wants_all else _PIECE_TOKENS
        count = len(stretch.token_ids)
        # On a GPU all pieces have one size, so that no kernel is compiled for another.
        padded = -(-count // piece) * piece if self._on_gpu else count
        plan = np.zeros((2, padded), np.int32)
        plan[0, :count] = stretch.first + np.arange(count)
        plan[1, :count] = stretch.token_ids
        indices, token_ids = self._to_device(plan)
        host = self._host_buffer(padded, packed_size(width))
        for part in (slice(start, start + piece) for start in range(0, count, piece)):
            packed = self._packed(len(indices[part]), width)
            self._program.measure(hidden.index_select(0, indices[part]), token_ids[part], packed)
            host[part].copy_(packed, non_blocking=True)
        wanted = width if wants_all else min(stretch.num_logprobs, width)
        return PackedRows(host[:count], stretch.positions, wanted)

    def run_largest(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Measures what needs the most memory, so that it is counted, and all that it uses is initialised."""
        hidden = torch.zeros((_PIECE_TOKENS, hidden_size), dtype=dtype, device=self._device)
        tokens = np.zeros(_PIECE_TOKENS, np.int32)
        self._measure_prompt(hidden, PromptStretch(0, tokens, tokens, 0))
        few = tokens[:_PIECE_TOKENS_OF_ALL]
        self._measure_prompt(hidden, PromptStretch(0, few, few, -1))
        self._sampled_logprobs(np.array([-1]))

    def _packed(self, rows: int, width: int) -> torch.Tensor:
        return torch.empty((rows, packed_size(width)), dtype=torch.int32, device=self._device)

    def _host_buffer(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=self._on_gpu)

    def _to_host(self, packed: torch.Tensor) -> torch.Tensor:
        return self._host_buffer(*packed.shape).copy_(packed, non_blocking=True)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._on_gpu else host
