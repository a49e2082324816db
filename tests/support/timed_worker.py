"""A worker that computes nothing, and answers each step after a time of its own: with it the other processes are what
takes longest, as beside a fast GPU.

    STEP_MS=1 python -m tests.support.timed_worker launch FLAGS…     the launcher, with this worker in place of the real
"""

from __future__ import annotations

import os
import time

from tests.support.other_worker import launch_or_run

TOKEN = 5


def run_worker() -> None:
    from protocol.messages import Step, StepResult, pack_ints, unpack_ints
    from protocol.process import run_child
    from worker import main as worker_main
    from worker.runner import StepRunner

    seconds = float(os.environ["STEP_MS"]) / 1000

    class Timed:
        """A step that has been launched: it begins when the one before is done."""

        last_done = 0.0

        def __init__(self, step: Step, num_rows: int) -> None:
            self._result = StepResult(step.step_id, step.epoch, pack_ints([TOKEN] * num_rows))
            self._done = Timed.last_done = max(time.perf_counter(), Timed.last_done) + seconds

        def is_ready(self) -> bool:
            # The real worker polls all the time. This one leaves the CPU to the others, of which there are few.
            time.sleep(min(max(self._done - time.perf_counter(), 0.0), 0.0001))
            return time.perf_counter() >= self._done

        def result(self) -> StepResult:
            return self._result

    def execute(self: StepRunner, step: Step) -> Timed:
        if step.decode_slots is not None:
            self._decode_slots = unpack_ints(step.decode_slots)
        return Timed(step, len(self._decode_slots) + sum(step.prefill_samples))

    StepRunner.execute = execute  # type: ignore[assignment, method-assign]
    run_child("worker", worker_main.main)


if __name__ == "__main__":
    launch_or_run(__spec__.name, run_worker)
