"""The launcher with another module in the worker's place, as tests' own workers start it."""

from __future__ import annotations

import sys
from collections.abc import Callable


def launch_or_run(module: str, run_worker: Callable[[], None]) -> None:
    """`python -m MODULE launch FLAGS…` is the launcher; as the launcher starts it, the module is the worker."""
    if sys.argv[1] != "launch":
        run_worker()
        return
    import launch
    from launcher import child

    child.MODULES["worker"] = module
    sys.exit(launch.main(sys.argv[2:]))
