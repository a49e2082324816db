"""A histogram that costs next to nothing to fill: bucket counts in a list, found by bisection.

What the core counts travels to the frontend in `Stats` as a `HistogramCounts`; what the frontend counts stays there.
Knows nothing of Prometheus, whose form of it, cumulative counts, is made where it is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct, field


class HistogramCounts(Struct, array_like=True, frozen=True):
    """A histogram as of now: `counts[i]` values were at most `bounds[i]` and above the bound before it.

    `counts` has one entry more than `bounds`, for values above them all; `total` is the sum of the values.
    """

    bounds: list[float] = []
    counts: list[int] = field(default_factory=lambda: [0])
    total: float = 0.0

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.bounds)} bounds need one more count than that, got {len(self.counts)}")


class Histogram:
    """Counts values by bucket; `bounds` are the buckets' upper ends, inclusive and ascending."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def observe_since(self, now: float, earlier: Iterable[float]) -> None:
        """Observes `now - time` for each time. Equal ones, such as of rows of one step, are looked up once."""
        for time, times in Counter(earlier).items():
            self.observe(now - time, times)

    def counts(self) -> HistogramCounts:
        return HistogramCounts(self._bounds.copy(), self._counts.copy(), self._total)
