"""Threads with room for recursion, for libraries that follow a user's nesting in native code.

Such code ends the whole process when its stack is full, and a grammar of 100 KB whose rules lead from one to the next
is enough for that on a stack of the usual size. A stack is address space: memory is what was used of it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

DEEP_STACK_BYTES = 256 * 1024 * 1024


def deep_thread_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads with deep stacks. They start here: the size holds for those that start while it is set."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    all_run = threading.Barrier(num_threads + 1)
    usual = threading.stack_size(DEEP_STACK_BYTES)
    try:
        for _ in range(num_threads):
            pool.submit(all_run.wait)
        all_run.wait()
    finally:
        threading.stack_size(usual)
    return pool
