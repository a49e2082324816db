"""The core's end of the connection to the worker, when the worker is not what it should be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from bundled import MODEL_DIR
from core.worker_link import WorkerLink
from protocol.config import EngineConfig, make_options
from protocol.messages import PROTOCOL_VERSION, CoreToWorker, Step, StepResult, WorkerReady
from protocol.resolve import resolve
from protocol.transport import Channel, open_socket


class Worker(Channel):
    def __init__(self, context: zmq.Context, config: EngineConfig, epoch: int = 0) -> None:
        super().__init__(open_socket(context, zmq.PAIR, connect=config.worker_address(epoch)), CoreToWorker)
        self.send(WorkerReady(PROTOCOL_VERSION, epoch, 10, 16, 100))


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    options = make_options({"model": str(MODEL_DIR), "device": "cpu", "step_timeout": 0.2})
    return resolve(options, tmp_path)


def receive(link: WorkerLink, poller: zmq.Poller) -> StepResult | WorkerReady:
    assert poller.poll(5000)
    message = link.receive()
    assert message is not None
    return message


def test_a_step_for_a_worker_that_has_died_is_dropped_until_its_loss_is_told(
    context: zmq.Context, config: EngineConfig
) -> None:
    poller = zmq.Poller()
    link = WorkerLink(context, config, poller)
    worker = Worker(context, config)
    assert isinstance(receive(link, poller), WorkerReady)
    worker.close()
    deadline = time.monotonic() + 5
    while link.is_ready:
        assert time.monotonic() < deadline
        link.send(Step(0, 0))
    link.reopen(1)
    Worker(context, config, 1)
    assert receive(link, poller) == WorkerReady(PROTOCOL_VERSION, 1, 10, 16, 100)
    assert link.is_ready


def test_a_worker_that_owes_a_step_for_too_long_is_found_once(context: zmq.Context, config: EngineConfig) -> None:
    poller = zmq.Poller()
    link = WorkerLink(context, config, poller)
    worker = Worker(context, config)
    receive(link, poller)
    assert link.patience_ms is None
    link.send(Step(0, 0))
    assert link.patience_ms is not None
    assert not link.has_become_stuck()
    worker.send(StepResult(0, 0, b""))
    receive(link, poller)
    time.sleep(0.25)
    assert not link.has_become_stuck()
    link.send(Step(1, 0))
    time.sleep(0.25)
    assert link.has_become_stuck()
    assert not link.has_become_stuck()
    assert link.patience_ms is None
