"""What a response takes of its requests' outputs is whole: text, tokens and end belong together."""

from __future__ import annotations

from types import SimpleNamespace

from frontend.collector import Collector
from protocol.messages import Finished


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
