"""Text to ids, ids to text and conversations to prompts are what transformers makes of the same model directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bundled import MODEL_DIR
from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from frontend.tokenizer_file import tokenizer_file
from protocol.errors import ConfigError, InvalidRequestError
from protocol.model_config import load_model_config
from tests.frontend.conftest import REPOSITORY, VOCAB_SIZE, make_tokenizer

TEXTS = [
    "",
    "The quick brown fox",
    "Größe 日本語 🙂👩‍👩‍👧‍👦\r\n\ttabs  spaces",
    "<|im_start|>user\nhi<|im_end|> and <think>naïve token Ġ</think>",
    "\x00 control \x7f and \ufffd replacement",
]

TOOLS = [{"type": "function", "function": {"name": "größe", "description": '<b>it\'s & "5"</b>', "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "größe", "arguments": {"unit": "m²"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "Größe? <b>&</b> '\"'"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "{{ 1 + 1 }} {% raw %}"},
    ],
    [
        {"role": "user", "content": "How big?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "5 m", "tool_call_id": "1"},
    ],
]


@pytest.fixture(scope="module", params=["small", "bundled"])
def directory(request: pytest.FixtureRequest, model_directory: Path) -> Path:
    return model_directory if request.param == "small" else MODEL_DIR


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory, directory / "tokenizer.json", load_vocab_size(directory))


@pytest.fixture(scope="module")
def reference(directory: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))


def load_vocab_size(directory: Path) -> int:
    return VOCAB_SIZE if directory != MODEL_DIR else load_model_config(directory).vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers(tokenizer: Tokenizer, reference, text: str) -> None:
    assert tokenizer.encode(text) == reference(text)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_decodes_as_transformers(tokenizer: Tokenizer, reference, text: str, skip_special_tokens: bool) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens) == reference.decode(ids, skip_special_tokens=skip_special_tokens)


def test_special_tokens_around_a_text_are_those_of_the_post_processor(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer()
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, tmp_path / "tokenizer.json", VOCAB_SIZE)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hello")[0] == bos
    assert tokenizer.encode("hello") == reference("hello")["input_ids"]
    assert tokenizer.encode("hello", add_special_tokens=False) == tokenizer.encode("hello")[1:]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"thinking": False}])
def test_renders_conversations_as_transformers(tokenizer: Tokenizer, reference, messages, tools, options) -> None:
    expected = reference.apply_chat_template(
        messages, tools=tools, tokenize=False, **({"add_generation_prompt": True} | options)
    )
    assert tokenizer.render_chat(messages, tools, options) == expected


@pytest.mark.parametrize("directory", ["bundled"], indirect=True)
@pytest.mark.parametrize("content", ["It is", "<think>\nLet me see", "<think>\nSeen.\n</think>\n\nIt is"])
def test_continues_a_final_message_as_transformers(tokenizer: Tokenizer, reference, content: str) -> None:
    messages = [{"role": "user", "content": "How big?"}, {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert tokenizer.render_chat(messages, None, {"continue_final_message": True}) == expected
    assert expected.endswith(content)


def test_a_final_message_is_continued_right_where_it_ends() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}", {})
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b \n"}]}]
    assert template.render(messages, None, {"continue_final_message": True}) == "<user>a</><assistant>b \n"


def test_a_final_message_that_is_not_rendered_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match="leaves out") as caught:
        ChatTemplate("fixed", {}).render(CONVERSATIONS[0], None, {"continue_final_message": True})
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
        "{{ eos_token }}|{{ bos_token }}|{{ documents is none }}|{{ tools is none }}",
        "{{ strftime_now('%Y-%m') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "  {% if true %}\n  lstrip and trim\n  {% endif %}\nend",
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    ],
)
def test_templates_find_the_environment_of_transformers(reference, template: str) -> None:
    messages = [{"role": "user", "content": "Größe & <b>"}, {"role": "user", "content": "zwei"}]
    rendered = ChatTemplate(template, {"eos_token": "<|im_end|>"}).render(messages)
    assert rendered == reference.apply_chat_template(messages, chat_template=template, tokenize=False)


def test_text_parts_are_joined_and_empty_fields_dropped() -> None:
    template = ChatTemplate("{{ messages | tojson }}", {})
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": parts, "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []},
    ]
    first, second = json.loads(template.render(messages))
    assert first == {"role": "user", "content": "one\ntwo"}
    assert second["content"] == ""
    assert second["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize("directory", ["small"], indirect=True)
@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "at least one"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a list, got 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] must be a text part, got 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\].text"),
        ([{"role": "user", "content": "a", "mood": "bad"}], r"messages\[0\].mood is not supported"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], r"tool_calls\[0\] must have a function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\].function.arguments is not JSON",
        ),
        ([{"role": "forbidden", "content": "a"}], "no such role here"),
    ],
)
def test_messages_that_are_wrong_are_refused_by_field(tokenizer: Tokenizer, messages, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        tokenizer.render_chat(messages)
    assert caught.value.param == "messages"


def test_options_cannot_replace_the_messages(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="messages") as caught:
        tokenizer.render_chat(CONVERSATIONS[0], None, {"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_a_template_cannot_leave_the_sandbox() -> None:
    template = ChatTemplate("{{ messages.append(1) }}{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequestError, match="chat template refused"):
        template.render(CONVERSATIONS[0])


def test_a_template_that_does_not_compile_is_an_error_of_the_start() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_named_templates_and_files(tmp_path: Path, model_directory: Path) -> None:
    shutil.copy(model_directory / "tokenizer.json", tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer.load(tmp_path, tmp_path / "tokenizer.json", VOCAB_SIZE)
    assert tokenizer.render_chat(CONVERSATIONS[0]) == "plain"
    assert tokenizer.render_chat(CONVERSATIONS[0], TOOLS) == "tools"
    (tmp_path / "chat_template.jinja").write_text("the file")
    tokenizer = Tokenizer.load(tmp_path, tmp_path / "tokenizer.json", VOCAB_SIZE)
    assert tokenizer.render_chat(CONVERSATIONS[0]) == "the file"


def test_a_model_without_a_chat_template_says_so(tmp_path: Path, model_directory: Path) -> None:
    tokenizer = Tokenizer.load(tmp_path, model_directory / "tokenizer.json", VOCAB_SIZE)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.render_chat(CONVERSATIONS[0])


def test_tokens_that_only_the_configuration_knows_are_added(tmp_path: Path, model_directory: Path) -> None:
    size = make_tokenizer().get_vocab_size()
    added = {str(size): {"content": "<|late|>", "special": True}, str(size + 1): {"content": "<soft>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(tmp_path, model_directory / "tokenizer.json", VOCAB_SIZE)
    assert tokenizer.encode("<|late|><soft>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<soft>"


def test_tokens_that_only_the_configuration_calls_special_are(tmp_path: Path, model_directory: Path) -> None:
    plain = make_tokenizer()
    word = plain.encode("quick").ids[0]
    added = {str(word): {"content": plain.id_to_token(word), "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(tmp_path, model_directory / "tokenizer.json", VOCAB_SIZE)
    assert tokenizer.decode([word]) == ""
    assert tokenizer.decode([word], skip_special_tokens=False) == plain.decode([word])
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(word) + detokenizer.flush() == ""


async def test_a_model_without_any_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--skip-tokenizer-init"):
        await tokenizer_file(tmp_path, tmp_path)


async def test_an_older_form_is_converted_in_a_process_of_its_own(tmp_path: Path, model_directory: Path) -> None:
    model = json.loads((model_directory / "tokenizer.json").read_text())["model"]
    older = tmp_path / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps(model["vocab"]))
    (older / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (older / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    file = await tokenizer_file(older, tmp_path)
    assert file == tmp_path / "tokenizer.json"
    converted = Tokenizer.load(older, file, VOCAB_SIZE)
    text = "The quick brown fox, Größe 日本語"
    assert converted.decode(converted.encode(text)) == text
    assert converted.encode("quick") == make_tokenizer().encode("quick").ids


async def test_a_conversion_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"cannot be converted .*--skip-tokenizer-init"):
        await tokenizer_file(tmp_path, tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path, tmp_path / "tokenizer.json", VOCAB_SIZE)


def test_the_server_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, frontend.server; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
