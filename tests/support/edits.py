"""What penalties, bias and tokens that may not be drawn do to logits, said by their definitions for one row."""

from __future__ import annotations

from collections import Counter

import torch

from protocol.sampling import SamplingParams


def edited_by_definition(
    logits: torch.Tensor,
    prompt: list[int],
    generated: list[int],
    params: SamplingParams,
    bad_words: list[list[int]],
    eos: tuple[int, ...],
) -> torch.Tensor:
    """[vocab] float32 logits from which the next token is drawn, in vLLM's order of operations."""
    edited = logits.float().clone()
    if params.allowed_token_ids is not None:
        banned = torch.ones(len(edited), dtype=torch.bool)
        banned[list(params.allowed_token_ids)] = False
        edited[banned] = -torch.inf
    for *before, last in bad_words:
        if len(before) <= len(generated) and generated[len(generated) - len(before) :] == before:
            edited[last] = -torch.inf
    if len(generated) < params.min_tokens:
        edited[list(params.stop_token_ids)] = -torch.inf
        if not params.ignore_eos:
            edited[list(eos)] = -torch.inf
    for token, bias in params.logit_bias:
        edited[token] += bias
    for token in {*prompt, *generated}:
        if edited[token] > 0:
            edited[token] /= params.repetition_penalty
        else:
            edited[token] *= params.repetition_penalty
    for token, count in Counter(generated).items():
        edited[token] -= params.frequency_penalty * count
        edited[token] -= params.presence_penalty
    return edited
