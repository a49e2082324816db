"""A worker that can be made to fail: the real one, with a fault in it that only a test can put there.

    python -m tests.support.faulty_worker launch FLAGS…     the launcher, with this worker in the worker's place

While a request whose prompt has the token `POISON` twice in a row is computed, the worker fails in the way that the
environment variable `FAULT` names.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np

from tests.support.other_worker import launch_or_run

POISON = 777


def raise_error() -> None:
    raise RuntimeError("the device has fallen off")


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(3600)


def illegal_memory_access() -> None:
    from tests.support.wild_store import access_illegal_memory

    access_illegal_memory()


FAULTS: dict[str, Callable[[], None]] = {
    "error": raise_error,
    "segfault": segfault,
    "hang": hang,
    "illegal_memory_access": illegal_memory_access,
}


def has_poison(tokens: np.ndarray) -> bool:
    return bool(((tokens[1:] == POISON) & (tokens[:-1] == POISON)).any())


def run_worker() -> None:
    from protocol.messages import Step, unpack_ints
    from protocol.process import run_child
    from worker import main as worker_main
    from worker.runner import StepRunner
    from worker.step_results import PendingTokens

    execute = StepRunner.execute
    fault = FAULTS[os.environ["FAULT"]]

    def execute_or_fail(self: StepRunner, step: Step) -> PendingTokens | None:
        launched = execute(self, step)
        slots = set(self._decode_slots.tolist()) | set(unpack_ints(step.prefill_slots).tolist())
        if any(has_poison(self.state.known_tokens[slot]) for slot in slots):
            fault()
        return launched

    StepRunner.execute = execute_or_fail  # type: ignore[method-assign]
    run_child("worker", worker_main.main)


if __name__ == "__main__":
    launch_or_run(__spec__.name, run_worker)
