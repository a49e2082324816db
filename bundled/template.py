"""Renders conversations with the bundled chat template, the way transformers' apply_chat_template does.

Training and evaluation render through here, so that what is trained is what is served.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from bundled import MODEL_DIR


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which no chat template wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@functools.cache
def _compiled(path: Path) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _tojson
    return environment.from_string(path.read_text(encoding="utf-8"))


def render(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, enable_thinking: bool = True
) -> str:
    """The prompt of a conversation, up to where the assistant's answer begins."""
    template = _compiled(MODEL_DIR / "chat_template.jinja")
    return template.render(
        messages=messages, tools=tools or None, add_generation_prompt=True, enable_thinking=enable_thinking
    )
