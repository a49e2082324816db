"""Makes the pictures in `docs/`: `UPDATE_SCREENSHOTS=1 pytest tests/e2e/test_screenshots.py`.

They show the real engine with the bundled model; for the page's charts it answers others meanwhile.
"""

from __future__ import annotations

import html
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest
from selenium.webdriver import Keys

from frontend import Client, SamplingParams
from tests.e2e.conftest import ROOT, RunningEngine
from tests.support.browser import Browser
from tests.support.requests import ask
from tests.support.terminal import CTRL_C, TerminalProgram

pytestmark = [
    pytest.mark.skipif(not os.environ.get("UPDATE_SCREENSHOTS"), reason="set UPDATE_SCREENSHOTS to make pictures"),
    pytest.mark.timeout(600),
]

PICTURES = ROOT / "docs" / "images"
# How long the engine is busy before the page is shown: as long as the charts go back.
BUSY_SECONDS = 115
QUESTIONS = ("What is the capital of Italy?", "Tell me a story about a fox.", "What is 8 times 7?", "Write a poem.")


@pytest.fixture
def busy(engine: RunningEngine) -> Iterator[None]:
    """Others use the engine too: a varying number of conversations, most of which begin alike."""
    over = threading.Event()

    def converse(number: int, client: Client) -> None:
        for turn in itertools.count():
            # One conversation after the other joins and leaves.
            wave = 1 + int(time.monotonic() / 9) * 5 % 7
            if over.is_set():
                return
            if number >= wave:
                over.wait(0.5)
                continue
            question = QUESTIONS[(turn + number) % len(QUESTIONS)]
            system = {"role": "system", "content": "You are Tiny, a small language model. Answer what you are asked."}
            params = SamplingParams(max_tokens=160, temperature=0.8)
            client.chat([system, *ask(question)], params, use_tqdm=False)

    with Client(engine.address) as client:
        threads = [threading.Thread(target=converse, args=(number, client)) for number in range(7)]
        for thread in threads:
            thread.start()
        yield
        over.set()
        for thread in threads:
            thread.join()


def test_picture_of_the_page(engine: RunningEngine, busy: None) -> None:
    browser = Browser()
    try:
        browser.prefer("light")
        browser.resize(1440, 900, 2)
        browser.open(f"{engine.url}/")
        time.sleep(BUSY_SECONDS)
        for question in ("What is 17 + 25?", "Tell me a story about a fox."):
            before = len(browser.find_all(".figures"))
            browser.find("#message").send_keys(question + Keys.ENTER)
            browser.wait_until(lambda count=before: len(browser.find_all(".figures")) > count, "an answer", 60)
        browser.screenshot(PICTURES / "page-light.png")
        browser.prefer("dark")
        time.sleep(0.5)
        browser.screenshot(PICTURES / "page-dark.png")
        browser.resize(390, 844, 2, is_phone=True)
        time.sleep(1.5)
        browser.screenshot(PICTURES / "page-phone.png")
    finally:
        browser.close()


def test_picture_of_the_terminal_chat(engine: RunningEngine, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frontend.chat", "--ipc", engine.address, "--seed", "4"]
    chat = TerminalProgram(command, {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path)}, columns=84, lines=27)
    try:
        for keys, pattern in (
            ("What is 17 + 25?\r", r"first after \d+ ms"),
            ("/set temperature 0.2\r", "^temperature = 0.2$"),
            ("My name is Anna.\r", r"(first after(.|\n)*){2}"),
            ("What is my name?\r", r"(first after(.|\n)*){3}"),
            ("Tell me a story about a dragon.\r", r"a dragon\.\n.*\n\w+"),
            (CTRL_C, "^stopped"),
        ):
            if keys != CTRL_C:
                chat.wait_for("^>$")
            chat.type(keys)
            chat.wait_for(pattern)
        chat.wait_for("^>$")
        lines = as_html(chat.raw, 84, 27)
    finally:
        chat.close()
    page = tmp_path / "terminal.html"
    page.write_text(TERMINAL.format(lines=lines), encoding="utf-8")
    browser = Browser()
    try:
        browser.open(page.as_uri())
        width, height = browser.run("const r = document.body.getBoundingClientRect(); return [r.width, r.height]")
        browser.resize(int(width) + 1, int(height) + 1, 2)
        browser.screenshot(PICTURES / "terminal-chat.png")
    finally:
        browser.close()


TERMINAL = """<!doctype html><meta charset="utf-8"><style>
html {{ background: #15171a }}
body {{ margin: 0; padding: 22px 26px; width: fit-content; color: #e6e4de;
  font: 15px/1.45 "JetBrains Mono", "DejaVu Sans Mono", monospace; }}
pre {{ margin: 0; font: inherit }}
.bold {{ color: #72c4b6; font-weight: 700 }} .dim {{ color: #9aa1aa }} .cursor {{ background: #e6e4de }}
</style><pre>{lines}</pre>"""


def as_html(raw: str, columns: int, lines: int) -> str:
    """The screen after such output. Pyte knows no dim text, so that is shown to it as bright black."""
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(raw.replace("\x1b[2m", "\x1b[90m"))
    rows = []
    for y in range(lines):
        row = ""
        cells = [(screen.buffer[y][x], (x, y) == (screen.cursor.x, screen.cursor.y)) for x in range(columns)]

        def style(cell: tuple[pyte.screens.Char, bool]) -> str:
            char, is_cursor = cell
            return "cursor" if is_cursor else "bold" if char.bold else "dim" if char.fg == "brightblack" else ""

        for name, group in itertools.groupby(cells, style):
            text = html.escape("".join(char.data for char, _ in group))
            row += f'<span class="{name}">{text}</span>' if name else text
        rows.append(row.rstrip())
    return "\n".join(rows).rstrip()
