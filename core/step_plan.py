"""What the scheduler notes of a step while it makes it, and until its tokens are back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core.request import Request
from core.step_time import StepWork


@dataclass(slots=True)
class StepInFlight:
    """Whose tokens a step will bring back: its sampling rows, in order, and the slots' generations when it was sent.

    `measured` are the requests whose prompts it measures, in order, with whether that is the end of the prompt.
    """

    step_id: int
    slots: np.ndarray
    generations: np.ndarray
    work: StepWork
    measured: list[tuple[Request, bool]]
    masked_rows: np.ndarray  # those of requests with a grammar
    masks_are_sent: bool = False
    detached: dict[int, Request] = field(default_factory=dict)  # rows of requests preempted since


@dataclass(slots=True)
class PrefillChunks:
    slots: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    measured: list[tuple[Request, bool]] = field(default_factory=list)
    first_layer: int = 0
    num_layers: int = 0  # of the one chunk, if it is computed layer by layer; 0: all


@dataclass(slots=True)
class LayeredChunk:
    """A chunk that is computed in several steps, some layers in each, beside the decodes that each of them does.

    `is_due` if the last step had none of its layers: then the next one has, whatever is more urgent.
    """

    request: Request
    start: int
    length: int
    num_layers: int
    next_layer: int = 0
    is_due: bool = False
