"""Plots show every server under its name, in colours that every kind of vision tells apart, and label every load."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import msgspec
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.plot_labels import Label, place_labels
from benchmarks.report import Distribution
from benchmarks.sweep_file import Point, Sweep, SweepWorkload, save_sweep
from benchmarks.sweep_plot import COLOURS, MARKERS, default_title, draw, make_series
from tests.e2e.conftest import ROOT


def make_sweep(
    name: str, speed: float = 1.0, swept: str = "concurrency", model: str = "tiny", output_len: str = "64-256"
) -> Sweep:
    """A server that serves up to 64 requests at once, with steps that take longer the more they are."""
    points = []
    for load in (1, 2, 4, 8, 16, 32, 64, 128):
        step = (5 + 0.1 * min(load, 64)) / speed
        latencies = Distribution(step, step, step * 1.1, step * 2, step * 3)
        first = Distribution(*[(20 + 10 * load) / speed] * 5)
        points.append(
            Point(
                load=load,
                requests=100,
                input_tokens=1000,
                cached_tokens=0,
                output_tokens=1000,
                duration_s=10.0,
                output_tokens_per_s=1e3 * min(load, 64) / step,
                user_tokens_per_s=1e3 / step,
                ttft_ms=first,
                inter_token_ms=latencies,
                event_gap_ms=latencies,
                per_output_token_ms=latencies,
                e2e_ms=first,
            )
        )
    return Sweep(
        name=name,
        swept="request_rate" if swept == "request_rate" else "concurrency",
        workload=SweepWorkload(
            input_len="128", output_len=output_len, temperature=0.0, num_requests=100, duration_s=None, seed=0
        ),
        points=points,
        time="",
        command=[],
        target={"model": model},
        machine={},
    )


def texts(svg: Path) -> list[str]:
    """What is written in a picture."""
    return [
        "".join(element.itertext()).strip() for element in ElementTree.parse(svg).iter() if element.tag[-4:] == "text"
    ]


def png_size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


NAMES = [
    "one server",
    "<another> & its $name$",
    "_underscored",
    "server 4",
    "--max-num-seqs 64",
    "Ünï",
    "server 7",
    "8",
]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_server_panel_unit_and_load_is_named(count: int, tmp_path: Path) -> None:
    names = NAMES[:count]
    png, svg = draw([make_sweep(name, 1 + index / 2) for index, name in enumerate(names)], tmp_path / "new" / "sweep")
    assert (png, svg) == (tmp_path / "new" / "sweep.png", tmp_path / "new" / "sweep.svg")
    width, height = png_size(png)
    assert width == 1280
    assert height >= 1100
    written = texts(svg)
    for text in (*names, "median", "99th percentile", "ms", "tok/s per user", "output tok/s, all requests together"):
        assert text in written
    for title in ("Inter-token latency", "Time to first token", "Speed for each user", "End-to-end latency"):
        assert title in written
    assert "Latency against throughput: tiny, 128 tokens in, 64–256 out" in written
    assert {"8", "16", "32"} <= set(written)


def test_rates_are_labelled_as_rates(tmp_path: Path) -> None:
    _, svg = draw([make_sweep("one", swept="request_rate")], tmp_path / "a")
    assert "16/s" in texts(svg)
    assert any("requests sent a second (/s)" in text for text in texts(svg))


def test_the_same_sweeps_give_the_same_bytes_whatever_the_reader_has_set(tmp_path: Path) -> None:
    sweeps = [make_sweep("one"), make_sweep("two", 2)]
    before = [path.read_bytes() for path in draw(sweeps, tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "black"}):
        after = [path.read_bytes() for path in draw(sweeps, tmp_path / "b")]
        assert matplotlib.rcParams["font.size"] == 20
    assert before == after


@pytest.mark.parametrize(("out", "stem"), [("a.png", "a"), ("a.svg", "a"), ("qwen3-0.6b", "qwen3-0.6b")])
def test_an_ending_is_added_where_there_is_none(out: str, stem: str, tmp_path: Path) -> None:
    assert [path.name for path in draw([make_sweep("one")], tmp_path / out)] == [f"{stem}.png", f"{stem}.svg"]


def test_latencies_that_a_point_does_not_have_are_left_out(tmp_path: Path) -> None:
    """Answers of one token: no inter-token latency anywhere."""
    sweep = make_sweep("one")
    points = [
        msgspec.structs.replace(point, event_gap_ms=None, inter_token_ms=None, user_tokens_per_s=None)
        for point in sweep.points
    ]
    _, svg = draw([msgspec.structs.replace(sweep, points=points)], tmp_path / "a")
    assert "one" in texts(svg)


def test_what_differs_between_servers_is_said() -> None:
    same = [make_sweep("one"), make_sweep("two", model="other")]
    assert default_title(same) == "Latency against throughput: 128 tokens in, 64–256 out"
    assert [series.label for series in make_series(same)] == ["one", "two"]
    different = [make_sweep("one"), make_sweep("two", output_len="8")]
    assert default_title(different) == "Latency against throughput: tiny"
    assert make_series(different)[1].label == "two (128 tokens in, 8 out)"


def test_two_servers_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'one' as `name`"):
        draw([make_sweep("one"), make_sweep("one", 2)], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_no_two_servers_look_the_same() -> None:
    series = make_series([make_sweep(f"server {index}") for index in range(len(COLOURS) * len(MARKERS))])
    assert len({(each.colour, each.marker) for each in series}) == len(series)
    for one, other in itertools.combinations(series[: len(COLOURS)], 2):
        assert one.colour != other.colour
        assert one.marker != other.marker


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009):
# what linear RGB looks like without one of the three kinds of cones.
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ np.clip(rgb, 0, 1) / (to_xyz @ np.ones(3))
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_differ_for_every_kind_of_vision(vision: str) -> None:
    """A difference of 2.3 in CIELAB is just noticed side by side; of lines apart it takes several times that."""
    seen = [lab(np.array(VISION[vision]) @ linear(colour)) for colour in COLOURS]
    white = lab(np.ones(3))
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 10
    assert min(np.linalg.norm(one - white) for one in seen) > 30


# --- labels ---------------------------------------------------------------------------------------------------------


def labelled(*series: list[tuple[float, float, str]]) -> tuple[Figure, list[str]]:
    """A plot of the points, and what is written beside them."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    for points in series:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", markersize=5)
    axes.margins(0.1)
    figure.draw_without_rendering()
    placed = place_labels(axes, [[Label(*point, unit="", colour="#0072B2") for point in points] for points in series])
    boxes = [label.get_window_extent() for label in placed]
    for one, other in itertools.combinations(boxes, 2):
        assert one.count_overlaps([other]) == 0
    for box in boxes:
        for points in series:
            assert not any(box.contains(*axes.transData.transform((x, y))) for x, y, _ in points)
    return figure, [label.get_text() for label in placed]


def test_labels_cover_neither_points_nor_one_another() -> None:
    rng = np.random.default_rng(0)
    for count in (3, 10, 40):
        points = [(x, y, str(index)) for index, (x, y) in enumerate(rng.random((count, 2)).tolist())]
        _, written = labelled(points[: count // 2], points[count // 2 :])
        # In a crowd some have no place.
        assert len(written) >= min(count, 12)


def test_points_that_nearly_coincide_share_a_label() -> None:
    _, written = labelled([(0, 0, "1"), (5, 5, "2"), (10, 10, "4"), (10.001, 10, "8"), (10, 10.001, "16")])
    assert written == ["1", "2", "4–16"]


def test_servers_that_coincide_are_labelled_once_where_the_labels_agree() -> None:
    _, written = labelled([(0, 0, "1"), (5, 5, "2"), (10, 10, "4")], [(0, 0, "1"), (5, 5, "2"), (10, 5, "4")])
    assert written == ["1", "2", "4", "4"]


# --- without matplotlib ---------------------------------------------------------------------------------------------


def run_without_matplotlib(code: str) -> subprocess.CompletedProcess[str]:
    """None in `sys.modules` is Python's way to make an import fail as if nothing were installed."""
    blocked = f"import sys; sys.modules['matplotlib'] = None; {code}"
    return subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path) -> None:
    save_sweep(tmp_path / "one.json", make_sweep("one"))
    arguments = ["sweep", "--plot", str(tmp_path / "one.json"), "--out", str(tmp_path / "one")]
    result = run_without_matplotlib(f"sys.argv = {arguments}; from benchmarks.sweep import main; sys.exit(main())")
    assert result.returncode == 2
    assert "pip install 'matplotlib" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
