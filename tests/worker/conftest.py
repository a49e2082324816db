"""Models in the test's own process run in one thread: small as they are, two are no faster, and where another process
takes a CPU, each operation waits for the thread that has none."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
