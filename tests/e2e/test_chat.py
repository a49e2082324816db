"""The chat in the terminal, with the real engine: on a terminal that a test types into, and between pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from frontend import Client
from tests.e2e.conftest import ROOT, RunningEngine
from tests.support.requests import is_idle, wait_until
from tests.support.terminal import CTRL_C, CTRL_D, TAB, UP, TerminalProgram

CHAT = [sys.executable, "-m", "frontend.chat"]
# Told apart from text that is typed: the prompt on a line of its own, waiting.
PROMPT = r"^>$"
SUMMARY = r"^\d+ tokens? · \d+ tokens/s · first after \d+ ms$"
DIM = "\x1b[2m"

Open = Callable[..., TerminalProgram]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def open_chat(engine: RunningEngine, environment: dict[str, str]) -> Iterator[Open]:
    """Starts chats, greedy ones, and waits for their first prompt."""
    opened: list[TerminalProgram] = []

    def open_one(*flags: str, **extra: str) -> TerminalProgram:
        command = [*CHAT, "--ipc", engine.address, "--temperature", "0", *flags]
        opened.append(TerminalProgram(command, {**environment, **extra}))
        opened[-1].wait_for(PROMPT)
        return opened[-1]

    yield open_one
    for chat in opened:
        chat.close()


def pipe(
    engine: RunningEngine, environment: dict[str, str], text: str, *flags: str
) -> subprocess.CompletedProcess[str]:
    command = [*CHAT, "--ipc", engine.address, "--temperature", "0", *flags]
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=120)


# --- on a terminal --------------------------------------------------------------------------------------------------


def test_an_answer_streams_and_ends_with_its_tokens_and_their_rate(open_chat: Open) -> None:
    chat = open_chat()
    assert "tiny-qwen3 · context of 2,048 tokens · /help for commands" in chat.text
    chat.type("Tell me a story about a fox.\r")
    seen: set[int] = set()

    def ended() -> bool:
        seen.add(len(chat.text))
        return re.search(SUMMARY, chat.text, re.MULTILINE) is not None

    chat.wait_until(ended, "the summary")
    # It grew on the screen: more states were seen than the question and the whole answer.
    assert len(seen) > 5
    assert "fox" in chat.text.split("\n", 2)[2]


def test_the_conversation_is_remembered_until_reset(open_chat: Open) -> None:
    chat = open_chat()
    chat.type("My name is Anna.\r")
    chat.wait_for(SUMMARY)
    chat.type("What is my name?\r")
    answer = chat.wait_for(SUMMARY, 2).split("What is my name?")[1]
    assert "Anna" in answer
    chat.type("/reset\r")
    chat.wait_for("The conversation is forgotten.")
    chat.type("What is my name?\r")
    assert "Anna" not in chat.wait_for(SUMMARY, 3).split("forgotten.")[1]


def test_thoughts_are_dimmed_and_the_answer_is_not(open_chat: Open) -> None:
    chat = open_chat()
    chat.type("What is 17 + 25?\r")
    screen = chat.wait_for(SUMMARY)
    assert "<think>" not in screen
    assert "17 plus 25 is 42." in screen
    answer = chat.raw.split("25?", 1)[1].replace("\r", "")
    dimmed = re.findall(r"\x1b\[2m(.*?)\x1b\[0m", answer, re.DOTALL)
    assert "I have to work out 17 plus 25." in "".join(dimmed)
    assert "17 plus 25 is 42." in re.sub(r"\x1b\[2m.*?\x1b\[0m", "", answer, flags=re.DOTALL)


def test_settings_are_set_shown_and_refused_by_name_and_value(open_chat: Open) -> None:
    chat = open_chat()
    chat.type("/set temperature 0.2\r")
    chat.wait_for(r"^temperature = 0.2$")
    chat.type("/set temperature hot\r")
    chat.wait_for(r"^error: temperature must be a finite number, got 'hot'$")
    chat.type("/set temprature 1\r")
    chat.wait_for(r"there is no sampling parameter 'temprature' to set to '1'")
    chat.type("/set n 2\r")
    chat.wait_for(r"^error: n cannot be set to '2': a chat has one answer$")
    chat.type("/set seed\r")
    chat.wait_for(r"^error: /set wants a name and a value")
    chat.type("/set stop END\r")
    chat.wait_for(r'^stop = \["END"\]$')
    chat.type("/set max_tokens 3\r")
    chat.wait_for(r"^max_tokens = 3$")
    chat.type("/system You are a pirate.\r")
    chat.wait_for("The system prompt is set.")
    chat.type("/frobnicate\r")
    chat.wait_for("there is no command /frobnicate")
    chat.type("/show\r")
    screen = chat.wait_for(r"^ignore_eos +false$")
    assert re.search(r"^temperature +0.2 +\(set\)$", screen, re.MULTILINE)
    # The bundled model's own recommendation.
    assert re.search(r"^top_p +0.95$", screen, re.MULTILINE)
    assert re.search(r"^system +You are a pirate.$", screen, re.MULTILINE)
    chat.type("/set temperature default\r")
    chat.wait_for(r"^temperature = 0.6$")
    chat.type("Tell me a story about a fox.\r")
    chat.wait_for(r"^cut off · 3 tokens")


def test_ctrl_c_stops_the_answer_in_the_engine_and_then_leaves(open_chat: Open, client: Client) -> None:
    chat = open_chat("--ignore-eos", "true")
    chat.type("Tell me a story about a fox.\r")
    chat.wait_until(lambda: client.stats().num_running == 1, "the answer is under way")
    aborted = client.stats().aborted_requests
    chat.wait_until(lambda: len(chat.text) > 200, "there is something of an answer")
    chat.type(CTRL_C)
    chat.wait_for(r"^stopped · \d+ tokens")
    wait_until(lambda: is_idle(client.stats()), "the engine has stopped too")
    assert client.stats().aborted_requests == aborted + 1
    # Text on the line is dropped first; only on an empty line Ctrl-C leaves.
    chat.wait_for(PROMPT)
    chat.type("never sent")
    chat.wait_for("never sent")
    chat.type(CTRL_C)
    chat.wait_for(PROMPT)
    assert chat.process.poll() is None
    chat.type(CTRL_C)
    assert chat.wait() == 0
    assert "Traceback" not in chat.raw


@pytest.mark.parametrize("farewell", ["/quit\r", CTRL_D])
def test_quit_and_ctrl_d_leave(open_chat: Open, farewell: str) -> None:
    chat = open_chat()
    chat.type(farewell)
    assert chat.wait() == 0
    assert "Traceback" not in chat.raw


def test_a_message_of_several_lines_is_one_message(open_chat: Open) -> None:
    chat = open_chat()
    chat.type('"""\rWhat is the capital\rof France?\r"""\r')
    assert "Paris" in chat.wait_for(SUMMARY)
    chat.type("What is the capital \\\rof Italy?\r")
    assert "Rome" in chat.wait_for(SUMMARY, 2)


def test_lines_are_edited_completed_and_recalled_also_the_next_time(open_chat: Open) -> None:
    chat = open_chat()
    chat.type("/he" + TAB + "\r")
    chat.wait_for("leave, as Ctrl-D does")
    chat.type("/set seed 41\x7f2\r")
    chat.wait_for("^seed = 42$")
    chat.type("/quit\r")
    assert chat.wait() == 0
    again = open_chat()
    again.type(UP + UP + "\r")
    again.wait_for("^seed = 42$")


def test_a_conversation_that_fills_the_context_says_what_to_do(open_chat: Open) -> None:
    chat = open_chat("--ignore-eos", "true")
    # 24 tokens a line: what is left of the context is for an answer that does not end by itself.
    chat.type('"""\r')
    for _ in range(83):
        chat.type("zq zq zq zq zq zq zq zq\r")
    chat.type('"""\r')
    chat.wait_for("^The conversation fills the model's context: /reset begins a new one.$")
    chat.type("Are you still there?\r")
    chat.wait_for(r"^error: messages has \d+ tokens, which leaves no room for an answer")
    chat.wait_for("^/reset begins a new conversation.$")
    chat.type("/reset\r")
    chat.wait_for("The conversation is forgotten.")
    chat.type("/set ignore_eos false\r")
    chat.type("What is the capital of France?\r")
    assert "Paris" in chat.wait_for(r"forgotten\.(.|\n)*first after").split("forgotten.")[1]


def test_an_answer_cannot_command_the_terminal(environment: dict[str, str]) -> None:
    code = "from frontend.chat.terminal import Terminal; Terminal([]).write_answer('a\\x1b]0;b\\x07\\x9bc\\td\\re\\n')"
    program = TerminalProgram([sys.executable, "-c", code], environment)
    assert program.wait() == 0
    program.close()
    assert program.text == "a␛]0;b␇�c       d␍e"
    assert "\x1b" not in program.raw


def test_no_color_is_heeded(open_chat: Open) -> None:
    chat = open_chat(NO_COLOR="1")
    chat.type("What is 17 + 25?\r")
    assert "<think>" in chat.wait_for(SUMMARY)
    assert DIM not in chat.raw


def test_an_engine_that_ends_during_an_answer_ends_the_chat_with_the_reason(
    start_engine: Callable[..., RunningEngine], environment: dict[str, str]
) -> None:
    running = start_engine("--no-http", "--shutdown-timeout", "0").wait_until_ready()
    chat = TerminalProgram([*CHAT, "--ipc", running.address, "--ignore-eos", "true"], environment)
    try:
        chat.wait_for(PROMPT)
        chat.type("Tell me a story about a fox.\r")
        chat.wait_until(lambda: len(chat.text) > 200, "there is something of an answer")
        running.process.kill()
        running.wait()
        assert chat.wait() == 1
        assert "error: the engine" in chat.text
        assert "Traceback" not in chat.raw
    finally:
        chat.close()


# --- between pipes --------------------------------------------------------------------------------------------------


def test_pipes_get_answers_alone_and_no_escape_codes(engine: RunningEngine, environment: dict[str, str]) -> None:
    result = pipe(engine, environment, "What is the capital of France?\n\nWhat is 17 + 25?")
    assert result.returncode == 0
    paris, thoughts = result.stdout.split("\n", 1)
    assert paris == "The capital of France is Paris."
    assert re.fullmatch(r"<think>\n(.|\n)+\n</think>\n\n17 plus 25 is 42.\n", thoughts)
    assert re.findall(SUMMARY, result.stderr, re.MULTILINE) == result.stderr.splitlines()
    assert "\x1b" not in result.stdout + result.stderr


def test_a_pipe_takes_commands_and_blocks_and_reports_errors_by_its_exit_code(
    engine: RunningEngine, environment: dict[str, str]
) -> None:
    text = '/set top_p 7\n/set max_tokens 4\n"""\nWhat is the capital\nof France?\n"""\n/quit\nnever asked\n'
    result = pipe(engine, environment, text)
    assert result.returncode == 1
    assert "error: top_p must be above 0 and at most 1, got 7" in result.stderr
    assert result.stdout == "The capital of Fran\n"
    assert "cut off · 4 tokens" in result.stderr


def test_a_reader_that_has_enough_ends_the_chat_quietly(engine: RunningEngine, environment: dict[str, str]) -> None:
    command = " ".join([*CHAT, "--ipc", engine.address, "--ignore-eos", "true", "| head -c 20"])
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"echo Tell me a story about a fox. | {command}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert len(result.stdout) == 20
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--ipc", "ipc:///nowhere/engine.sock"], "no engine is running at ipc:///nowhere/engine.sock", 1),
        (["--ipc", "tcp://x"], "--ipc must be ipc:// and an absolute path", 1),
        (["--temperature", "1000"], "temperature must be between 0 and 100, got 1000", 2),
    ],
)
def test_what_keeps_a_chat_from_starting_is_said(
    engine: RunningEngine, environment: dict[str, str], flags: list[str], message: str, code: int
) -> None:
    result = pipe(engine, environment, "Hello!", *flags)
    assert result.returncode == code
    assert f"error: {message}" in result.stderr
    assert result.stdout == ""


def test_an_engine_without_a_tokenizer_is_refused(
    start_engine: Callable[..., RunningEngine], environment: dict[str, str]
) -> None:
    running = start_engine("--no-http", "--skip-tokenizer-init").wait_until_ready()
    result = pipe(running, environment, "Hello!")
    assert result.returncode == 1
    assert "runs without a tokenizer (--skip-tokenizer-init), and a chat needs one" in result.stderr
