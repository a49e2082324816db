"""The engine's metrics for Prometheus, under vLLM's names where they are the same thing; others are `mini_vllm:`.

The frontend counts what only it sees, latencies as they are delivered and how requests end; the rest is the core's,
from its `Stats`. Counting runs for every streamed token and is kept apart from showing, which runs when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from protocol.histogram import Histogram, HistogramCounts
from protocol.messages import FinishReason, Stats

# Bounds in seconds: vLLM's and, below them, finer ones, since a small model has a token each millisecond.
_TTFT_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40),
    *(80, 160, 640, 2560),
)
_INTER_TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_E2E_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
    *(960, 1920, 7680),
)
_ENDS = (*get_args(FinishReason), "error")


def _token_bounds(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `most`, as vLLM has them."""
    bounds: list[float] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > most:
                return bounds
            bounds.append(digit * scale)
        scale *= 10


class RequestMetrics:
    """What the frontend counts. Times are of `time.perf_counter()`.

    Attributes:
        ended: requests by how they ended; "error" are those that the engine could not finish.
        restarts: processes that were started again because they were lost, by which.
    """

    def __init__(self, max_model_len: int) -> None:
        self.time_to_first_token = Histogram(_TTFT_BOUNDS)
        self.inter_token_latency = Histogram(_INTER_TOKEN_BOUNDS)
        self.e2e_latency = Histogram(_E2E_BOUNDS)
        self.prompt_tokens = Histogram(_token_bounds(max_model_len))
        self.generation_tokens = Histogram(_token_bounds(max_model_len))
        self.ended = dict.fromkeys(_ENDS, 0)
        self.restarts = dict.fromkeys(("worker", "core"), 0)

    def request_ended(self, reason: str, seconds: float, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """Requests that were left or failed count, but say nothing about how long answers are and take."""
        self.ended[reason] += 1
        if reason in ("stop", "length"):
            self.e2e_latency.observe(seconds)
            self.prompt_tokens.observe(num_prompt_tokens)
            self.generation_tokens.observe(num_generated_tokens)


class _EngineCollector(Collector):
    """What is known at one moment, in the form that Prometheus's library writes out."""

    def __init__(self, model_name: str, requests: RequestMetrics, num_refused: int, stats: Stats | None) -> None:
        self._label = [model_name]
        self._requests = requests
        self._num_refused = num_refused
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        if self._stats is not None:
            yield from self._engine(self._stats)
        yield from self._served(self._requests)

    def _engine(self, stats: Stats) -> Iterator[Metric]:
        used = (stats.num_blocks - stats.num_free_blocks) / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Requests that are being computed.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for their turn.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 1 is all.", used)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield self._counter("num_preemptions", "Requests put back for lack of blocks.", stats.num_preemptions)
        yield self._counter("prompt_tokens", "Tokens of prompts received.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._histogram("request_queue_time_seconds", "Time from arrival to the first step.", stats.queue_time)

    def _served(self, requests: RequestMetrics) -> Iterator[Metric]:
        first_token, inter_token = requests.time_to_first_token.counts(), requests.inter_token_latency.counts()
        e2e = requests.e2e_latency.counts()
        prompt, generation = requests.prompt_tokens.counts(), requests.generation_tokens.counts()
        yield self._histogram("time_to_first_token_seconds", "Time from arrival to the first token.", first_token)
        yield self._histogram("inter_token_latency_seconds", "Time between two tokens of a request.", inter_token)
        yield self._histogram(
            "time_per_output_token_seconds", "Older name of inter_token_latency_seconds.", inter_token
        )
        yield self._histogram("e2e_request_latency_seconds", "Time from arrival to the end.", e2e)
        yield self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", prompt)
        yield self._histogram("request_generation_tokens", "Tokens of a request's answer.", generation)
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by how.", labels=["model_name", "finished_reason"]
        )
        for reason, count in requests.ended.items():
            ended.add_metric([*self._label, reason], count)
        yield ended
        refused = CounterMetricFamily(
            "mini_vllm:requests_refused", "Requests refused because too much waited.", labels=["model_name"]
        )
        refused.add_metric(self._label, self._num_refused)
        yield refused
        restarts = CounterMetricFamily(
            "mini_vllm:process_restarts", "Lost processes that were replaced.", labels=["model_name", "process"]
        )
        for process, count in requests.restarts.items():
            restarts.add_metric([*self._label, process], count)
        yield restarts

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"vllm:{name}", help_text, labels=["model_name"])
        metric.add_metric(self._label, value)
        return metric

    def _counter(self, name: str, help_text: str, value: int) -> Metric:
        metric = CounterMetricFamily(f"vllm:{name}", help_text, labels=["model_name"])
        metric.add_metric(self._label, value)
        return metric

    def _histogram(self, name: str, help_text: str, counts: HistogramCounts) -> Metric:
        metric = HistogramMetricFamily(f"vllm:{name}", help_text, labels=["model_name"])
        metric.add_metric(self._label, _buckets(counts), counts.total)
        return metric


def _buckets(counts: HistogramCounts) -> Sequence[tuple[str, float]]:
    """(bound, values up to it), as Prometheus counts."""
    bounds = [*(str(float(bound)) for bound in counts.bounds), "+Inf"]
    return list(zip(bounds, accumulate(counts.counts), strict=True))


def render_metrics(
    model_name: str, requests: RequestMetrics, num_refused: int, stats: Stats | None, accept: str
) -> tuple[bytes, str]:
    """The page of metrics and its content type, which follows the request's Accept header.

    `num_refused` requests were over a limit of what may wait. Without `stats` what only the core knows is left out. The
    memory, open files and processor time are this process's.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(model_name, requests, num_refused, stats))
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
