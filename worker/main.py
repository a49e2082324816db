"""The worker process: makes a runner (`startup.py`), then runs steps as they come and sends their tokens back.

    python -m worker.main CONFIG_FILE

While a step is on the device the loop polls for its tokens and for the next step, so that neither waits for the other;
with nothing on the device it blocks. It outlives a core that dies: the next one finds it with its slots empty.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec
import torch
import zmq

from protocol.config import EngineConfig, parse_steps
from protocol.launcher_messages import ProcessLost
from protocol.messages import CoreToWorker, Malformed, Shutdown, Step, StepMasks, WorkerReady
from protocol.process import ChildProcess, run_child
from protocol.transport import UNLIMITED, Channel, open_socket
from worker.profiling import StepProfiler
from worker.runner import StepRunner
from worker.startup import make_runner
from worker.step_results import PendingTokens


def make_profiler(config: EngineConfig) -> StepProfiler | None:
    if config.options.profile_dir is None:
        return None
    return StepProfiler(Path(config.options.profile_dir), *parse_steps(config.options.profile_steps))


def serve(child: ChildProcess, runner: StepRunner, profiler: StepProfiler | None, ready: WorkerReady) -> int | None:
    """Meets the core of the epoch that `ready` names, and runs its steps.

    While a step waits for masks, which depend on the tokens before it, those of earlier steps still go back.

    Returns:
        The epoch of another core, if this one is lost, or None when it has sent `Shutdown`.
    """
    address = child.config.worker_address(ready.epoch)
    channel = Channel(open_socket(child.context, zmq.PAIR, connect=address, max_message_bytes=UNLIMITED), CoreToWorker)
    poller = zmq.Poller()
    for socket in (channel.socket, child.control.socket):
        poller.register(socket, zmq.POLLIN)
    channel.send(ready)
    pending: deque[PendingTokens] = deque()
    while True:
        if not pending:
            poller.poll()
            # A core that is gone sends nothing, so what is pending has run out.
            epoch = _epoch_of_next_core(child)
            if epoch is not None:
                channel.socket.setsockopt(zmq.LINGER, 0)
                channel.close()
                return epoch
        received = channel.receive()
        if received is not None:
            message = received[1]
            if isinstance(message, Step):
                if profiler is not None:
                    profiler.before_step()
                launched = runner.execute(message)
                if launched is not None:
                    pending.append(launched)
            elif isinstance(message, StepMasks):
                pending.append(runner.finish(message))
            elif isinstance(message, Shutdown):
                channel.close()
                return None
            elif isinstance(message, Malformed):
                raise RuntimeError(f"the core sent a malformed message: {message.reason}")
        while pending and pending[0].is_ready():
            done = pending.popleft()
            channel.send(done.result())


def _epoch_of_next_core(child: ChildProcess) -> int | None:
    """The epoch of the core that replaces this one, if the launcher says that it is lost."""
    epoch = None
    while (received := child.control.receive()) is not None:
        if isinstance(received[1], ProcessLost):
            epoch = received[1].epoch
    return epoch


def main(child: ChildProcess) -> None:
    config = child.config
    runner, ready = make_runner(config, child)
    child.ready(device=device_name(config), kv_cache_tokens=(ready.num_blocks - 1) * ready.block_size)
    profiler = make_profiler(config)
    epoch: int | None = config.epoch
    while epoch is not None:
        epoch = serve(child, runner, profiler, msgspec.structs.replace(ready, epoch=epoch))
        runner.reset()
    if profiler is not None:
        profiler.close()


def device_name(config: EngineConfig) -> str:
    if config.device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    run_child("worker", main)
