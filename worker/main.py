"""The worker process: loads the model, then runs steps as they come and sends their tokens back.

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

from protocol.config import EngineConfig, parse_steps, usable_cpus
from protocol.errors import ConfigError
from protocol.launcher_messages import ProcessLost
from protocol.messages import PROTOCOL_VERSION, CoreToWorker, Malformed, Shutdown, Step, StepMasks, WorkerReady
from protocol.process import ChildProcess, run_child
from protocol.transport import UNLIMITED, Channel, open_socket
from worker.kernels import select
from worker.kv_cache import allocate_kv_cache, bounded_model_len, num_blocks_on_cpu, num_blocks_on_gpu
from worker.models import Qwen3, create_model
from worker.profiling import StepProfiler
from worker.runner import StepRunner
from worker.step_results import PendingTokens
from worker.weights import load_weights, randomize_weights

_TRIALS = 3  # more than one, since the driver takes memory for graphs in pieces of several


def make_device(config: EngineConfig) -> torch.device:
    """The device, made ready for use.

    Raises:
        ConfigError: a GPU is asked for and torch has none.
    """
    if config.device == "cpu":
        torch.set_num_threads(config.options.num_threads or usable_cpus())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} sees no GPU; install a CUDA build of torch, or use --device cpu"
        )
    # The engine's bf16 numerics are stated for full-precision accumulation.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def load_model(config: EngineConfig, device: torch.device, dtype: torch.dtype, child: ChildProcess | None) -> Qwen3:
    """The model with its weights, from files or at random."""
    model = create_model(config.model_config, select(device), config.max_model_len, device, dtype)
    layout = model.checkpoint_layout()
    if config.options.load_format == "dummy":
        randomize_weights(layout)
    else:

        def progress(done: int, total: int) -> None:
            if child is not None and (done % 8 == 0 or done == total):
                child.progress("weights", done, total)

        load_weights(layout, Path(config.model_path), progress)
    return model


def make_runner(config: EngineConfig, child: ChildProcess | None = None) -> tuple[StepRunner, WorkerReady]:
    """A runner ready for its first step, and what the core must know of it.

    Raises:
        ConfigError: the device, the weights or the memory do not allow it.
    """
    device, dtype = make_device(config), getattr(torch, config.dtype)
    model = load_model(config, device, dtype, child)
    try:
        runner = StepRunner(config, model, select(device), device, dtype)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--attention-backend {config.attention_backend}: {error}") from error
    use_graphs = device.type == "cuda" and not config.options.enforce_eager and config.attention_backend != "torch"
    if device.type == "cuda":
        # What graphs take is measured only where it decides: a worker that replaces another has its number of blocks.
        measures_graphs = use_graphs and config.options.num_gpu_blocks_override is None
        num_blocks = num_blocks_on_gpu(config, dtype, _peak_bytes(config, runner, device, dtype, measures_graphs))
    else:
        num_blocks = num_blocks_on_cpu(config, dtype)
    max_model_len = bounded_model_len(config, num_blocks)
    runner.program.set_kv_cache(allocate_kv_cache(config, num_blocks, device, dtype))
    runner.run_small_steps()
    if use_graphs:

        def progress(done: int, total: int) -> None:
            if child is not None and (done % 8 == 0 or done == total):
                child.progress("CUDA graphs", done, total)

        runner.use_graphs(runner.capture_graphs(progress))
    return runner, WorkerReady(PROTOCOL_VERSION, config.epoch, num_blocks, config.block_size, max_model_len)


def _peak_bytes(
    config: EngineConfig, runner: StepRunner, device: torch.device, dtype: torch.dtype, with_graphs: bool
) -> int:
    """Most device memory in use while the largest steps run, and, `with_graphs`, what graphs will add to it.

    Measured with a cache of a few blocks: null rows read only the null block. Graphs are captured on trial, the largest
    of each kind, again and again: the first time shows their buffers, which the smaller graphs will share, the other
    times what the driver keeps for a graph's nodes, which each graph will cost again. Steps run eagerly beside the
    graphs' buffers, to warm up and where they are too large to be captured.
    """
    runner.program.set_kv_cache(allocate_kv_cache(config, 2, device, dtype))
    before = _used_bytes()
    runner.run_largest_steps()
    eager = _used_bytes() - before
    if not with_graphs:
        return before + eager
    trials = [runner.capture_graphs(only_largest=True)]
    with_buffers = _used_bytes()
    for _ in range(_TRIALS):
        trials.append(runner.capture_graphs(only_largest=True, like=trials[0]))
    nodes = max(0, _used_bytes() - with_buffers) / (_TRIALS * len(trials[0]))
    return with_buffers + eager + int(nodes * runner.num_graphs)


def _used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


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
