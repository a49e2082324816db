"""What answers are made of is read off the model's chat template, unless an option says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bundled import MODEL_DIR
from frontend.answer_parser import answer_format
from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from protocol.config import make_options
from protocol.errors import ConfigError
from protocol.launcher_messages import ProcessFailed
from protocol.messages import ChatPrompt
from tests.frontend.conftest import VOCAB_SIZE, Frontend, make_tokenizer

MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CALLS<|im_end|>\n{% endfor %}"
HERMES = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
XML = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>{% endfor %}\n"
    "</function>\n</tool_call>{% endfor %}"
)
EXAMPLE = 'Answer as <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
PLAIN = MESSAGES.replace("CALLS", "")


def load(template: str | None) -> Tokenizer:
    return Tokenizer(make_tokenizer(), VOCAB_SIZE, None if template is None else ChatTemplate(template, {}))


@pytest.mark.parametrize(
    ("template", "has_reasoning", "has_tool_calls"),
    [
        (PLAIN, False, False),
        (PLAIN + "<|im_start|>assistant\n<think>\n{# up to </think> #}", True, False),
        (MESSAGES.replace("CALLS", HERMES), False, True),
        (EXAMPLE + MESSAGES.replace("CALLS", HERMES), False, True),
        # The tags of Qwen3's form around another one, and the form only told of.
        (MESSAGES.replace("CALLS", XML), False, False),
        (EXAMPLE + PLAIN, False, False),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN, False, False),
        (None, False, False),
    ],
)
def test_the_chat_template_shows_what_answers_are_made_of(
    template: str | None, has_reasoning: bool, has_tool_calls: bool
) -> None:
    found = answer_format(make_options({}), load(template))
    assert (found.has_reasoning, found.has_tool_calls) == (has_reasoning, has_tool_calls)


def test_the_bundled_model_thinks_and_calls() -> None:
    found = answer_format(make_options({}), Tokenizer.load(MODEL_DIR, MODEL_DIR / "tokenizer.json", 2048))
    assert (found.has_reasoning, found.has_tool_calls) == (True, True)


def test_options_say_otherwise() -> None:
    off = make_options({"reasoning_parser": "none", "tool_call_parser": "none"})
    on = make_options({"reasoning_parser": "qwen3", "tool_call_parser": "hermes"})
    for options, expected in ((off, False), (on, True)):
        for template in (PLAIN, MESSAGES.replace("CALLS", HERMES) + "{# </think> #}"):
            found = answer_format(options, load(template))
            assert (found.has_reasoning, found.has_tool_calls) == (expected, expected)


@pytest.mark.parametrize(
    ("option", "flag"), [("reasoning_parser", "--reasoning-parser"), ("tool_call_parser", "--tool")]
)
def test_a_parser_needs_text(make_frontend: Callable[..., Frontend], option: str, flag: str) -> None:
    value = "qwen3" if option == "reasoning_parser" else "hermes"
    with pytest.raises(ConfigError, match=flag):
        answer_format(make_options({option: value}), None)
    report = make_frontend(skip_tokenizer_init=True, **{option: value}).start(wait=False).report()
    assert isinstance(report, ProcessFailed)
    assert flag in report.message


@pytest.mark.parametrize(
    ("end", "message", "options", "thinking"),
    [
        ("", "a", {}, "undecided"),
        ("<think>\n", "a", {}, "open"),
        ("<think>\n\n</think>\n\n", "a", {}, "over"),
        ("", "What is <think>", {}, "undecided"),
        ("", "<think>\nSo", {"continue_final_message": True}, "begun"),
        ("", "<think>\nSo\n</think>\n\nYes", {"continue_final_message": True}, "over"),
        ("", "Yes", {"continue_final_message": True}, "over"),
    ],
)
def test_the_prompt_says_where_an_answer_starts(end: str, message: str, options: dict[str, Any], thinking: str) -> None:
    tokenizer = load(
        PLAIN + "{# </think> #}{% if add_generation_prompt %}<|im_start|>assistant\n" + end + "{% endif %}"
    )
    prompt = ChatPrompt([{"role": "user", "content": message}], None, options)
    ids = tokenizer.encode(tokenizer.render_chat(prompt.messages, None, options), add_special_tokens=False)
    found = answer_format(make_options({}), tokenizer)
    assert found.thinking(prompt, ids) == thinking
    assert (found.parser_factory(prompt, ids, parallel=True, stream=True) is None) == (thinking == "over")


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_that_the_template_opens_are_thoughts(
    make_frontend: Callable[..., Frontend], tmp_path: Path, stream: bool
) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    template = "{{ messages[0].content }}<|im_end|><think>\n{# up to </think> #}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    frontend = make_frontend(tmp_path).start()
    # The fake core gives back the beginning of the prompt.
    messages = [{"role": "user", "content": "How big?\n</think>\n\nBig."}]
    text = httpx.post(f"{frontend.url}/v1/chat/completions", json={"messages": messages, "stream": stream}).text
    if stream:
        chunks = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]
        parts = [chunk["choices"][0]["delta"] for chunk in chunks]
    else:
        parts = [json.loads(text)["choices"][0]["message"]]
    assert "".join(part.get("reasoning_content", "") for part in parts) == "How big?"
    assert "".join(part.get("content") or "" for part in parts) == "Big."
