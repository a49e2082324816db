"""The histogram that core and frontend count with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.histogram import Histogram, HistogramCounts

BOUNDS = (0.5, 1.0, 2.5)
values = st.lists(st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0, 2.5, 2.75, 100.0)), max_size=30)


@given(values)
def test_a_value_is_counted_in_the_first_bucket_that_is_not_below_it(seen: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in seen:
        histogram.observe(value)
    counts = histogram.counts()
    # What Prometheus asks of a bucket: how many values are at most its bound.
    assert np.cumsum(counts.counts).tolist() == [*(sum(v <= bound for v in seen) for bound in BOUNDS), len(seen)]
    assert counts.total == sum(seen)


@given(values)
def test_many_at_once_count_as_one_by_one(seen: list[float]) -> None:
    at_once, singly = Histogram(BOUNDS), Histogram(BOUNDS)
    at_once.observe_since(128.0, [128.0 - value for value in seen])
    for value in seen:
        singly.observe(value)
    assert at_once.counts() == singly.counts()


def test_counts_are_a_copy() -> None:
    histogram = Histogram(BOUNDS)
    before = histogram.counts()
    histogram.observe(1.0)
    assert before == HistogramCounts(list(BOUNDS), [0, 0, 0, 0], 0.0)


def test_counts_that_do_not_go_with_the_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bounds need one more count"):
        HistogramCounts([1.0, 2.0], [1, 1])
