"""What a response takes of its requests' outputs is whole: text, tokens and end belong together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from frontend.collector import Collector, Output
from protocol.errors import RequestFailedError
from protocol.messages import Failed, Finished

REQUEST: Any = SimpleNamespace(tag=0, stream=True, logprobs=[])


class Passed:
    """What a collector has passed on, as texts. Has enough after so many calls."""

    def __init__(self, enough: int = 100) -> None:
        self.texts: list[str] = []
        self.enough = enough

    def __call__(self, outputs: list[Output]) -> bool:
        self.texts += [text for _, text, _ in outputs]
        return len(self.texts) < self.enough


async def waiting_take(collector: Collector, pass_on: Any) -> asyncio.Task[list[Output]]:
    task = asyncio.create_task(collector.take(pass_on))
    await asyncio.sleep(0)
    return task


def step(collector: Collector, text: str) -> None:
    collector.add(REQUEST, 7, text)
    collector.flush()


async def test_an_end_is_seen_with_the_take_that_has_its_text_and_not_before() -> None:
    collector = Collector(1)
    request = SimpleNamespace(tag=0, stream=True, logprobs=[])
    collector.add(request, 7, "half")  # type: ignore[arg-type]
    ((choice, text, token_ids),) = await collector.take()
    # While a writer pauses with what it has taken, the request ends.
    collector.add(request, 8, " and")  # type: ignore[arg-type]
    collector.finish(request, " the rest", Finished(0, "stop"))  # type: ignore[arg-type]
    assert (text, token_ids, choice.finished, collector.num_unfinished) == ("half", [7], None, 1)
    ((choice, text, token_ids),) = await collector.take()
    assert (text, token_ids, collector.num_unfinished) == (" and the rest", [8], 0)
    assert choice.finished is not None
    assert choice.finished.reason == "stop"


async def test_outputs_are_passed_on_within_the_step_until_the_end_which_is_returned() -> None:
    collector, passed = Collector(1), Passed()
    take = await waiting_take(collector, passed)
    step(collector, "one")
    step(collector, " two")
    assert passed.texts == ["one", " two"]
    await asyncio.sleep(0)
    assert not take.done()
    collector.add(REQUEST, 8, " three")
    collector.finish(REQUEST, ".", Finished(0, "stop"))
    collector.flush()
    ((choice, text, token_ids),) = await take
    assert (text, token_ids, collector.num_unfinished, passed.texts) == (" three.", [8], 0, ["one", " two"])
    assert choice.finished is not None


async def test_what_comes_after_enough_was_passed_on_waits_for_the_next_take() -> None:
    collector, passed = Collector(1), Passed(enough=2)
    take = await waiting_take(collector, passed)
    for text in ("one", " two", " three", " four"):
        step(collector, text)
    assert passed.texts == ["one", " two"]
    ((_, text, token_ids),) = await take
    assert (text, token_ids) == (" three four", [7, 7])
    # Nothing is passed on while nobody waits, and with the next take it is again.
    step(collector, " five")
    assert [text for _, text, _ in await collector.take(passed)] == [" five"]
    passed.enough = 100
    take = await waiting_take(collector, passed)
    step(collector, " six")
    assert passed.texts == ["one", " two", " six"]
    collector.leave()
    assert await take == []


async def test_the_last_output_before_a_failure_comes_before_it() -> None:
    collector, passed = Collector(1), Passed()
    take = await waiting_take(collector, passed)
    collector.add(REQUEST, 7, "one")
    collector.fail(REQUEST, Failed(0, "failed", "no more"))
    collector.flush()
    assert [text for _, text, _ in await take] == ["one"]
    with pytest.raises(RequestFailedError, match="no more"):
        await collector.take(passed)


async def test_an_error_of_one_stream_is_raised_where_it_is_written_and_not_in_the_step() -> None:
    def broken(outputs: list[Output]) -> bool:
        raise KeyError("a bug")

    collector = Collector(1)
    take = await waiting_take(collector, broken)
    step(collector, "one")
    with pytest.raises(KeyError, match="a bug"):
        await take


async def test_a_cancelled_take_passes_nothing_on() -> None:
    collector, passed = Collector(1), Passed()
    take = await waiting_take(collector, passed)
    take.cancel()
    await asyncio.wait([take])
    step(collector, "one")
    assert passed.texts == []
