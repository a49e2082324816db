"""What a suite makes of the runs of a workload, and how it starts the engine for it."""

import pytest

from benchmarks import online
from benchmarks.suite import engine_flags, parse_arguments, row_of
from benchmarks.workloads import NAMES

RUNS = [
    {"output_rate": rate, "input_tokens": 131_072, "duration_s": seconds}
    for rate, seconds in ((27_282.4, 2.972), (27_271.0, 2.969), (27_286.9, 2.9694))
]


@pytest.mark.parametrize(
    ("workload", "row"),
    [
        ("nano", "| nano, output tok/s | 512 | 27,282 | 27,271 to 27,287 |"),
        ("prefill", "| prefill, input tok/s | 512 | 44,141 | 44,102 to 44,147 |"),
        ("longctx", "| longctx, seconds | 512 | 2.969 | 2.969 to 2.972 |"),
    ],
)
def test_a_row_is_the_median_and_the_range_of_all_runs(workload: str, row: str) -> None:
    assert row_of(workload, RUNS) == row


def test_every_workload_has_its_engine() -> None:
    assert {name: engine_flags(name)[-1] for name in NAMES} == {
        "nano": "512", "seed": "64", "single": "1", "b8": "8", "prefill": "512", "longctx": "512",
    }  # fmt: skip
    assert {engine_flags(name) for name in online.NAMES} == {()}


def test_what_follows_two_dashes_is_the_launcher_s() -> None:
    arguments = parse_arguments(["--workload", "seed,idle", "--", "--model", "x", "--max-num-seqs", "3"])
    assert (arguments.workload, arguments.launch_flags) == (["seed", "idle"], ["--model", "x", "--max-num-seqs", "3"])
    assert parse_arguments([]).workload == [*NAMES, *online.NAMES]
