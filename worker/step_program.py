"""The device's side of a step: forward pass and head, on fixed buffers, the same eagerly and inside a CUDA graph.

*forward* takes the step's rows and tokens to hidden states; *head* takes the hidden states of the sampling rows to
tokens. Nothing here looks at a device value, but for the torch attention backend, so that both can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protocol.config import EngineConfig
from protocol.sampling import MAX_LOGPROBS
from worker.attention import AttentionMetadata, create_backend
from worker.batch_state import BatchState
from worker.kernels import Ops
from worker.kernels.edit_logits import EditTables
from worker.layered_chunk import LayeredChunk
from worker.logprobs import pack_logprobs_of, packed_size
from worker.models import Qwen3
from worker.sampler import SamplingVariant, sample_tokens
from worker.step_inputs import StepInputs

# Rows whose logits are edited together, in float32: of Qwen3's vocabulary, so many take 39 MB.
_EDITED_ROWS = 64


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """All that the host must know to launch a forward pass."""

    num_decode_rows: int | None  # None: known to the device alone, so that one graph serves any mixture
    num_rows: int
    num_tokens: int
    num_sampling_rows: int
    max_query_len: int
    max_kv_len: int


class StepProgram:
    """Owns the buffers between the parts of a step, and launches them.

    Attributes:
        layered: the chunk that is computed layer by layer.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Qwen3,
        ops: Ops,
        state: BatchState,
        edits: EditTables,
        inputs: StepInputs,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        model_config, options = config.model_config, config.options
        max_rows, max_tokens = options.max_num_seqs, options.max_num_batched_tokens
        self._block_size = config.block_size
        self._model = model
        self._ops = ops
        self._state = state
        self._edits = edits
        self._inputs = inputs
        self._positions = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._cache_slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._kv_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._hidden = torch.zeros((max_rows, model_config.hidden_size), dtype=dtype, device=device)
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.num_alternatives = min(MAX_LOGPROBS, model_config.vocab_size)
        packed = packed_size(self.num_alternatives)
        self.logprobs = torch.zeros((max_rows, packed), dtype=torch.int32, device=device)
        self._attention = create_backend(
            config.attention_backend,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            block_size=config.block_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_blocks_per_row=state.max_blocks,
            device=device,
            dtype=dtype,
        )
        self.layered = LayeredChunk(model, ops, state, self._attention, config.block_size, max_tokens, device, dtype)
        self._kv_cache = torch.empty(0, device=device)

    def set_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. Graphs captured before hold the old one."""
        self._kv_cache = kv_cache

    def forward(self, shape: ForwardShape) -> torch.Tensor:
        """From the step's inputs to the hidden states that `head` reads.

        Returns:
            [tokens, hidden_size] of all tokens; inside a graph its memory belongs to the next one.
        """
        hidden = self._forward(shape)
        sampled = self._inputs.sample_tokens[: shape.num_sampling_rows]
        torch.index_select(hidden, 0, sampled, out=self._hidden[: shape.num_sampling_rows])
        return hidden

    def run_layer(self, layer: int) -> None:
        """One layer of the chunk that was begun last in `layered`."""
        self.layered.run_layer(self._kv_cache, layer)

    def sample_layered(self, row: int) -> None:
        """Lets `head` read, as its row `row`, the last hidden state of the chunk, behind those that `forward` left."""
        self._hidden[row] = self.layered.last_hidden()

    def head(self, rows: int, variant: SamplingVariant) -> None:
        """From hidden states to tokens, which are kept as their slots' last."""
        slots = self._inputs.sample_slots[:rows]
        self._head(self._hidden[:rows], self._state.seq_lens.index_select(0, slots), variant)

    def decode(self, shape: ForwardShape, variant: SamplingVariant) -> None:
        """Both, for a step in which every token is sampled from, in order."""
        self._head(self._forward(shape), self._kv_lens[: shape.num_rows], variant)

    def measure(self, hidden: torch.Tensor, tokens: torch.Tensor, packed: torch.Tensor) -> None:
        """Log-probabilities of tokens by the hidden states before them, see `pack_logprobs_of`."""
        pack_logprobs_of(self._model.logits(hidden), tokens, packed)

    def measure_sampled(self, row: int, packed: torch.Tensor) -> None:
        """The same of one row that the last `forward` and `head` left."""
        self.measure(self._hidden[row : row + 1], self.tokens[row : row + 1], packed)

    def logits(self, rows: int) -> torch.Tensor:
        """[rows, vocab_size] of the hidden states that the last `forward` left."""
        return self._model.logits(self._hidden[:rows])

    def _forward(self, shape: ForwardShape) -> torch.Tensor:
        inputs, state = self._inputs, self._state
        rows, tokens = shape.num_rows, shape.num_tokens
        metadata = AttentionMetadata(
            num_decode_rows=shape.num_decode_rows,
            decode_rows=inputs.decode_rows,
            row_slots=inputs.row_slots[:rows],
            query_start=inputs.query_start[: rows + 1],
            kv_lens=self._kv_lens[:rows],
            positions=self._positions[:tokens],
            cache_slots=self._cache_slots[:tokens],
            block_table=state.block_table,
            max_query_len=shape.max_query_len,
            max_kv_len=shape.max_kv_len,
        )
        token_ids = inputs.token_ids[:tokens]
        self._ops.step_metadata(
            metadata.row_slots, metadata.query_start, metadata.decode_rows, state.seq_lens, state.last_token,
            state.block_table, self._block_size, token_ids, metadata.positions, metadata.cache_slots, metadata.kv_lens,
        )  # fmt: skip
        self._attention.prepare(metadata)
        hidden = self._model.forward(token_ids, self._kv_cache, self._attention, metadata)
        self._ops.commit_lengths(metadata.row_slots, metadata.kv_lens, state.seq_lens)
        return hidden

    def _head(self, hidden: torch.Tensor, positions: torch.Tensor, variant: SamplingVariant) -> None:
        rows, state = hidden.shape[0], self._state
        slots = self._inputs.sample_slots[:rows]
        logits = self._model.logits(hidden)
        if variant < SamplingVariant.EDITED:
            tokens = sample_tokens(logits, slots, positions, state, variant, self._ops)
        else:
            tokens = self._draw_edited(logits, slots, positions, variant)
            self._ops.record_tokens(slots, positions, tokens, self._edits)
        if variant is SamplingVariant.LOGPROBS:
            pack_logprobs_of(logits, tokens, self.logprobs[:rows])
        self._ops.commit_tokens(slots, tokens, state.last_token, self.tokens[:rows])

    def _draw_edited(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, variant: SamplingVariant
    ) -> torch.Tensor:
        """Tokens drawn from edited logits, some rows at a time."""
        tokens = []
        for part in zip(logits.split(_EDITED_ROWS), slots.split(_EDITED_ROWS), positions.split(_EDITED_ROWS)):
            edited = self._ops.edit_logits(*part, self._edits)
            tokens.append(sample_tokens(edited, *part[1:], self._state, variant, self._ops))
        return torch.cat(tokens)
