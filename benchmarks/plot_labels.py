"""Labels beside the points of a plot, placed where they hide nothing and one another least. Needs matplotlib."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_FONT_SIZE = 7.5
# Points as near as this, in points (1/72 inch), share a label.
_NEAR = 7.0
# Distances from a point to the edge of its label.
_GAPS = (4.5, 8.0, 12.0)
# What a place costs: touching a label or a marker or leaving the plot, which is not done; each line crossed; its gap.
_IMPOSSIBLE, _LINE_COST, _GAP_COST = 100.0, 3.0, 0.8


@dataclass(frozen=True, slots=True)
class Label:
    """What is written beside the point x, y, which is in the units of the axes: `text`, and its unit."""

    x: float
    y: float
    text: str
    unit: str
    colour: str


def place_labels(axes: Axes, series: Sequence[Sequence[Label]]) -> list[Annotation]:
    """Writes the labels of each series' points, in axes that are drawn and laid out, and returns them.

    Points of a series that nearly coincide share a label, and a label is left out where another series has the same one
    at the same place, or where every place is taken.
    """
    pixels = axes.figure.dpi / 72
    markers = [
        Bbox.from_bounds(x - 3 * pixels, y - 3 * pixels, 6 * pixels, 6 * pixels)
        for line in axes.lines
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    lines = [axes.transData.transform_path(line.get_path()) for line in axes.lines]

    def cost(box: Bbox, gap: float) -> float:
        is_inside = (
            axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        )
        return (
            _GAP_COST * gap
            + _IMPOSSIBLE * (box.count_overlaps(taken) + box.count_overlaps(markers) + (not is_inside))
            + _LINE_COST * sum(path.intersects_bbox(box, filled=False) for path in lines)
        )

    taken: list[Bbox] = []
    placed: list[Annotation] = []
    for label in _different(axes, [_merged(axes, labels) for labels in series]):
        annotation = _write(axes, label)
        at_point = annotation.get_window_extent()
        places = [
            (cost(at_point.translated(x * pixels, y * pixels), gap), (x, y))
            for gap in _GAPS
            for x, y in _around(at_point.width / pixels, at_point.height / pixels, gap)
        ]
        least, (x, y) = min(places, key=lambda place: place[0])
        if least >= _IMPOSSIBLE:
            annotation.remove()
            continue
        annotation.set_position((x, y))
        # Numbers that touch would read as one.
        taken.append(at_point.translated(x * pixels, y * pixels).padded(2 * pixels, 0))
        placed.append(annotation)
    return placed


def _write(axes: Axes, label: Label) -> Annotation:
    """The label, on its point."""
    annotation = axes.annotate(
        label.text + label.unit,
        (label.x, label.y),
        (0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=_FONT_SIZE,
        color=_darker(label.colour),
        # Lines fade behind it; markers are above.
        bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        zorder=2.5,
    )
    annotation.set_in_layout(False)
    return annotation


def _around(width: float, height: float, gap: float) -> list[tuple[float, float]]:
    """Offsets of a label's centre: above its point, right, below, left, and between them."""
    x, y = width / 2 + gap, height / 2 + gap
    # Between them a corner of the label is nearest, so that less is enough.
    near_x, near_y = width / 2 + gap / 2, height / 2 + gap / 2
    straight = [(0.0, y), (x, 0.0), (0.0, -y), (-x, 0.0)]
    return [*straight, (near_x, near_y), (near_x, -near_y), (-near_x, -near_y), (-near_x, near_y)]


def _are_near(axes: Axes, one: Label, other: Label) -> bool:
    (x0, y0), (x1, y1) = axes.transData.transform([(one.x, one.y), (other.x, other.y)])
    return math.hypot(x1 - x0, y1 - y0) < _NEAR * axes.figure.dpi / 72


def _merged(axes: Axes, labels: Sequence[Label]) -> list[Label]:
    """One label, `first–last`, for successive points that nearly coincide."""
    groups: list[list[Label]] = []
    for label in labels:
        if groups and _are_near(axes, groups[-1][0], label):
            groups[-1].append(label)
        else:
            groups.append([label])
    return [
        replace(group[0], text=group[0].text if len(group) == 1 else f"{group[0].text}–{group[-1].text}")
        for group in groups
    ]


def _different(axes: Axes, series: Sequence[Sequence[Label]]) -> list[Label]:
    """The labels of all series but those that say again what an earlier one says of the same place."""
    kept: list[Label] = []
    for label in itertools.chain.from_iterable(series):
        if not any(label.text == other.text and _are_near(axes, label, other) for other in kept):
            kept.append(label)
    return kept


def _darker(colour: str) -> tuple[float, float, float]:
    """For small text, which needs more contrast than a line."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return colorsys.hls_to_rgb(hue, min(lightness, 0.28), saturation)
