"""Draws latency against throughput, for the sweeps of one or more servers, as PNG and SVG. Needs matplotlib.

Nothing here needs a display, and the same sweeps give the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.plot_labels import Label, place_labels
from benchmarks.report import Distribution
from benchmarks.sweep_file import Point, Sweep

# Okabe and Ito, "Color Universal Design" (2008): colours that all kinds of colour vision tell apart. Their black is the
# text's here, and their yellow is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# One more than colours, so that not even the seventh server looks like the first.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_GREY = "#555555"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    # Names are shown as they are, and stay text that can be searched for.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mini-vllm",
}
_WIDTH_IN = 8.0
_PNG_DPI = 160
# Characters that fit the width: of the title, and of the legend's columns with their symbols.
_TITLE_CHARS = 85
_LEGEND_CHARS = 100
# Where a panel's largest latency is more than so many times its smallest, its axis is logarithmic.
_LOG_FROM = 10.0

Figures = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of the figure: what stands over the throughput.

    Attributes:
        better: an arrow to the corner where the better server is.
        figures: what is drawn of a point: the median, and the 99th percentile, which is dashed. None: not there.
    """

    title: str
    unit: str
    better: str
    figures: Callable[[Point], Figures]


def _latency(of: Callable[[Point], Distribution | None]) -> Callable[[Point], Figures]:
    def figures(point: Point) -> Figures:
        distribution = of(point)
        return (None, None) if distribution is None else (distribution.p50, distribution.p99)

    return figures


PANELS = (
    # Not `inter_token_ms`, whose median is zero for a server that holds tokens back and sends them together.
    Panel("Inter-token latency", "ms", "↘", _latency(lambda point: point.event_gap_ms)),
    Panel("Time to first token", "ms", "↘", _latency(lambda point: point.ttft_ms)),
    Panel("Speed for each user", "tok/s per user", "↗", lambda point: (point.user_tokens_per_s, None)),
    Panel("End-to-end latency", "ms", "↘", _latency(lambda point: point.e2e_ms)),
)


@dataclass(frozen=True, slots=True)
class Series:
    """How one server is drawn. Its points ascend by load."""

    label: str
    points: list[Point]
    load_unit: str
    colour: str
    marker: str
    size: float

    def drawn(self, panel: Panel, which: int) -> list[tuple[float, float, str]]:
        """Throughput, value and load of the points that have the value; `which` of the panel's two it is."""
        values = [(point, panel.figures(point)[which]) for point in self.points]
        # Zero is what a percentile of hardly any times can be; a logarithmic axis has no place for it.
        return [(point.output_tokens_per_s, y, f"{point.load:g}") for point, y in values if y]


def draw(sweeps: Sequence[Sweep], out: Path, title: str | None = None) -> list[Path]:
    """Writes `out`.png and `out`.svg; returns their paths.

    Raises:
        ValueError: two servers have the same name.
        OSError: a file cannot be written.
    """
    series = make_series(sweeps)
    # Not `with_suffix`, which takes the ".6b" of "qwen3-0.6b" for one.
    stem = out.with_suffix("") if out.suffix in (".png", ".svg") else out
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        # The reader's own settings would make other plots of the same figures.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = _figure(series, title or default_title(sweeps), _caption(sweeps))
        figure.savefig(png, dpi=_PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def make_series(sweeps: Sequence[Sweep]) -> list[Series]:
    """Each server's label and looks; the label says what was sent where that differs between servers."""
    names = [sweep.name for sweep in sweeps]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} of the files have {name!r} as `name`: give each server its own --name"
            )
    workloads = {_workload(sweep) for sweep in sweeps}
    return [
        Series(
            label=sweep.name if len(workloads) == 1 else f"{sweep.name} ({_workload(sweep)})",
            points=sorted(sweep.points, key=lambda point: point.load),
            load_unit="" if sweep.swept == "concurrency" else "/s",
            colour=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            # Where two coincide, the one beneath shows around the other.
            size=max(4.0, 7.0 - 1.5 * index),
        )
        for index, sweep in enumerate(sweeps)
    ]


def _workload(sweep: Sweep) -> str:
    input_len, output_len = (text.replace("-", "–") for text in (sweep.workload.input_len, sweep.workload.output_len))
    return f"{input_len} tokens in, {output_len} out"


def default_title(sweeps: Sequence[Sweep]) -> str:
    """Says what the servers have in common."""
    models = {str(sweep.target.get("model", "")) for sweep in sweeps}
    workloads = {_workload(sweep) for sweep in sweeps}
    common = [each.pop() for each in (models, workloads) if len(each) == 1]
    return ": ".join(filter(None, ["Latency against throughput", ", ".join(filter(None, common))]))


def _caption(sweeps: Sequence[Sweep]) -> str:
    meanings = {"concurrency": "requests under way at once", "request_rate": "requests sent a second (/s)"}
    used = [meaning for swept, meaning in meanings.items() if any(sweep.swept == swept for sweep in sweeps)]
    return (
        f"Numbers at the points: {', or '.join(used)}. Arrows point to the better corner.\n"
        "Inter-token latency: tokens that came together count once."
    )


def _figure(series: Sequence[Series], title: str, caption: str) -> Figure:
    labels = ["median", "99th percentile", *("\n".join(textwrap.wrap(each.label, 90)) for each in series)]
    num_columns = max(1, min(len(labels), _LEGEND_CHARS // (max(map(len, labels)) + 8)))
    num_rows = math.ceil(len(labels) / num_columns)
    figure = Figure(figsize=(_WIDTH_IN, 6.8 + 0.2 * num_rows), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, _TITLE_CHARS)), fontsize=11, fontweight="bold")
    panels = list(zip(figure.subplots(2, 2).flat, PANELS, strict=True))
    for axes, panel in panels:
        _draw_panel(axes, panel, series)
    handles = [
        Line2D([], [], color=_GREY, marker="o", markersize=5, linewidth=1.5),
        Line2D([], [], color=_GREY, marker="o", markersize=3.5, linewidth=0.9, linestyle="--", markerfacecolor="white"),
        *(Line2D([], [], color=each.colour, marker=each.marker, markersize=6, linewidth=1.5) for each in series),
    ]
    legend = figure.legend(
        handles, ["-"] * len(handles), loc="outside lower center", ncols=num_columns, frameon=False, fontsize=9
    )
    legend.set_title(caption)
    legend.get_title().set(color=_GREY, fontsize=8, multialignment="center")
    for text, label in zip(legend.get_texts(), labels, strict=True):
        # Set afterwards: a legend leaves out what is handed to it with an underscore in front.
        text.set_text(label)
    # The layout is known when it has been made; labels are placed in it and do not change it.
    figure.draw_without_rendering()
    for axes, panel in panels:
        points = [
            [Label(x, y, load, each.load_unit, each.colour) for x, y, load in each.drawn(panel, which=0)]
            for each in series
        ]
        place_labels(axes, points)
    return figure


def _draw_panel(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_title(panel.better, loc="right", fontsize=12, color=_GREY)
    axes.set_xlabel("output tok/s, all requests together")
    axes.set_ylabel(panel.unit)
    values: list[float] = []
    for each in series:
        for which, line in enumerate(
            (
                {"linewidth": 0.3 * each.size, "markersize": each.size},
                {"linewidth": 0.9, "markersize": 0.7 * each.size, "linestyle": "--", "markerfacecolor": "white"},
            )
        ):
            drawn = each.drawn(panel, which)
            values += [y for _, y, _ in drawn]
            axes.plot(
                [x for x, _, _ in drawn],
                [y for _, y, _ in drawn],
                color=each.colour,
                marker=each.marker,
                zorder=3 - which,
                **line,  # type: ignore[arg-type]
            )
    axes.margins(x=0.1, y=0.1)
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(plain)
    axes.set_xlim(left=0)
    if panel.unit == "ms" and values and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")
        is_wide = max(values) > 1000 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain)
