"""The messages between the launcher and the processes it has started: how they are, and what has become of the others.

    launcher → any process   ProcessLost EngineFailed Ping
    any process → launcher   Progress ProcessReady ProcessFailed ProcessStuck CrashSearchState Pong

They travel as those of `protocol/messages.py`, which are about requests.
"""

from __future__ import annotations

import msgspec

from protocol.messages import Message


class Progress(Message, frozen=True):
    """`done` of `total` units of a start-up phase, for the progress bar."""

    process: str
    phase: str
    done: int
    total: int


class ProcessReady(Message, frozen=True):
    """The process does its work. `epoch` is that of its configuration, here and below: a process that was replaced may
    be heard after its end.

    Of the core, it says that it has met a worker, in the epoch that its `details` name.
    """

    process: str
    epoch: int
    details: dict[str, str | int | float] = msgspec.field(default_factory=dict)


class ProcessFailed(Message, frozen=True):
    """The process cannot go on. It exits after sending this."""

    process: str
    epoch: int
    message: str


class ProcessStuck(Message, frozen=True):
    """Another process says that this one does not answer in the epoch, which is the latest that it knows of."""

    process: str
    epoch: int
    message: str


class CrashSearchState(Message, frozen=True):
    """Whether the core is looking for a request that crashes the worker: such crashes are expected.

    `is_hopeless` says that the worker crashes whatever it computes.
    """

    epoch: int
    is_running: bool
    is_hopeless: bool = False


class Pong(Message, frozen=True):
    process: str
    epoch: int


ToLauncher = Progress | ProcessReady | ProcessFailed | ProcessStuck | CrashSearchState | Pong


class ProcessLost(Message, frozen=True):
    """The worker or the core is gone, and another one is being started: from now on it is the epoch given.

    `is_from_outside` says that a signal ended it, and not what it was doing.
    """

    process: str
    epoch: int
    reason: str
    is_from_outside: bool


class EngineFailed(Message, frozen=True):
    """The launcher gives up. Whoever waits is to be told why."""

    reason: str


class Ping(Message, frozen=True):
    """Asks for a `Pong`."""


FromLauncher = ProcessLost | EngineFailed | Ping
