"""CUDA graphs: the sizes that are captured, and capture and replay by key."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable

import torch


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Row counts that steps are padded to: dense where a padding row costs much, sparse where it does not."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 1, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def bucket_for(buckets: list[int], rows: int) -> int:
    """The smallest bucket that holds `rows`."""
    return buckets[bisect_left(buckets, rows)]


class GraphCache:
    """Captured graphs by key. They share one memory pool: steps run one after another, on one stream."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs the function once, so that everything in it is compiled and initialised, then captures it.

        It must read and write buffers that outlive the graph, and its device work must not depend on host values that
        change. Largest keys first: later, smaller ones then fit in the pool's memory.
        """
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> bool:
        """Launches a captured graph; False if there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True
