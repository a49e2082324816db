"""What graphs are captured, and the memory that is counted for them before they are."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from worker import startup
from worker.graphs import prefill_only_buckets, token_buckets
from worker.runner import GraphKind
from worker.startup import LoadingPhase

BUFFERS, EAGER, WEIGHTS = 700, 300, 5000
NODES = {GraphKind.PASS: 50, GraphKind.PART: 2}  # of a graph
LARGEST = {GraphKind.PASS: 3, GraphKind.PART: 6}  # graphs captured on trial
ALL = {GraphKind.PASS: 98, GraphKind.PART: 259}


class Device:
    """Memory in use, and a runner whose steps and captures take some."""

    def __init__(self) -> None:
        self.used = WEIGHTS
        self._buffers = 0

    def run_step(self) -> None:
        self.used = max(self.used, WEIGHTS + EAGER)

    def capture_graphs(
        self, *, only_largest: bool, like: object | None = None, kind: GraphKind | None = None
    ) -> list[GraphKind]:
        assert only_largest
        if like is None:
            self.used = WEIGHTS + BUFFERS  # steps' own memory is given back before
        graphs = [each for each, count in LARGEST.items() if kind in (None, each) for _ in range(count)]
        self.used += sum(map(NODES.__getitem__, graphs))
        return graphs

    def num_graphs(self, kind: GraphKind) -> int:
        return ALL[kind]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(startup, "_used_bytes", lambda: device.used)
    return device


def test_the_memory_of_graphs_is_counted_by_their_kind(device: Device) -> None:
    num_trials = 3
    steps: list[Callable[[], None]] = [device.run_step] * 2
    done = []
    child = SimpleNamespace(progress=lambda name, count, total: done.append((count, total)))
    phase = LoadingPhase(child, "kernels", len(steps) + 1 + num_trials * len(GraphKind))
    counted = startup._peak_bytes(device, steps, num_trials, phase)
    first = sum(NODES[kind] * count for kind, count in LARGEST.items())
    nodes = sum(NODES[kind] * count for kind, count in ALL.items())
    assert counted == WEIGHTS + BUFFERS + first + EAGER + nodes
    assert done[-1][0] == done[-1][1]


def test_without_graphs_the_steps_are_what_is_counted(device: Device) -> None:
    assert startup._peak_bytes(device, [device.run_step], 0, LoadingPhase(None, "kernels", 1)) == WEIGHTS + EAGER


def test_small_prompts_that_come_alone_and_the_longest_have_graphs_without_decodes() -> None:
    assert prefill_only_buckets(token_buckets(8192)) == [
        16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 8192,
    ]  # fmt: skip
    assert prefill_only_buckets(token_buckets(100)) == [16, 32, 64, 100]
    assert prefill_only_buckets([]) == []
