"""Writes `tokenizer.json` for a model that has only an older form of its tokenizer, once, in a process of its own.

`python -m frontend.convert_tokenizer <model directory> <output file>`. This is the only part of the frontend that
needs transformers; the server never imports it.
"""

from __future__ import annotations

import os
import sys


def main(model_path: str, output: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        sys.exit(f"{type(tokenizer).__name__} has no fast form")
    # Renamed when whole, so that a reader never sees half a file.
    backend.save(f"{output}.partial")
    os.replace(f"{output}.partial", output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
