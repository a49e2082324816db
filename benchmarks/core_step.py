"""What the core's own work costs a step: the real scheduler, with a worker that answers at once.

    python -m benchmarks.core_step

Every request decodes with the prefix cache on; a step's time is scheduling it, encoding it, learning from how long it
took, applying its tokens and encoding what goes to the frontend. Sockets are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import deque
from pathlib import Path

import numpy as np

from core.scheduler import Scheduler, SchedulerConfig
from core.step_time import RelativeCosts, StepTimeModel
from protocol.messages import AddRequest, StepResult, pack_ints
from protocol.sampling import SamplingParams
from protocol.transport import encode

BLOCK_SIZE = 16
PROMPT_LEN = 128


def step_times(num_running: int, num_steps: int) -> list[float]:
    """Seconds of core time for each of `num_steps` decode steps of `num_running` requests."""
    max_model_len = PROMPT_LEN + num_steps + 200
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=num_running,
            max_num_batched_tokens=8192,
            max_model_len=max_model_len,
            block_size=BLOCK_SIZE,
            num_blocks=num_running * (max_model_len // BLOCK_SIZE + 2),
            enable_prefix_caching=True,
            eos_token_ids=(1, 2),
        ),
        step_time=StepTimeModel(8e-3, RelativeCosts(pair=2.6e-4, cached_token=4.8e-5)),
    )
    chooser = random.Random(0)
    tokens = np.random.default_rng(0)
    for request_id in range(num_running):
        # Lengths differ, so that block boundaries are spread over the steps as they are in use.
        prompt = tokens.integers(3, 5000, PROMPT_LEN - chooser.randrange(BLOCK_SIZE))
        params = SamplingParams(temperature=0.0, max_tokens=num_steps + 150)
        scheduler.add(0, AddRequest(request_id, pack_ints(prompt), params))
    in_flight: deque[tuple[int, int]] = deque()
    times: list[float] = []
    warm_up = 100
    while len(times) < num_steps + warm_up:
        start = time.perf_counter()
        while scheduler.num_in_flight < 2:
            step = scheduler.schedule()
            assert step is not None
            encode(step)
            in_flight.append((step.step_id, len(scheduler._in_flight[-1].slots)))
        scheduling = time.perf_counter() - start
        step_id, rows = in_flight.popleft()
        result = StepResult(step_id, 0, pack_ints(tokens.integers(3, 5000, rows)))
        start = time.perf_counter()
        for _, message in scheduler.apply(result, seconds=1e-3).messages(0):
            encode(message)
        times.append(scheduling + time.perf_counter() - start)
    return times[warm_up:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 512], help="numbers of running requests")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured for each")
    parser.add_argument("--json", type=Path, help="file to save the figures to")
    arguments = parser.parse_args()
    rows = []
    print("| running | mean µs | p50 µs | p99 µs |\n|---|---|---|---|")
    for running in arguments.running:
        times = sorted(step_times(running, arguments.steps))
        row = {
            "running": running,
            "mean_us": statistics.mean(times) * 1e6,
            "p50_us": times[len(times) // 2] * 1e6,
            "p99_us": times[int(len(times) * 0.99)] * 1e6,
        }
        rows.append(row)
        print(f"| {running} | {row['mean_us']:.0f} | {row['p50_us']:.0f} | {row['p99_us']:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
