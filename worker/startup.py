"""From a configuration to a runner that is ready for its first step: device, weights, memory, kernels, CUDA graphs.

Everything that the first requests would otherwise wait for is loaded, compiled and captured here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from protocol.config import EngineConfig, usable_cpus
from protocol.errors import ConfigError
from protocol.messages import PROTOCOL_VERSION, WorkerReady
from protocol.process import ChildProcess
from worker.kernels import select
from worker.kv_cache import allocate_kv_cache, bounded_model_len, num_blocks_on_cpu, num_blocks_on_gpu
from worker.models import Qwen3, create_model
from worker.runner import GraphKind, StepRunner, WarmUp
from worker.weights import load_weights, randomize_weights

_TRIALS = 3  # more than one, since the driver takes memory for graphs in pieces of several
# A phase with more parts than this reports every eighth of them.
_MOST_REPORTED = 64


class LoadingPhase:
    """A part of start-up, of which the launcher shows how much is done."""

    def __init__(self, child: ChildProcess | None, name: str, total: int) -> None:
        self._child = child
        self._name = name
        self._total = total
        self._done = 0
        self._report()

    def advance(self) -> None:
        self._done += 1
        if self._total <= _MOST_REPORTED or self._done % 8 == 0 or self._done == self._total:
            self._report()

    def run(self, steps: list[WarmUp]) -> None:
        with torch.inference_mode():
            for step in steps:
                step()
                self.advance()

    def _report(self) -> None:
        if self._child is not None:
            self._child.progress(self._name, self._done, self._total)


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
    phase = LoadingPhase(child, "weights", len(layout))
    if config.options.load_format == "dummy":
        randomize_weights(layout, phase.advance)
    else:
        load_weights(layout, Path(config.model_path), phase.advance)
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
    # What graphs take is measured only where it decides: a worker that replaces another has its number of blocks.
    num_trials = _TRIALS if use_graphs and config.options.num_gpu_blocks_override is None else 0
    largest, small = runner.largest_steps() if device.type == "cuda" else [], runner.small_steps()
    num_captures = num_trials and 1 + num_trials * len(GraphKind)
    kernels = LoadingPhase(child, "kernels", len(largest) + num_captures + len(small))
    if device.type == "cuda":
        runner.program.set_kv_cache(allocate_kv_cache(config, 2, device, dtype))
        num_blocks = num_blocks_on_gpu(config, dtype, _peak_bytes(runner, largest, num_trials, kernels))
    else:
        num_blocks = num_blocks_on_cpu(config, dtype)
    max_model_len = bounded_model_len(config, num_blocks)
    runner.program.set_kv_cache(allocate_kv_cache(config, num_blocks, device, dtype))
    kernels.run(small)
    if use_graphs:
        runner.use_graphs(runner.capture_graphs(LoadingPhase(child, "CUDA graphs", runner.num_graphs()).advance))
    return runner, WorkerReady(PROTOCOL_VERSION, config.epoch, num_blocks, config.block_size, max_model_len)


def _peak_bytes(runner: StepRunner, largest: list[WarmUp], num_trials: int, phase: LoadingPhase) -> int:
    """Most device memory in use while the `largest` steps run, and, with `num_trials`, what graphs will add to it.

    Measured with a cache of a few blocks: null rows read only the null block. The largest graphs are captured on trial:
    the first time shows their buffers, which the smaller graphs will share, other times, kind by kind, what the driver
    keeps for a graph's nodes, which each graph of the kind will cost again. Steps run eagerly beside the graphs'
    buffers, to warm up and where they are too large to be captured.
    """
    before = _used_bytes()
    phase.run(largest)
    eager = _used_bytes() - before
    if not num_trials:
        return before + eager
    first = runner.capture_graphs(only_largest=True)
    phase.advance()
    with_buffers = _used_bytes()
    nodes, kept = 0.0, []
    for kind in GraphKind:
        without = _used_bytes()
        trials = []
        for _ in range(num_trials):
            trials.append(runner.capture_graphs(only_largest=True, like=first, kind=kind))
            phase.advance()
        nodes += max(0, _used_bytes() - without) / sum(map(len, trials)) * runner.num_graphs(kind)
        kept.append(trials)  # what is given back could be taken for the next kind's
    return with_buffers + eager + int(nodes)


def _used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free
