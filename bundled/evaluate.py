"""Asks the bundled model its held-out questions, greedily, and prints how many it answers right.

Run `python -m bundled.evaluate`. It uses transformers, and so measures the model rather than the engine.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, Qwen3ForCausalLM

from bundled import MODEL_DIR
from bundled.corpus import END_OF_TEXT, END_OF_TURN, HeldOut, held_out

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def tool_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls in an answer as (name, arguments), or an empty list if any is malformed."""
    calls = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
            calls.append((call["name"], call["arguments"]))
        except (ValueError, KeyError, TypeError):
            return []
    return calls


def is_right(item: HeldOut, text: str) -> bool:
    """Mark the raw text generated for a question, special tokens included.

    A question that is thought about must open with a closed think block, any other must have none, and an
    answer of the chat must end with its end-of-turn token.
    """
    if item.check == "begins":
        return text.startswith(item.answer)
    if not text.endswith(END_OF_TURN):
        return False
    text = text.removesuffix(END_OF_TURN)
    if item.thinks:
        thought, closed, text = text.partition("\n</think>\n\n")
        if not (closed and thought.startswith("<think>\n") and len(thought) > len("<think>\n")):
            return False
    if "<think>" in text or "</think>" in text:
        return False
    if item.check == "calls":
        rest = _CALL.sub("", text).strip()
        return not rest and tool_calls(text) == item.calls
    if item.check == "list":
        parts = re.split(r", | and |\n?- ", text.strip().rstrip("."))
        names = [part.strip().lower() for part in parts if part.strip()]
        allowed = {name.lower() for name in item.need[1:]}
        return len(names) == int(item.need[0]) == len(set(names)) and set(names) <= allowed
    if item.check == "story":
        return all(word in text for word in item.need) and 40 <= len(text.split()) <= 260
    if item.check == "contains":
        return all(word in text for word in item.need)
    return text == item.answer


@torch.inference_mode()
def generate(
    model: Qwen3ForCausalLM,
    tokenizer: Any,
    prompts: list[str],
    batch_size: int = 64,
    max_new_tokens: int = 320,
    **sampling: Any,
) -> list[str]:
    """Continue prompts, greedily unless told otherwise. Special tokens are kept, up to the first end."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        output = model.generate(
            **batch,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=max_new_tokens,
                eos_token_id=list(model.generation_config.eos_token_id),
                pad_token_id=model.generation_config.pad_token_id,
                **({"do_sample": False} | sampling),
            ),
        )
        for index, row in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=False)
            cut = re.search(f"{re.escape(END_OF_TURN)}|{re.escape(END_OF_TEXT)}", text)
            texts[index] = text[: cut.end()] if cut else text
    return texts


def load(
    path: Path = MODEL_DIR, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Qwen3ForCausalLM, Any]:
    """The model and its tokenizer, ready to generate."""
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=dtype)
    # Greedy unless `generate` is told otherwise: the shipped defaults sample.
    ends = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--per-category", type=int, default=24)
    parser.add_argument("--sample", action="store_true", help="sample as generation_config.json says, seed 0")
    parser.add_argument("--show-wrong", type=int, default=0, help="print up to so many wrong answers a category")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    items = held_out(arguments.per_category)
    sampling: dict[str, Any] = {}
    if arguments.sample:
        torch.manual_seed(0)
        defaults = transformers.GenerationConfig.from_pretrained(arguments.model)
        sampling = {
            "do_sample": True,
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
        }
    texts = generate(model, tokenizer, [item.prompt for item in items], **sampling)
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for item, text in zip(items, texts, strict=True):
        asked[item.category] += 1
        right[item.category] += is_right(item, text)
        if not is_right(item, text) and asked[item.category] - right[item.category] <= arguments.show_wrong:
            print(
                f"{item.category}: {item.prompt[-160:]!r}\n    expected {item.answer or item.calls!r}\n    got {text!r}"
            )
    for category, count in asked.items():
        print(f"{category:16s} {right[category]:3d} / {count:3d}  {right[category] / count:6.1%}")
    total = sum(asked.values())
    print(f"{'total':16s} {sum(right.values()):3d} / {total:3d}  {sum(right.values()) / total:6.1%}")


if __name__ == "__main__":
    main()
