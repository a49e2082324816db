"""The sampling values a model recommends, which hold for HTTP requests that do not say otherwise.

Read from the model directory's generation_config.json, as vLLM does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from protocol.errors import ConfigError, InvalidRequestError
from protocol.sampling import SamplingParams


class SamplingDefaults(Struct, frozen=True):
    """What holds when a request does not say: 1.0, all tokens and no penalty, unless the model recommends otherwise.

    `max_tokens`, in the file `max_new_tokens`, is of answers that may otherwise fill the context.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def load_sampling_defaults(model_path: Path) -> SamplingDefaults:
    """Raises ConfigError if generation_config.json cannot be read or holds values out of range."""
    file = model_path / "generation_config.json"
    if not file.is_file():
        return SamplingDefaults()
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        names = {name: name for name in SamplingDefaults.__struct_fields__} | {"max_tokens": "max_new_tokens"}
        given = {name: config[written] for name, written in names.items() if config.get(written) is not None}
        SamplingParams(**given)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = error.message if isinstance(error, InvalidRequestError) else error
        if isinstance(error, InvalidRequestError) and error.param == "max_tokens":
            reason = error.message.replace("max_tokens", "max_new_tokens", 1)
        raise ConfigError(f"{file} cannot be used: {reason}") from error
    return SamplingDefaults(**given)
