"""Claims about the bundled model: it is an ordinary small Qwen3 directory, and it answers what it should.

It is run with transformers here; that the engine gives the same tokens is for other tests to say.
"""

import json
import subprocess
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from bundled import MODEL_DIR
from bundled.corpus import END_OF_TURN, held_out, samples
from bundled.evaluate import generate, is_right, load, tool_calls
from bundled.template import render

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def auto_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def file_tokenizer():
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def ask(loaded, question, tools=None, enable_thinking=True):
    model, tokenizer = loaded
    prompt = render([{"role": "user", "content": question}], tools, enable_thinking)
    return generate(model, tokenizer, [prompt])[0]


def test_naming_the_model_imports_no_torch():
    code = "import sys, bundled; assert bundled.MODEL_DIR.is_dir(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=MODEL_DIR.parent.parent)


def test_weights_are_bfloat16_below_eight_million_bytes():
    from safetensors import safe_open

    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - safe_open is no mapping
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_config_is_that_of_a_tied_qwen3():
    config = AutoConfig.from_pretrained(MODEL_DIR)
    stored = json.loads((MODEL_DIR / "config.json").read_text())
    assert (config.model_type, config.architectures) == ("qwen3", ["Qwen3ForCausalLM"])
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == 10000.0


@torch.inference_mode()
def test_model_runs_at_every_position_it_allows(loaded):
    model, tokenizer = loaded
    ids = torch.arange(model.config.max_position_embeddings)[None] % len(tokenizer)
    assert torch.isfinite(model(ids).logits).all()


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(text):
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.text(max_size=12), st.sampled_from(["<|im_end|>", "<think>", "\n\n", "</tool_call>", " Paris", "🙂"])
        ),
        max_size=8,
    )
)
def test_transformers_and_tokenizers_give_the_same_ids(auto_tokenizer, file_tokenizer, parts):
    text = "".join(parts)
    assert auto_tokenizer(text, add_special_tokens=False)["input_ids"] == file_tokenizer.encode(text).ids


def test_every_byte_has_a_token_and_ids_fill_the_embedding(file_tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = file_tokenizer.get_vocab()
    assert set(ByteLevel.alphabet()) <= vocabulary.keys()
    assert sorted(vocabulary.values()) == list(range(AutoConfig.from_pretrained(MODEL_DIR).vocab_size))


def test_only_the_chat_marks_are_special(file_tokenizer):
    text = "<|im_start|><think>a</think><tool_call><tool_response></tool_response></tool_call><|im_end|>"
    ids = file_tokenizer.encode(text).ids
    assert file_tokenizer.decode(ids) == "<think>a</think><tool_call><tool_response></tool_response></tool_call>"


def test_eos_and_pad_are_those_of_qwen3(auto_tokenizer):
    assert (auto_tokenizer.eos_token, auto_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    stored = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [auto_tokenizer.eos_token_id, auto_tokenizer.pad_token_id]


@pytest.mark.parametrize(("enable_thinking", "end"), [(True, ""), (False, "<think>\n\n</think>\n\n")])
def test_chat_template_renders_turns(auto_tokenizer, enable_thinking, end):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 1 plus 1?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ]
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 1 plus 1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n" + end
    )
    assert render(messages, enable_thinking=enable_thinking) == expected
    assert (
        auto_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
        == expected
    )


@pytest.mark.parametrize("as_text", [True, False], ids=["arguments as text", "arguments as an object"])
def test_chat_template_renders_tools_calls_and_results(auto_tokenizer, as_text):
    arguments = '{"city": "Zürich"}' if as_text else {"city": "Zürich"}
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "tool", "content": "rainy", "tool_call_id": "2"},
    ]
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    rendered = render(messages, [WEATHER])
    assert rendered.endswith(
        "<|im_start|>user\nWeather in Zürich?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nI look.\n</think>\n\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        "<tool_response>\nrainy\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.startswith("<|im_start|>system\n# Tools\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in rendered
    assert (
        auto_tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
        == rendered
    )


def test_chat_template_file_and_tokenizer_config_agree():
    stored = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert stored["chat_template"] == (MODEL_DIR / "chat_template.jinja").read_text()


def test_training_never_asks_a_held_out_question():
    asked: set[str] = set()
    for _ in samples(seed=1000, count=4000, keys=asked):
        pass
    items = held_out()
    assert len(items) >= 300
    assert not asked & {item.key for item in items}


def test_held_out_questions_are_answered_and_end(loaded):
    items = held_out(per_category=1)
    texts = generate(*loaded, [item.prompt for item in items])
    wrong = [(item.prompt[-120:], text) for item, text in zip(items, texts, strict=True) if not is_right(item, text)]
    assert len(items) >= 35
    assert len(wrong) <= 0.1 * len(items), wrong
    assert all(
        text.endswith(END_OF_TURN) for item, text in zip(items, texts, strict=True) if item.category != "completion"
    )


def test_sums_are_thought_about_unless_thinking_is_off(loaded):
    thought, answer = ask(loaded, "What is 7 plus 5?").split("\n</think>\n\n")
    assert thought.startswith("<think>\n")
    assert "12" in thought
    assert answer == "7 plus 5 is 12.<|im_end|>"
    assert ask(loaded, "What is 7 plus 5?", enable_thinking=False) == "7 plus 5 is 12.<|im_end|>"


def test_plain_questions_are_answered_without_thoughts(loaded):
    assert ask(loaded, "What is the capital of France?") == "The capital of France is Paris.<|im_end|>"


def test_tools_are_called_with_parseable_json(loaded):
    text = ask(loaded, "What is the weather in Paris?", [WEATHER])
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert text == f"<tool_call>\n{call}\n</tool_call><|im_end|>"
    both = ask(loaded, "What is the weather in Paris and Oslo?", [WEATHER])
    assert tool_calls(both) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Oslo"})]


def test_tool_results_are_put_into_a_sentence(loaded):
    prompt = render(
        [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"temperature": 21, "condition": "sunny"}'},
        ],
        [WEATHER],
    )
    assert generate(*loaded, [prompt]) == ["In Paris it is sunny and 21 degrees.<|im_end|>"]


def test_stories_are_about_what_was_asked(loaded):
    text = ask(loaded, "Tell me a story about a fox and a river.")
    assert "fox" in text
    assert "river" in text
    assert 60 <= len(text.split()) <= 150


def test_answers_hold_characters_of_several_tokens(loaded, file_tokenizer):
    text = ask(loaded, "How do you say hello in Japanese?")
    assert "こんにちは" in text
    assert len(file_tokenizer.encode("🙂").ids) > 1 or len(file_tokenizer.encode("こんにちは").ids) > 1
