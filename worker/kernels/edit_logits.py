"""Changes a row's logits by its slot's options before a token is drawn, and keeps count of the tokens drawn.

Penalties, bias, bad words, allowed tokens and tokens that must wait are tables by slot on the device, because two
steps are in flight: the host does not know yet which tokens a row has. A slot's *header* says which apply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.kernels._triton import cdiv, tl, triton
from worker.kernels.gumbel_sample import load_stretch, stretch_size

# Tokens of a bad word at most, and of each slot's last tokens that are kept to recognise one.
WORD_TOKENS = 16
HEADER_SIZE = 8
# Of a header's first entry: what applies to the slot. 0 where nothing does.
HAS_PENALTIES, HAS_ALLOWED, HAS_LISTS = 1, 2, 4
# In the count of a token: it is in the prompt. The other 15 bits say how often it was generated, and stop at the most.
IN_PROMPT = -(2**15)
MOST_COUNTED = 2**15 - 1


@dataclass(frozen=True, slots=True)
class EditTables:
    """By slot, the last one being the null slot, whose header is 0.

    Attributes:
        headers: [slots + 1, 8] int32: what applies, prompt length, number of suppressed tokens, the position from
            which on they may be drawn, length of the bias list (the suppressed ones among it), number of bad words.
        penalties: [slots + 1, 4] fp32: repetition, frequency, presence.
        bias_ids, biases: [slots + 1, longest] int32 and fp32, the suppressed tokens first, with a bias of -inf.
        bad_words: [slots + 1, most, 16] int32, each word at the end of its row, -1 before it.
        recent: [slots + 1, 16] int32, the token generated at position p in column p % 16.
        allowed: [slots + 1, ceil(vocab / 32)] int32, a bit a token.
        counts: [slots + 1, vocab] int16, see `IN_PROMPT`.
    """

    headers: torch.Tensor
    penalties: torch.Tensor
    bias_ids: torch.Tensor
    biases: torch.Tensor
    bad_words: torch.Tensor
    recent: torch.Tensor
    allowed: torch.Tensor
    counts: torch.Tensor

    @staticmethod
    def allocate(
        num_slots: int, vocab_size: int, max_biases: int, max_bad_words: int, device: torch.device
    ) -> EditTables:
        """Tables in which nothing applies to any slot."""
        rows = num_slots + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros((rows, *shape), dtype=dtype, device=device)

        return EditTables(
            headers=zeros(HEADER_SIZE),
            penalties=zeros(4, dtype=torch.float32),
            bias_ids=zeros(max_biases),
            biases=zeros(max_biases, dtype=torch.float32),
            bad_words=zeros(max_bad_words, WORD_TOKENS),
            recent=zeros(WORD_TOKENS),
            allowed=zeros(cdiv(vocab_size, 32)),
            counts=zeros(vocab_size, dtype=torch.int16),
        )


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr", "positions_ptr"])
def _edit_kernel(
    logits_ptr,
    row_slots_ptr,
    positions_ptr,
    headers_ptr,
    penalties_ptr,
    bias_ids_ptr,
    biases_ptr,
    bad_words_ptr,
    recent_ptr,
    allowed_ptr,
    counts_ptr,
    edited_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_BIASES: tl.constexpr,
    MAX_WORDS: tl.constexpr,
    WORD: tl.constexpr,
):
    stretch = tl.program_id(0)
    row = tl.program_id(1)
    logits = load_stretch(logits_ptr, logits_stride, row, stretch, VOCAB, BLOCK)
    first = stretch * BLOCK
    index = first + tl.arange(0, BLOCK)
    inside = index < VOCAB
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    header = headers_ptr + slot * 8
    applies = tl.load(header)
    # -inf is added, never set: a NaN stays one, and +inf becomes one, so that the sampler still sees them.
    if (applies & 4) != 0:
        position = tl.load(positions_ptr + row)
        num_prompt = tl.load(header + 1)
        num_suppressed = tl.load(header + 2)
        begin = tl.where(position < tl.load(header + 3), 0, num_suppressed)
        for i in range(begin, tl.load(header + 4)):
            token = tl.load(bias_ids_ptr + slot * MAX_BIASES + i)
            if (token >= first) & (token < first + BLOCK):
                bias = tl.load(biases_ptr + slot * MAX_BIASES + i)
                logits = tl.where(index == token, logits + bias, logits)
        offset = tl.arange(0, WORD)
        # The word's last token would be the one at `position`; column WORD - 1 of what came is of no use.
        before = position - (WORD - 1) + offset
        came = tl.load(recent_ptr + slot * WORD + (before + WORD) % WORD)
        for i in range(tl.load(header + 5)):
            word = bad_words_ptr + (slot * MAX_WORDS + i) * WORD
            token = tl.load(word + WORD - 1)
            if (token >= first) & (token < first + BLOCK):
                wanted = tl.load(word + offset)
                fits = (wanted == -1) | (offset == WORD - 1) | ((wanted == came) & (before >= num_prompt))
                banned = tl.min(fits.to(tl.int32), axis=0) == 1
                logits = tl.where((index == token) & banned, logits + -float("inf"), logits)
    if (applies & 2) != 0:
        bits = tl.load(allowed_ptr + slot * ((VOCAB + 31) // 32) + index // 32, mask=inside, other=0)
        logits = tl.where(((bits >> (index % 32)) & 1) == 1, logits, logits + -float("inf"))
    if (applies & 1) != 0:
        count = tl.load(counts_ptr + slot * VOCAB + index, mask=inside, other=0).to(tl.int32)
        repetition = tl.load(penalties_ptr + slot * 4)
        frequency = tl.load(penalties_ptr + slot * 4 + 1)
        presence = tl.load(penalties_ptr + slot * 4 + 2)
        repeated = tl.where(logits > 0.0, logits / repetition, logits * repetition)
        logits = tl.where(count != 0, repeated, logits)
        generated = count & 0x7FFF
        logits -= frequency * generated.to(tl.float32)
        logits -= tl.where(generated > 0, presence, 0.0)
    tl.store(edited_ptr + row.to(tl.int64) * VOCAB + index, logits, mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_slots_ptr", "positions_ptr", "token_ptr"])
def _record_kernel(
    row_slots_ptr,
    positions_ptr,
    token_ptr,
    headers_ptr,
    recent_ptr,
    counts_ptr,
    rows,
    VOCAB: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    slot = tl.load(row_slots_ptr + row, mask=mask, other=0).to(tl.int64)
    token = tl.load(token_ptr + row, mask=mask, other=-1)
    applies = tl.load(headers_ptr + slot * 8, mask=mask, other=0)
    counted = (token >= 0) & ((applies & 1) != 0)
    count = tl.load(counts_ptr + slot * VOCAB + token, mask=counted, other=0)
    more = ((count & 0x7FFF) < 0x7FFF).to(tl.int16)
    tl.store(counts_ptr + slot * VOCAB + token, count + more, mask=counted)
    position = tl.load(positions_ptr + row, mask=mask, other=0)
    tl.store(recent_ptr + slot * WORD + position % WORD, token, mask=(token >= 0) & ((applies & 4) != 0))


_RECORD_BLOCK = 128


def edit_logits(
    logits: torch.Tensor, row_slots: torch.Tensor, positions: torch.Tensor, tables: EditTables
) -> torch.Tensor:
    """The logits that tokens are drawn from, in vLLM's order: what may not be drawn, bias, penalties.

    Reads rows * vocab logits and writes as many in fp32; rows with penalties read 2 bytes more a logit.

    Args:
        logits: [rows, vocab] fp32 or bf16, rows may be strided.
        row_slots: [rows] int32.
        positions: [rows] int32, position of the token being drawn.

    Returns:
        [rows, vocab] fp32; a NaN stays one, wherever it stands.
    """
    rows, vocab = logits.shape
    edited = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return edited
    block = stretch_size(vocab)
    _edit_kernel[(cdiv(vocab, block), rows)](
        logits,
        row_slots,
        positions,
        tables.headers,
        tables.penalties,
        tables.bias_ids,
        tables.biases,
        tables.bad_words,
        tables.recent,
        tables.allowed,
        tables.counts,
        edited,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=block,
        MAX_BIASES=tables.biases.shape[1],
        MAX_WORDS=tables.bad_words.shape[1],
        WORD=WORD_TOKENS,
        num_warps=4,
    )
    return edited


def record_tokens(row_slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, tables: EditTables) -> None:
    """Counts the tokens drawn, and keeps them as their slots' latest, where the slot's options ask for it.

    Args:
        row_slots: [rows] int32, distinct but for the null slot.
        positions: [rows] int32, the tokens' positions.
        tokens: [rows] int32; -1 is passed over.
    """
    rows = row_slots.shape[0]
    _record_kernel[(cdiv(rows, _RECORD_BLOCK),)](
        row_slots,
        positions,
        tokens,
        tables.headers,
        tables.recent,
        tables.counts,
        rows,
        VOCAB=tables.counts.shape[1],
        WORD=WORD_TOKENS,
        BLOCK=_RECORD_BLOCK,
        num_warps=4,
    )


def edit_logits_reference(
    logits: torch.Tensor, row_slots: torch.Tensor, positions: torch.Tensor, tables: EditTables
) -> torch.Tensor:
    """`edit_logits` in plain torch, for any device; only rows to which something applies pay for it."""
    edited = logits.float().clone()
    for row, slot in enumerate(row_slots.tolist()):
        applies, num_prompt, num_suppressed, until, num_biases, num_words = tables.headers[slot, :6].tolist()
        if applies & HAS_LISTS:
            position = int(positions[row])
            biased = slice(0 if position < until else num_suppressed, num_biases)
            edited[row].index_add_(0, tables.bias_ids[slot, biased], tables.biases[slot, biased])
            recent = tables.recent[slot].tolist()
            for word in tables.bad_words[slot, :num_words].tolist():
                *before, token = [each for each in word if each >= 0]
                start = position - len(before)
                came = [recent[at % WORD_TOKENS] for at in range(start, position)]
                if not before or (start >= num_prompt and came == before):
                    edited[row, token] += -torch.inf
        if applies & HAS_ALLOWED:
            bits = tables.allowed[slot, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
            edited[row] += torch.where((bits & 1).flatten()[: logits.shape[1]] == 1, 0.0, -torch.inf)
        if applies & HAS_PENALTIES:
            repetition, frequency, presence, _ = tables.penalties[slot]
            count = tables.counts[slot].int()
            mine = edited[row]
            repeated = torch.where(mine > 0, mine / repetition, mine * repetition)
            generated = count & MOST_COUNTED
            edited[row] = torch.where(count != 0, repeated, mine)
            edited[row] -= frequency * generated
            edited[row] -= torch.where(generated > 0, presence, 0.0)
    return edited


def record_tokens_reference(
    row_slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, tables: EditTables
) -> None:
    """`record_tokens` in plain torch, for any device."""
    applies = tables.headers[row_slots, 0]
    counted = torch.nonzero((tokens >= 0) & ((applies & HAS_PENALTIES) != 0)).flatten()
    at = row_slots[counted], tokens[counted]
    count = tables.counts[at]
    tables.counts[at] = count + ((count & MOST_COUNTED) < MOST_COUNTED).to(torch.int16)
    kept = torch.nonzero((tokens >= 0) & ((applies & HAS_LISTS) != 0)).flatten()
    tables.recent[row_slots[kept], positions[kept] % WORD_TOKENS] = tokens[kept]
