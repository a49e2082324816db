"""Tables of logit edits for kernel tests: random ones for every slot, filled as the worker fills them."""

from __future__ import annotations

import random

import torch

from protocol.arrays import pack_floats, pack_ints
from protocol.logit_edits import LogitEdits
from protocol.messages import AdmittedSlot
from worker.kernels.edit_logits import WORD_TOKENS
from worker.slot_edits import SlotEdits


def admitted(slot: int, token_ids: list[int], num_prompt: int, edits: LogitEdits | None) -> AdmittedSlot:
    return AdmittedSlot(slot, pack_ints(token_ids), num_prompt, 0, b"", 0.0, 0, 1.0, 0.0, 0, edits)


def random_edits(num_slots: int, vocab: int, device: str, seed: int = 0) -> tuple[SlotEdits, torch.Tensor]:
    """Slots with all kinds of edits, each a little different, and the positions of their next tokens [slots] int32."""
    chooser = random.Random(seed)
    edits = SlotEdits(num_slots, vocab, 2, torch.device(device))
    positions = []
    for slot in range(num_slots):
        known = chooser.choices(range(vocab), k=chooser.randrange(3, 60))
        num_prompt = chooser.randrange(1, len(known) + 1)
        positions.append(len(known))
        generated = known[num_prompt:]
        words = [chooser.choices(range(vocab), k=length) for length in (1, 2, WORD_TOKENS)]
        # Words that begin as the last tokens end, some of them in the prompt, where they do not count.
        words += [[*known[len(known) - length :], chooser.randrange(vocab)] for length in (1, 2, 5, WORD_TOKENS - 1)]
        has = [chooser.random() < 0.6 for _ in range(4)]
        each = LogitEdits(
            presence_penalty=chooser.uniform(-2, 2) * has[0],
            frequency_penalty=chooser.uniform(-2, 2) * has[0],
            repetition_penalty=1 + chooser.random() * has[0],
            suppressed_ids=pack_ints(chooser.sample(range(vocab), 3) if has[1] else []),
            suppressed_until=num_prompt + len(generated) + chooser.randrange(-1, 2),
            bias_ids=pack_ints(chooser.sample(range(vocab), 5) if has[1] else []),
            biases=pack_floats([chooser.uniform(-100, 100) for _ in range(5)] if has[1] else []),
            bad_words=[pack_ints(word) for word in words if len(word) <= WORD_TOKENS] if has[2] else [],
            allowed_ids=pack_ints(chooser.sample(range(vocab), vocab // 2)) if has[3] else None,
        )
        edits.admit(admitted(slot, known, num_prompt, each if slot % 5 else None))
    return edits, torch.tensor(positions, dtype=torch.int32, device=device)
