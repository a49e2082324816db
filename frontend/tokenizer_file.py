"""Finds a model's tokenizer.json, or has it made from an older form of the tokenizer.

The conversion needs transformers, and with it torch, so it runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from protocol.errors import ConfigError

# Files from which transformers can make a tokenizer.json.
_OLDER_FORMS = ("vocab.json", "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_HINT = "add its tokenizer.json, or start with --skip-tokenizer-init to serve token ids only"


async def tokenizer_file(model_path: Path, run_directory: Path) -> Path:
    """The model's own tokenizer.json, or one made in `run_directory`.

    Raises:
        ConfigError: the model has no tokenizer, or none that can be converted.
    """
    file = model_path / "tokenizer.json"
    if file.is_file():
        return file
    if not any((model_path / name).is_file() for name in _OLDER_FORMS):
        raise ConfigError(f"{model_path} has no tokenizer: {_HINT}")
    output = run_directory / "tokenizer.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontend.convert_tokenizer", str(model_path), str(output)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        reason = (stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"the tokenizer of {model_path} cannot be converted ({reason}): {_HINT}")
    return output
