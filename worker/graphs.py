"""CUDA graphs: which sizes are captured, and capture and replay by key."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from protocol.messages import LEAST_LAYERED_TOKENS

# Launching a forward pass kernel by kernel takes the host longer than it takes the GPU to run one of 4,000 tokens;
# beyond twice that, launches hide behind the work and a step runs eagerly.
_MOST_CAPTURED_TOKENS = 8192
# A prompt of up to so many tokens is computed in a graph that has no place for decodes, if there are none.
_MOST_ALONE = 1024
# Decode steps of so many rows are one graph: what a second launch costs the GPU can be felt in them.
MOST_ROWS_OF_ONE_GRAPH = 64


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Row counts that steps are padded to: dense where a padding row costs much, sparse where it does not."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 1, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def token_buckets(max_num_batched_tokens: int) -> list[int]:
    """Token counts that steps with prefill are padded to: whole tiles of cuBLAS's products, which at sizes between take
    up to a fifth longer than at the next of these. Below a few hundred tokens the weights decide the time, so that
    padding is nearly free there."""
    most = min(max_num_batched_tokens, _MOST_CAPTURED_TOKENS)
    sizes = {16, 32, 64, 192, *range(128, 1025, 128), *range(1280, most + 1, 256)}
    sizes.add(most)
    return sorted(size for size in sizes if size <= most)


def prefill_only_buckets(buckets: list[int]) -> list[int]:
    """Those token counts whose steps are captured without decode rows, too: small ones, since nothing hides an empty
    kernel from a prompt that comes alone, and the largest, in which a queue of long prompts is computed, step after
    step."""
    return [size for size in buckets if size <= _MOST_ALONE or size == buckets[-1]]


def layered_buckets(max_tokens: int) -> list[int]:
    """Token counts that chunks of at most `max_tokens` are padded to which are computed layer by layer, a graph a
    layer."""
    most = min(max_tokens, _MOST_CAPTURED_TOKENS)
    return sorted({*range(LEAST_LAYERED_TOKENS, most + 1, 1024), most} if most >= LEAST_LAYERED_TOKENS else ())


def bucket_for(buckets: list[int], size: int) -> int | None:
    """The smallest bucket that holds `size`; None if none does."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None


@cache
def _capture_stream() -> torch.cuda.Stream:
    """The stream that graphs are captured on, which cannot be the default one. It is one for all, as cuBLAS keeps a
    workspace for each."""
    return torch.cuda.Stream()


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Holds the garbage collector back, and so what it would free.

    Pinned buffers that graphs copy from, once freed, have an event recorded on the stream of those copies. While that
    stream captures, the event would be the graph's, and whoever pins memory next would fail.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphCache:
    """Captured graphs by key. They share one memory pool: steps run one after another, on one stream."""

    def __init__(self, like: GraphCache | None = None) -> None:
        """An empty cache, which shares the memory of `like` if given."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if like is None else like._pool

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, key: Hashable, function: Callable[[], None], warm_up: bool = True) -> None:
        """Runs the function once, so that everything in it is compiled and initialised, then captures it.

        Without `warm_up` all that it does must have been done before, at the same size.

        It must read and write buffers that outlive the graph, and its device work must not depend on host values that
        change. Largest keys first: later, smaller ones then fit in the pool's memory.

        `torch.cuda.graph` would do the same, and give back what the allocator has cached before each capture, so that
        every warm-up asks the driver for its memory anew.
        """
        if warm_up:
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _no_garbage_collected(), torch.cuda.stream(_capture_stream()):
            graph.capture_begin(pool=self._pool)
            try:
                function()
            finally:
                graph.capture_end()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> bool:
        """Launches a captured graph; False if there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True
