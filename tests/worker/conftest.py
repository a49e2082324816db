"""Models in the test's own process run in one thread: small as they are, two are no faster, and where another process
takes a CPU, each operation waits for the thread that has none. What takes minutes runs in the background."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.background import MARK, Background

_BACKGROUND = pytest.StashKey[Background]()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker(MARK) is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker(MARK) for item in session.items) and not session.config.option.collectonly:
        session.stash[_BACKGROUND] = Background(session.items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _BACKGROUND in session.stash:
        session.stash[_BACKGROUND].close()


@pytest.fixture
def of_background(request: pytest.FixtureRequest) -> Any:
    """What the test's work in the background returned."""
    return request.session.stash[_BACKGROUND].result(request.node.nodeid)
