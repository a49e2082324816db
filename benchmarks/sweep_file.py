"""What a sweep saves: the figures of one server at each load, as versioned JSON. Knows no transport and no plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from benchmarks.report import Distribution, RunReport

# Changed when a reader of the old format would misread the new one.
VERSION = 1

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
# `LengthRange` as text.
Lengths = Annotated[str, Meta(pattern=r"^[1-9]\d*(-[1-9]\d*)?$")]


class SweepFileError(ValueError):
    """A file is not what a sweep saves. The message names the file and the field."""


class Point(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One load and what came of it. Latencies are in milliseconds.

    Attributes:
        load: requests under way at once, or requests sent a second; the file's `swept` says which.
        duration_s: from the first request sent to the last token received.
        output_tokens_per_s: of all requests together.
        user_tokens_per_s: how fast one request's tokens come after its first: the inverse of the median time per output
            token. None where every answer came in one piece.
        inter_token_ms: the time from each token to the next; None where no answer has two tokens.
        event_gap_ms: the same, but tokens that came together count once: see `RequestResult.event_gaps`.
    """

    load: Positive
    requests: Count
    input_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    duration_s: Positive
    output_tokens_per_s: Positive
    user_tokens_per_s: Positive | None
    ttft_ms: Distribution
    inter_token_ms: Distribution | None
    event_gap_ms: Distribution | None
    per_output_token_ms: Distribution | None
    e2e_ms: Distribution

    @staticmethod
    def of(load: float, report: RunReport) -> Point:
        assert report.ttft is not None
        assert report.e2e is not None
        per_token = report.per_output_token
        return Point(
            load=load,
            requests=report.requests,
            input_tokens=report.input_tokens,
            cached_tokens=report.cached_tokens,
            output_tokens=report.output_tokens,
            duration_s=report.duration_s,
            output_tokens_per_s=report.output_rate,
            user_tokens_per_s=1e3 / per_token.p50 if per_token is not None and per_token.p50 > 0 else None,
            ttft_ms=report.ttft,
            inter_token_ms=report.inter_token,
            event_gap_ms=report.event_gap,
            per_output_token_ms=per_token,
            e2e_ms=report.e2e,
        )


class SweepWorkload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every point asked of the server; a point ends after `num_requests` or `duration_s`, whichever is set."""

    input_len: Lengths
    output_len: Lengths
    temperature: Annotated[float, Meta(ge=0)]
    num_requests: Annotated[int, Meta(ge=1)] | None
    duration_s: Positive | None
    seed: int


class Sweep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server's points, in the order measured.

    Attributes:
        name: what plots call the server.
        swept: what `Point.load` is.
        time, command, target, machine: where the figures come from, as `benchmarks.report.provenance` gives it.
    """

    version: int = VERSION
    name: Annotated[str, Meta(min_length=1)]
    swept: Literal["concurrency", "request_rate"]
    workload: SweepWorkload
    points: Annotated[list[Point], Meta(min_length=1)]
    time: str
    command: list[str]
    target: dict[str, str | int]
    machine: dict[str, str | int]

    def __post_init__(self) -> None:
        require_name(self.name)

    @property
    def load_name(self) -> str:
        return {"concurrency": "concurrency", "request_rate": "requests/s"}[self.swept]


def require_name(name: str) -> None:
    """Raises ValueError for a name that a legend cannot show on one line."""
    if not name.strip() or not name.isprintable():
        raise ValueError(f"a server's name must be one line of printable text, got {name!r}")


def require_writable(path: Path) -> None:
    """Makes the file's directory, and raises OSError if the file could not be written: known before it is measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to")


def save_sweep(path: Path, sweep: Sweep) -> None:
    """Replaces the file in one go: whatever happens meanwhile, it holds the old points or the new ones."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(sweep), indent=1) + b"\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Versioned(Struct):
    version: int


def load_sweep(path: Path) -> Sweep:
    """Reads what `save_sweep` wrote.

    Raises:
        OSError: the file cannot be read.
        SweepFileError: it is not a sweep's JSON, a field of it is wrong, or another version wrote it.
    """
    data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise SweepFileError(
                f"{path}: a sweep's JSON of version {version} at `$.version`, where version {VERSION} is read: "
                "measure again"
            )
        return msgspec.json.decode(data, type=Sweep)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SweepFileError(f"{path}: not what `python -m benchmarks.sweep` saves: {error}") from error
