"""The page at `/` in headless Chromium, with the real engine behind it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from selenium.webdriver import ActionChains, Keys

from frontend import Client
from tests.e2e.conftest import RunningEngine
from tests.support.browser import Browser
from tests.support.requests import is_idle, wait_until

Start = Callable[..., RunningEngine]

FIGURES = r"\d+ tokens · \d+ tokens/s · first after \d+ ms · prompt \d+"
PAPER = "return getComputedStyle(document.body).backgroundColor"

# Text that stands on a background it is hard to read on: `[ratio, text]` of everything below WCAG's 4.5.
FAINT_TEXT = """
const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = parse(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (parse(colour)[3] !== 0) return colour;
  }
};
const faint = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || !node.checkVisibility()) continue;
  const style = getComputedStyle(node);
  const text = node instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(text), light(behind(node))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) faint.push([ratio, node.textContent.trim()]);
}
return faint;
"""


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(window: Browser, engine: RunningEngine, client: Client) -> Iterator[Browser]:
    """The page as someone sees it who comes for the first time. No test may make it log an error or ask elsewhere."""
    window.resize(1440, 900)
    window.prefer("light")
    window.open(f"{engine.url}/")
    window.run("localStorage.clear(); sessionStorage.clear()")
    window.errors()
    window.hosts()
    window.open(f"{engine.url}/")
    window.wait_until(lambda: window.text("#state-text") == "Ready", "the page shows the engine's state")
    yield window
    assert window.errors() == []
    assert window.hosts() <= {engine.url.removeprefix("http://")}
    window.open("about:blank")
    wait_until(lambda: is_idle(client.stats()), "the engine is idle and all its blocks are free")


def send(page: Browser, text: str) -> None:
    page.find("#message").send_keys(text + Keys.ENTER)


def answers(page: Browser) -> list[str]:
    return [str(text) for text in page.run("return [...document.querySelectorAll('.said')].map((n) => n.textContent)")]


def ask(page: Browser, text: str) -> str:
    """Asks, waits for the end, and returns the answer."""
    before = len(page.find_all(".figures"))
    send(page, text)
    page.wait_until(lambda: len(page.find_all(".figures")) == before + 1, f"the answer to {text}")
    return answers(page)[-1]


def set_option(page: Browser, name: str, value: str) -> None:
    page.run("document.getElementById('options').open = true")
    field = page.find(f"#fields [name={name}]")
    field.clear()
    field.send_keys(value)


def press(page: Browser, *keys: str) -> None:
    """Keys for whatever has the focus."""
    ActionChains(page.driver).send_keys(*keys).perform()


def focused(page: Browser) -> str:
    return str(page.run("const node = document.activeElement; return node.id || node.name || node.textContent.trim()"))


# --- chat -----------------------------------------------------------------------------------------------------------


def test_an_answer_grows_and_ends_with_its_figures_and_the_charts_move(page: Browser) -> None:
    page.wait_until(lambda: page.text("#model") == "tiny-qwen3 · 2,048 tokens of context", "the model's name")
    # Whatever the page shows, with the answer's length, whenever it changes.
    page.run(
        """
        window.seen = [];
        const look = () => seen.push([
          document.querySelector(".said")?.textContent.length ?? 0,
          parseFloat(document.querySelector("[data-chart=generated] b").textContent) || 0,
          parseFloat(document.querySelector("[data-chart=running] b").textContent) || 0,
        ]);
        new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
        """
    )
    send(page, "Tell me a story about a fox.")
    page.wait_until(lambda: page.find_all(".figures"), "the end of the answer")
    assert re.fullmatch(FIGURES, page.text(".figures"))
    assert "fox" in page.text(".said")
    page.wait_until(lambda: page.text("[data-chart=generated] b") == "0", "the rate falls to zero again")
    seen = page.run("return seen")
    lengths = [length for length, _, _ in seen]
    assert len(set(lengths)) > 10
    assert lengths == sorted(lengths)
    assert max(rate for _, rate, _ in seen) > 1
    assert max(running for _, _, running in seen) == 1
    for chart in ("generated", "prompt", "running", "cache"):
        path = page.run(f"return document.querySelector('[data-chart={chart}] path.line.series-0').getAttribute('d')")
        heights = {float(y) for y in re.findall(r",([\d.]+)", path)}
        assert len(heights) > 1, chart
    assert page.find_all("[data-chart=first] circle")
    assert float(page.text("[data-chart=first] b").replace(",", "")) > 0
    assert re.match(r"Time to first token, mean, now [\d.,]+ ms", page.find("[data-chart=first] svg").accessible_name)


def test_prefix_cache_hits_are_shown_when_a_conversation_goes_on(page: Browser) -> None:
    assert "Anna" in ask(page, "My name is Anna.")
    assert "Anna" in ask(page, "What is my name?")
    page.wait_until(lambda: page.text("[data-chart=hitRate] b") not in ("–", "0"), "a hit rate")
    assert re.search(r"prompt \d+, \d+ cached", page.find_all(".figures")[-1].text)
    page.find("#clear").click()
    assert page.find("#welcome").is_displayed()
    assert "Anna" not in ask(page, "What is my name?")


def test_thoughts_are_set_apart_and_can_be_turned_off(page: Browser) -> None:
    assert ask(page, "What is 17 + 25?") == "17 plus 25 is 42."
    assert "I have to work out" in page.text(".answer details")
    assert "think" not in page.text("#log")
    page.run("document.getElementById('options').open = true")
    page.find("[name=no_thinking]").click()
    ask(page, "What is 3 + 4?")
    assert len(page.find_all(".answer details")) == 1


def test_stop_ends_the_answer_in_the_engine(page: Browser, client: Client) -> None:
    set_option(page, "seed", "1")
    send(page, "Tell me a story about a dragon.")
    page.wait_until(lambda: answers(page) and len(answers(page)[0]) > 20, "the beginning of an answer")
    aborted = client.stats().aborted_requests
    assert page.text("#send") == "Stop"
    page.find("#send").click()
    page.wait_until(lambda: page.text("#send") == "Send", "the answer has ended")
    assert re.match(r"stopped · \d+ tokens", page.text(".figures"))
    wait_until(lambda: client.stats().aborted_requests == aborted + 1, "the engine has stopped too")


def test_options_reach_the_engine(page: Browser) -> None:
    set_option(page, "temperature", "2")
    set_option(page, "seed", "7")
    set_option(page, "max_tokens", "12")
    first = ask(page, "Tell me a story about a fox.")
    assert re.match("cut off · 12 tokens", page.text(".figures"))
    page.find("#clear").click()
    assert ask(page, "Tell me a story about a fox.") == first
    assert page.text("#changed") == "temperature 2, max 12, seed 7"
    page.find("#fields [type=reset]").click()
    page.wait_until(lambda: page.text("#changed") == "the model's own values", "the options are reset")
    set_option(page, "stop", "Par")
    page.find("#clear").click()
    assert ask(page, "What is the capital of France?") == "The capital of France is"


def test_a_value_that_is_refused_is_marked_and_the_question_kept(page: Browser) -> None:
    for name, value, message in (
        ("top_p", "7", "top_p must be above 0 and at most 1, got 7"),
        ("max_tokens", "5000", "max_tokens is too large"),
        ("seed", "1.5", "seed must be a whole number"),
    ):
        set_option(page, name, value)
        send(page, "Hello!")
        page.wait_until(lambda: page.find("#field-error").is_displayed(), "an error")
        assert message in page.text("#field-error")
        assert focused(page) == name
        assert page.find(f"[name={name}]").get_attribute("aria-invalid") == "true"
        assert page.find("#message").get_property("value") == "Hello!"
        assert not page.find_all("article")
        page.find("#message").clear()
        set_option(page, name, "")
        page.run("document.forms.fields.elements[arguments[0]].value = ''", name)
        page.run("document.forms.fields.dispatchEvent(new Event('input'))")
    # The browser itself logs that the server has answered with an error.
    assert all("400" in message for message in page.errors())


def test_a_conversation_that_does_not_fit_says_what_to_do(page: Browser) -> None:
    ask(page, "Hello!")
    page.run("const m = document.getElementById('message'); m.value = 'zq '.repeat(2000)")
    send(page, "")
    page.wait_until(lambda: page.find_all("#log > .error"), "an error")
    assert "maximum context length is 2048 tokens" in page.text("#log > .error")
    assert "Clear begins a new conversation." in page.text("#log > .error")
    page.find("#clear").click()
    page.find("#message").clear()
    assert "Paris" in ask(page, "What is the capital of France?")
    assert all("400" in message for message in page.errors())


def test_what_a_model_writes_is_text_and_never_markup(page: Browser) -> None:
    shown = page.run(
        """
        const { GrowingText } = await import("/static/text.js");
        const node = document.createElement("div");
        const growing = new GrowingText(node);
        const text = "# Hi\\n\\n<img src=x onerror=alert(1)> `a<b` **bold**\\n\\n```js\\nlet a = '<b>';\\n```\\nend";
        for (let length = 0; length <= text.length; length++) growing.show(text.slice(0, length));
        return [...node.children].map((child) => child.outerHTML);
        """
    )
    assert shown == [
        '<p class="heading">Hi</p>',
        "<p>&lt;img src=x onerror=alert(1)&gt; <code>a&lt;b</code> <strong>bold</strong></p>",
        "<pre tabindex=\"0\"><code>let a = '&lt;b&gt;';</code></pre>",
        "<p>end</p>",
    ]


def test_the_end_stays_in_view_unless_someone_reads_further_up(page: Browser) -> None:
    at_end = "const l = document.getElementById('log'); return l.scrollTop + l.clientHeight > l.scrollHeight - 3"
    page.resize(500, 500)
    ask(page, "Tell me a story about a fox.")
    ask(page, "Tell me a story about a dragon.")
    assert page.run("const l = document.getElementById('log'); return l.scrollHeight > l.clientHeight + 50")
    assert page.run(at_end)
    page.resize(500, 450)
    page.wait_until(lambda: page.run(at_end), "the end is in view on a smaller screen too")
    send(page, "Tell me a story about a cat.")
    page.wait_until(lambda: len(answers(page)) == 3, "the beginning of an answer")
    page.run("document.getElementById('log').scrollTop = 0")
    page.wait_until(lambda: len(page.find_all(".figures")) == 3, "its end")
    assert page.run("return document.getElementById('log').scrollTop") == 0


# --- looks and access -----------------------------------------------------------------------------------------------


def test_dark_and_light_follow_the_system_until_the_switch_is_used(page: Browser) -> None:
    light = page.run(PAPER)
    page.prefer("dark")
    dark = page.run(PAPER)
    assert dark != light
    assert page.find("#theme").accessible_name == "Switch to light colours"
    page.find("#theme").click()
    assert page.run(PAPER) == light
    page.driver.refresh()
    assert page.run(PAPER) == light, "the choice is remembered"
    page.find("#theme").click()
    assert page.run(PAPER) == dark


def test_everything_works_by_keyboard_alone(page: Browser, client: Client) -> None:
    assert focused(page) == "message"
    press(page, "What is the capital of France?", Keys.ENTER)
    page.wait_until(lambda: page.find_all(".figures"), "an answer")
    assert "Paris" in answers(page)[0]
    # Two lines in one message, then stopped.
    press(page, "Tell me a story")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    press(page, "about a fox.", Keys.ENTER)
    page.wait_until(lambda: len(answers(page)) == 2, "the beginning of an answer")
    press(page, Keys.ESCAPE)
    page.wait_until(lambda: len(page.find_all(".figures")) == 2, "its end")
    assert page.find_all(".question")[1].text == "Tell me a story\nabout a fox."
    assert page.find_all(".figures")[1].text.startswith("stopped")
    # Tab reaches everything, in the order of the page.
    page.run("document.activeElement.blur(); getSelection().removeAllRanges()")
    page.driver.refresh()
    page.wait_until(lambda: page.text("#state-text") == "Ready", "the page is there again")
    order = [focused(page)]
    for _ in range(3):
        press(page, Keys.TAB)
        order.append(focused(page))
    assert order == ["message", "clear", "send", "Options the model's own values"]
    page.run("document.querySelector('#options > summary').focus()")
    press(page, Keys.ENTER, Keys.TAB, "0", Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB, "3")
    assert page.text("#changed") == "temperature 0, max 3"
    page.run("document.querySelector('.skip').focus()")
    assert page.find(".skip").is_displayed()
    press(page, Keys.ENTER)
    assert focused(page) == "message"
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert focused(page) == "Tell me a story about a fox."
    press(page, Keys.ENTER)
    page.wait_until(lambda: page.find_all(".figures"), "an answer")
    assert page.text(".figures").startswith("cut off · 3 tokens")
    assert focused(page) == "message"


def test_every_control_has_a_name_and_answers_are_announced(page: Browser) -> None:
    page.run("document.getElementById('options').open = true")
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [
        node for node in tree if node["role"]["value"] in ("button", "textbox", "spinbutton", "checkbox", "image")
    ]
    assert len(controls) > 15
    assert [node for node in controls if not node["ignored"] and not node.get("name", {}).get("value")] == []
    answer = ask(page, "What is the capital of France?")
    assert page.find("#announcer").get_attribute("role") == "status"
    assert page.text("#announcer") == f"Answer: {answer}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    page.run("document.getElementById('options').open = true")
    ask(page, "What is 17 + 25?")
    assert page.run(FAINT_TEXT) == []


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1920])
def test_nothing_is_wider_than_the_screen(page: Browser, width: int) -> None:
    page.resize(width, 800, is_phone=width < 700)
    page.run("document.getElementById('options').open = true")
    ask(page, "What is 17 + 25?")
    assert page.run("return document.documentElement.scrollWidth") <= width
    wider = "return [...document.querySelectorAll('body *')].filter((n) => n.checkVisibility() && !n.closest('.unseen')"
    assert page.run(f"{wider} && n.getBoundingClientRect().right > innerWidth + 1).map((n) => n.outerHTML)") == []


# --- the engine's state ---------------------------------------------------------------------------------------------


def test_metrics_are_read_as_prometheus_writes_them(page: Browser) -> None:
    text = "\n".join(
        [
            "# HELP vllm:generation_tokens_total Tokens.",
            "# TYPE vllm:generation_tokens_total counter",
            'vllm:generation_tokens_total{model_name="a \\"b\\" {c}, d=\\"e\\"",engine="0"} 1.5e+02',
            'vllm:generation_tokens_total{model_name="other"} 50.0 1700000000000',
            "vllm:num_requests_running 3",
            'vllm:time_to_first_token_seconds_bucket{le="+Inf"} +Inf',
            "",
        ]
    )
    parsed, snapshot = page.run(
        """
        const { parse, snapshot } = await import("/static/metrics.js");
        const parsed = [...parse(arguments[0])].map(([name, samples]) => [name, samples.map((s) => s.labels)]);
        return [parsed, snapshot(arguments[0], 5)];
        """,
        text,
    )
    assert dict(parsed)["vllm:generation_tokens_total"][0] == {"model_name": 'a "b" {c}, d="e"', "engine": "0"}
    assert dict(parsed)["vllm:time_to_first_token_seconds_bucket"] == [{"le": "+Inf"}]
    assert (snapshot["generated"], snapshot["running"], snapshot["waiting"]) == (200, 3, None)


def test_points_are_changes_and_gaps_where_nothing_can_be_told(page: Browser) -> None:
    def snapshot(time: float, count: int, **more: Any) -> dict[str, Any]:
        names = ("generated", "prompt", "firstSeconds", "firstTokens", "hits", "queries")
        return {"time": time, **dict.fromkeys(names, count), "running": 1, "waiting": 0, "cache": 0.5, **more}

    def point(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
        return dict(
            page.run("return (await import('/static/metrics.js')).point(arguments[0], arguments[1])", before, now)
        )

    assert point(None, snapshot(1, 5))["generated"] is None
    moved = point(snapshot(1, 5), snapshot(3, 25, hits=10))
    assert (moved["generated"], moved["first"], moved["hitRate"], moved["cache"]) == (10, 1, 0.25, 0.5)
    idle = point(snapshot(1, 5), snapshot(2, 5))
    assert (idle["generated"], idle["first"], idle["hitRate"]) == (0, None, None)
    restarted = point(snapshot(1, 5), snapshot(2, 0))
    assert (restarted["generated"], restarted["first"]) == (None, None)


def test_nothing_is_asked_while_the_page_is_hidden(page: Browser) -> None:
    asked = "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/metrics')).length"
    set_hidden = """
        Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    """
    page.wait_until(lambda: page.run(asked) >= 2, "the page asks every second")
    page.run(set_hidden, True)
    page.run("return new Promise((resolve) => setTimeout(resolve, 1100))")
    before = page.run(asked)
    page.run("return new Promise((resolve) => setTimeout(resolve, 1500))")
    assert page.run(asked) == before
    page.run(set_hidden, False)
    page.wait_until(lambda: page.run(asked) > before, "the page asks again")


def test_an_engine_that_goes_and_comes_back_is_noticed(window: Browser, start_engine: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = start_engine("--port", str(port)).wait_until_ready()
    window.open(f"{first.url}/")
    window.wait_until(lambda: window.text("#state-text") == "Ready", "the engine is ready")
    assert not window.find("#notice").is_displayed()
    assert first.stop() == 0
    window.wait_until(lambda: window.text("#state-text") == "Not reachable", "the engine is gone")
    assert "does not answer" in window.text("#notice")
    send(window, "Hello!")
    window.wait_until(lambda: window.text("#log > .error") == "The server cannot be reached.", "an error")
    assert window.find("#message").get_property("value") == "Hello!"
    second = start_engine("--port", str(port))
    worker: list[psutil.Process] = []

    def find_worker() -> bool:
        worker[:] = [child for child in second.children() if "worker.main" in child.cmdline()]
        return bool(worker)

    wait_until(find_worker, "the worker has been started")
    worker[0].suspend()
    window.wait_until(lambda: window.text("#state-text") == "Starting", "the engine is starting")
    assert "the engine is starting" in window.text("#notice")
    worker[0].resume()
    window.wait_until(lambda: window.text("#state-text") == "Ready", "the engine is ready again", 60)
    assert not window.find("#notice").is_displayed()
    window.find("#message").send_keys(Keys.ENTER)
    window.wait_until(lambda: window.find_all(".figures"), "an answer")


def test_an_api_key_is_asked_for_where_it_is_wanted(window: Browser, start_engine: Start) -> None:
    running = start_engine("--port", "0", "--api-key", "secret").wait_until_ready()
    window.open(f"{running.url}/")
    window.wait_until(lambda: window.text("#state-text") == "Ready", "the state is shown without a key")
    send(window, "What is the capital of France?")
    window.wait_until(lambda: window.find("#field-error").is_displayed(), "an error")
    assert "API key" in window.text("#field-error")
    assert focused(window) == "key"
    press(window, "secret")
    window.find("#message").send_keys(Keys.ENTER)
    window.wait_until(lambda: window.find_all(".figures"), "an answer")
    assert "Paris" in answers(window)[0]
