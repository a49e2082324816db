"""What the core counts from its start on, and how it is told. The scheduler counts; what for is not known here."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.block_pool import BlockPool
from core.prefix_cache import PrefixCache
from protocol.histogram import Histogram
from protocol.messages import Stats

# Seconds. Finer at the low end than vLLM's, whose shortest is 300 ms.
_QUEUE_TIME_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40),
    *(50, 60, 120, 240, 480, 960, 1920, 7680),
)


@dataclass(slots=True)
class Counters:
    """As in `Stats`."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generation_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    queue_time: Histogram = field(default_factory=lambda: Histogram(_QUEUE_TIME_BOUNDS))

    def stats(self, query_id: int, num_running: int, num_waiting: int, pool: BlockPool, cache: PrefixCache) -> Stats:
        """All of it, and how things are now."""
        return Stats(
            query_id=query_id,
            num_running=num_running,
            num_waiting=num_waiting,
            num_blocks=pool.num_usable,
            num_free_blocks=pool.num_free,
            prefix_cache_queries=cache.num_queries,
            prefix_cache_hits=cache.num_hits,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            prompt_tokens=self.prompt_tokens,
            computed_tokens=self.computed_tokens,
            generation_tokens=self.generation_tokens,
            finished_requests=self.finished,
            aborted_requests=self.aborted,
            queue_time=self.queue_time.counts(),
        )
