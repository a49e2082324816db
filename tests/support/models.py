"""Models for tests: the bundled one, and random ones of other shapes, each with its transformers reference."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bundled import MODEL_DIR

__all__ = ["MODEL_DIR", "greedy_reference", "make_random_model", "random_prompts", "reference_model"]

RANDOM_EOS = 5


def make_random_model(directory: Path, **changes: object) -> Path:
    """A Qwen3 of a shape unlike the bundled model's: untied head, three query heads to a KV head, odd sizes."""
    shape = {
        "vocab_size": 997,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 160,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "eos_token_id": RANDOM_EOS,
        # Larger than usual, so that the best token leads clearly and greedy decoding is not decided by rounding.
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).float()
    model.save_pretrained(directory)
    return directory


@cache
def reference_model(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()


def greedy_reference(directory: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What transformers' own generation answers to each prompt alone."""
    model = reference_model(directory)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def random_prompts(count: int, vocab_size: int, seed: int = 0, longest: int = 150) -> list[list[int]]:
    """Prompts of mixed length, with the lengths at block boundaries among them."""
    chooser = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, longest]
    lengths += [chooser.randint(1, longest // 2) for _ in range(count - len(lengths))]
    return [chooser.choices(range(vocab_size), k=length) for length in lengths[:count]]
