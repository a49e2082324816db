"""How long a step would take on one GPU, as a formula, so that tests of what time decides are the same every time."""

from core.step_time import StepWork


def gpu_seconds(work: StepWork) -> float:
    """About what an H200 needs with the shape of Qwen3-0.6B."""
    decode = 0.57e-3 + work.context * 114_688 / 4.0e12 if work.context else 0.0
    return decode + 2.2e-6 * work.tokens + work.pairs * 4 * 16 * 128 * 28 / 400e12
