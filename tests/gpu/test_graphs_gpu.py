"""Capture beside the rest of a process."""

import gc
import weakref

import torch

from worker.graphs import GraphCache


def graph_that_copies(pinned: torch.Tensor) -> GraphCache:
    target = torch.empty_like(pinned, device="cuda")

    def copy() -> None:
        target.copy_(pinned, non_blocking=True)

    graphs = GraphCache()
    graphs.capture("copy", copy)
    return graphs


def test_pinned_buffers_of_dead_graphs_do_not_disturb_a_capture() -> None:
    pinned = torch.zeros(1000).pin_memory()
    garbage: list[object] = [pinned, graph_that_copies(pinned)]
    garbage.append(garbage)
    buffer = weakref.ref(pinned)
    ones = torch.ones(1000, device="cuda")
    graphs = GraphCache()
    del pinned, garbage

    def add() -> None:
        assert len([[] for _ in range(100_000)]) == 100_000  # so many lists, and the collector would come
        ones.add_(1)
        assert buffer() is not None

    graphs.capture("add", add, warm_up=False)
    gc.collect()
    assert buffer() is None
    assert torch.zeros(1000).pin_memory().is_pinned()
    graphs.replay("add")
    assert ones.eq(2).all()
