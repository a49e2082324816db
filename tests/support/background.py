"""Work that takes minutes of CPU time: it begins before the first test, and takes what all others leave.

A test names its work, `@pytest.mark.background(function, *arguments, seconds=…)`, and asks for the result with the
fixture `of_background`. The work that takes longest is begun first, and such tests come last. The function is called in
another process, so it belongs to a module.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

MARK = "background"


class Background:
    """Two processes of the lowest priority, and what they are to do by test."""

    def __init__(self, items: Iterable[pytest.Item]) -> None:
        marked = [(item.nodeid, mark) for item in items for mark in item.iter_markers(MARK)]
        marked.sort(key=lambda each: -each[1].kwargs["seconds"])
        # Processes: in threads, Python 3.11's parser trips over another thread that parses (a SystemError about the
        # "recursion depth" of the AST), and Triton parses a kernel when it compiles it.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(2, mp_context=context, initializer=_give_way)
        self._results: dict[str, Future[Any]] = {
            name: self._pool.submit(mark.args[0], *mark.args[1:]) for name, mark in marked
        }

    def result(self, name: str) -> Any:
        """Waits for the work of a test. What it raised is raised here, and an error if its process has died."""
        return self._results[name].result()

    def close(self) -> None:
        """Ends what still runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _give_way() -> None:
    """Gives this process, and those that it starts, the lowest priority."""
    # Where Linux shares the CPU out by session, which is its own then, a process' priority counts within it alone.
    os.setsid()
    os.nice(19)
    for _ in range(20):
        try:
            with open("/proc/self/autogroup", "w") as autogroup:
                autogroup.write("19")
        except BlockingIOError:
            time.sleep(0.15)  # Linux lets users change one of these in a tenth of a second
        except OSError:
            return  # it does not share it out so
        else:
            return
