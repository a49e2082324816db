"""Stop strings end a text at the same place however it was cut, and nothing of them is ever emitted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.stop_strings import StopStrings


def cut_at_first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The definition: the first to be completed ends the text; of several completed at once, the longest."""
    for end in range(len(text) + 1):
        completed = [s for s in stop if text[:end].endswith(s)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(chunks: list[str], stop: list[str]) -> tuple[list[str], str | None]:
    watch = StopStrings(stop)
    emitted = [watch.feed(chunk) for chunk in chunks]
    emitted.append(watch.flush())
    return emitted, watch.found


letters = st.text("ab ", max_size=30)
stops = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=4)


@given(chunks=st.lists(letters, max_size=12), stop=stops)
@settings(max_examples=1000, deadline=None)
def test_the_cut_does_not_depend_on_the_pieces(chunks: list[str], stop: list[str]) -> None:
    emitted, found = run(chunks, stop)
    assert ("".join(emitted), found) == cut_at_first_stop("".join(chunks), stop)


@given(text=letters, stop=stops)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stop: list[str]) -> None:
    watch = StopStrings(stop)
    emitted = "".join(watch.feed(character) for character in text)
    if watch.found is None:
        beginnings = {s[:n] for s in stop for n in range(len(s))}
        assert len(text) - len(emitted) == max(len(beginning) for beginning in beginnings if text.endswith(beginning))


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    assert run(["one ", "EN", "D", "more"], ["END"]) == (["one ", "", "", "", ""], "END")
    assert run(["one ", "EN", "ough"], ["END"]) == (["one ", "", "ENough", ""], None)
    assert run(["E", "E", "EN"], ["END"]) == (["", "E", "E", "EN"], None)


def test_the_first_completed_wins_and_of_those_the_longest() -> None:
    assert run(["xabcd"], ["abcd", "bc"]) == (["xa", ""], "bc")
    assert run(["xabc"], ["bc", "abc"]) == (["x", ""], "abc")


def test_many_long_stop_strings_cost_little() -> None:
    stop = ["a" * 1000 + str(n) for n in range(64)]
    watch = StopStrings(stop)
    emitted = "".join(watch.feed("a") for _ in range(3000)) + watch.flush()
    assert emitted == "a" * 3000


@given(letters, stops, st.integers(1, 4))
def test_a_stop_string_that_is_included_ends_the_text(text: str, stop: list[str], size: int) -> None:
    watch = StopStrings(stop, include=True)
    emitted = [watch.feed(text[start : start + size]) for start in range(0, len(text), size)]
    before, found = cut_at_first_stop(text, stop)
    assert "".join([*emitted, watch.flush()]) == before + (found or "")
