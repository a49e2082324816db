"""Makes the bundled model: a byte-level BPE tokenizer and a small Qwen3, both from the text of corpus.py.

Run `python -m bundled.train --device cuda`. It writes an ordinary Hugging Face model directory; only the
weights depend on the hardware, everything else is the same on every machine.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from bundled import MODEL_DIR
from bundled.corpus import END_OF_TEXT, END_OF_TURN, Sample, held_out, samples

VOCAB_SIZE = 2048
MAX_LENGTH = 2048
ROW_LENGTH = 1024  # tokens of a training row, into which whole conversations are packed
SAMPLES_PER_SHARD = 2500
TOKENIZER_SAMPLES = 20_000

# Qwen2's and Qwen3's split of text before BPE: words with their leading space, single digits, runs of signs.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
# Qwen3 keeps these in the decoded text, so they are not special.
TAG_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the corpus: all 256 bytes, then merges, and the added tokens last, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL_TOKENS) + len(TAG_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_texts_for_tokenizer(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def _texts_for_tokenizer() -> Iterator[str]:
    """Training text without its tags, which are tokens of their own already."""
    for sample in samples(seed=0, count=TOKENIZER_SAMPLES):
        text = sample.text
        for token in (*SPECIAL_TOKENS, *TAG_TOKENS):
            text = text.replace(token, "\n")
        yield text


def model_config(tokenizer: Tokenizer) -> dict[str, object]:
    """What config.json holds: read alike by transformers 4.57 (rope_theta) and 5 (rope_parameters)."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 576,
        "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": 5,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def write_directory(output: Path, tokenizer: Tokenizer) -> None:
    """Write all of the model directory but its weights."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    template = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    (output / "chat_template.jinja").write_text(template, encoding="utf-8")
    end, text_end = tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *TAG_TOKENS)
    }
    files: dict[str, dict[str, object]] = {
        "config.json": model_config(tokenizer),
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": [end, text_end],
            "pad_token_id": text_end,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": ["<|im_start|>", END_OF_TURN],
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TURN,
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (output / name).write_text(text + "\n", encoding="utf-8")


def _counted(sample: Sample, offsets: list[tuple[int, int]]) -> list[bool]:
    """Which tokens lie in a span that the loss counts. Spans and tokens both run from left to right."""
    counted, spans, index = [], sample.spans, 0
    for start, end in offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        counted.append(index < len(spans) and spans[index][0] <= start and end <= spans[index][1])
    return counted


def make_rows(task: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[str]]:
    """Pack a shard of samples into rows: tokens, targets, sample numbers (each [rows, T]), and its questions.

    `task` is (tokenizer as JSON, seed, number of samples). A target is the next token, or -100 where the loss
    does not count. Tokens of equal sample numbers in a row may attend to each other; 0 is padding.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes of the pool are parallel enough
    tokenizer_json, seed, count = task
    tokenizer = Tokenizer.from_str(tokenizer_json)
    keys: set[str] = set()
    drawn = list(samples(seed, count, keys))
    rows: list[list[tuple[list[int], list[int]]]] = []
    free: list[list[int]] = []  # [row, room] of rows that still take samples
    encodings = tokenizer.encode_batch([sample.text for sample in drawn])
    for sample, encoding in zip(drawn, encodings, strict=True):
        ids = encoding.ids[:ROW_LENGTH]
        counted = _counted(sample, encoding.offsets)
        targets = [following if counts else -100 for following, counts in zip(ids[1:], counted[1:], strict=False)] + [
            -100
        ]
        place = next((entry for entry in free if entry[1] >= len(ids)), None)
        if place is None:
            rows.append([])
            place = [len(rows) - 1, ROW_LENGTH]
            free.append(place)
        rows[place[0]].append((ids, targets))
        place[1] -= len(ids)
        free = [entry for entry in free[-48:] if entry[1] > 24]
    shape = (len(rows), ROW_LENGTH)
    tokens, numbers = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    labels = np.full(shape, -100, np.int16)
    for row, packed in enumerate(rows):
        at = 0
        for number, (ids, targets) in enumerate(packed, 1):
            tokens[row, at : at + len(ids)] = ids
            labels[row, at : at + len(ids)] = targets
            numbers[row, at : at + len(ids)] = number
            at += len(ids)
    return tokens, labels, numbers, keys


def make_data(tokenizer: Tokenizer, count: int, workers: int) -> list[torch.Tensor]:
    """All training rows: tokens, targets and sample numbers, each int16 [rows, ROW_LENGTH]."""
    text = tokenizer.to_str()
    tasks = [(text, 1000 + shard, SAMPLES_PER_SHARD) for shard in range(math.ceil(count / SAMPLES_PER_SHARD))]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        shards = pool.map(make_rows, tasks, chunksize=1)
    asked: set[str] = set().union(*(shard[3] for shard in shards))
    common = asked & {item.key for item in held_out()}
    assert not common, f"held-out questions in the training set: {common}"
    return [torch.from_numpy(np.concatenate([shard[part] for shard in shards])) for part in range(3)]


def loss_of(
    model: Qwen3ForCausalLM, tokens: torch.Tensor, targets: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy over the counted targets. Arguments are [rows, T]; samples do not see each other."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)
    mask = (numbers[:, :, None] == numbers[:, None, :]) & (positions[:, None] >= positions[None, :])
    hidden = model.model(
        input_ids=tokens, attention_mask=mask[:, None], position_ids=positions[None], use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train(
    model: Qwen3ForCausalLM,
    data: list[torch.Tensor],
    steps: int,
    batch_rows: int,
    peak_rate: float,
    max_seconds: float,
    compiled: bool,
) -> int:
    """AdamW with a warm-up and a cosine to zero, which `max_seconds` hastens; returns the steps made."""
    device = next(model.parameters()).device
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    step_loss = torch.compile(loss_of) if compiled else loss_of
    data = [part.to(device) for part in data]
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.long)
    warm_up = min(200, steps // 10 + 1)
    started, done = time.monotonic(), 0
    first_done = started
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - first_done) / max_seconds if step else 0.0)
        if progress >= 1:
            break
        rate = peak_rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(order) < batch_rows:
            order = torch.randperm(len(data[0]), generator=generator)
        chosen, order = order[:batch_rows].to(device), order[batch_rows:]
        tokens, targets, numbers = (part[chosen].long() for part in data)
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_loss(model, tokens, targets, numbers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if step == 0:
            first_done = time.monotonic()  # the first step compiles, which is no part of the time limit
        if step % 200 == 0 or step == steps - 1:
            print(
                f"step {step:5d}  loss {loss.item():.4f}  rate {rate:.2e}  {time.monotonic() - started:6.1f} s",
                flush=True,
            )
    return done


def save_weights(model: Qwen3ForCausalLM, output: Path) -> None:
    """Write model.safetensors in bfloat16, without the head, which is the embedding."""
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    parser.add_argument("--samples", type=int, default=400_000, help="conversations and documents to train on")
    parser.add_argument("--batch-rows", type=int, default=64, help=f"rows of {ROW_LENGTH} tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--max-seconds", type=float, default=3600, help="time limit of the training steps")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    arguments = parser.parse_args()
    started = time.monotonic()
    tokenizer = train_tokenizer()
    write_directory(arguments.output, tokenizer)
    print(f"tokenizer: {time.monotonic() - started:.1f} s", flush=True)
    data = make_data(tokenizer, arguments.samples, arguments.workers)
    print(
        f"data: {len(data[0])} rows, {(data[1] != -100).sum().item()} counted targets, "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = Qwen3Config.from_pretrained(arguments.output)
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).float().to(arguments.device)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
    steps = train(
        model, data, arguments.steps, arguments.batch_rows, arguments.rate, arguments.max_seconds, arguments.compile
    )
    save_weights(model, arguments.output)
    print(f"{steps} steps, {time.monotonic() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
