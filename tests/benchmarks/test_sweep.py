"""A sweep sends what it says, its file holds what was measured, and what is no such file is refused with the field."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ipc_transport import IpcTransport
from benchmarks.report import RunReport
from benchmarks.runner import RequestResult, run_users
from benchmarks.sweep import main, measure, parse_arguments
from benchmarks.sweep_file import VERSION, Point, Sweep, SweepFileError, SweepWorkload, load_sweep, save_sweep
from benchmarks.workloads import BenchmarkRequest, LengthRange, Workload, new_requests
from frontend import AsyncClient
from protocol.messages import Generate, TokenPrompt, unpack_ints
from tests.support.counting_engine import VOCAB_SIZE, CountingEngine

WORKLOAD = Workload("sweep", [], 0.0)


def report(*results: RequestResult) -> RunReport:
    return RunReport.of(WORKLOAD, list(results))


def make_sweep(name: str = "a server") -> Sweep:
    slow = RequestResult(3, 3, sent=10.0, token_times=[10.5, 10.6, 10.9], output_len=3)
    fast = RequestResult(5, 2, sent=10.1, token_times=[10.2, 10.3], output_len=2, cached_len=1)
    return Sweep(
        name=name,
        swept="concurrency",
        workload=SweepWorkload(
            input_len="3-5", output_len="2-3", temperature=0.0, num_requests=None, duration_s=30.0, seed=7
        ),
        points=[Point.of(1, report(fast)), Point.of(2, report(slow, fast))],
        time="2026-11-24T12:00:00+0000",
        command=["--concurrency", "1,2"],
        target={"model": "tiny", "num_blocks": 64},
        machine={"cpus": 2},
    )


# --- the figures of a point -----------------------------------------------------------------------------------------


def test_a_point_has_the_figures_of_its_run() -> None:
    point = make_sweep().points[1]
    assert (point.load, point.requests, point.input_tokens, point.cached_tokens, point.output_tokens) == (2, 2, 8, 1, 5)
    assert point.duration_s == pytest.approx(0.9)
    assert point.output_tokens_per_s == pytest.approx(5 / 0.9)
    assert point.ttft_ms.p50 == pytest.approx((500 + 100) / 2)
    assert point.inter_token_ms is not None
    assert (point.inter_token_ms.p50, point.inter_token_ms.max) == pytest.approx((100, 300))
    assert point.e2e_ms.p50 == pytest.approx((900 + 200) / 2)
    assert point.e2e_ms.p99 == pytest.approx(200 + 0.99 * 700)


def test_the_speed_for_each_user_is_that_of_the_median_answer_after_its_first_token() -> None:
    # 200, 100 and 300 ms a token after the first; how long the first took plays no part.
    answers = [
        RequestResult(1, 3, sent=0.0, token_times=[wait, wait + gap, wait + 2 * gap], output_len=3)
        for wait, gap in ((0.1, 0.2), (9.0, 0.1), (2.0, 0.3))
    ]
    assert Point.of(3, report(*answers)).user_tokens_per_s == pytest.approx(5)


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0, 1.0]], ids=["one token", "all in one piece"])
def test_an_answer_in_one_piece_has_no_speed_for_its_user(times: list[float]) -> None:
    assert Point.of(1, report(RequestResult(1, len(times), 0.0, times, len(times)))).user_tokens_per_s is None


# --- the file -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    for name in ("a server", "<another> & its $name$"):
        save_sweep(file, make_sweep(name))
        assert load_sweep(file) == make_sweep(name)
    assert list(tmp_path.iterdir()) == [file]


def test_a_sweep_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    save_sweep(file, make_sweep())
    with pytest.raises(TypeError):
        save_sweep(file, msgspec.structs.replace(make_sweep(), target={"model": object()}))
    assert load_sweep(file) == make_sweep()
    assert list(tmp_path.iterdir()) == [file]


MALFORMED: list[tuple[list[Any], Any, str]] = [
    (["name"], 5, "$.name"),
    (["name"], "two\nlines", "one line of printable text"),
    (["swept"], "users", "$.swept"),
    (["points"], [], "$.points"),
    (["points", 1, "load"], 0, "$.points[1].load"),
    (["points", 0, "ttft_ms"], None, "$.points[0].ttft_ms"),
    (["points", 1, "ttft_ms", "p99"], "fast", "$.points[1].ttft_ms.p99"),
    (["points", 1, "e2e_ms", "p50"], -1.0, "$.points[1].e2e_ms.p50"),
    (["points", 1, "output_tokens_per_s"], 0.0, "$.points[1].output_tokens_per_s"),
    (["points", 0, "speed"], 1.0, "`speed`"),
    (["workload", "input_len"], "9to5", "$.workload.input_len"),
    (["version"], "1", "$.version"),
]


@pytest.mark.parametrize(("where", "value", "named"), MALFORMED, ids=lambda value: str(value)[:30])
def test_a_malformed_file_is_refused_with_its_name_and_the_field(
    where: list[Any], value: Any, named: str, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.json"
    save_sweep(file, make_sweep())
    data = json.loads(file.read_text())
    parent = data
    for key in where[:-1]:
        parent = parent[key]
    parent[where[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(SweepFileError) as caught:
        load_sweep(file)
    assert str(file) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("field", ["name", "points", "version", "workload"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    save_sweep(file, make_sweep())
    data = json.loads(file.read_text())
    del data[field]
    file.write_text(json.dumps(data))
    with pytest.raises(SweepFileError, match=f"`{field}`"):
        load_sweep(file)


def test_another_version_is_refused_as_that(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"version": VERSION + 1, "what": "nobody knows yet"}))
    with pytest.raises(SweepFileError, match=rf"version {VERSION + 1} .* version {VERSION} is read"):
        load_sweep(file)


@given(
    st.binary(max_size=200) | st.sampled_from([b"[" * 100_000, b'{"version": 1, "name": "\xff"}', b'{"version": 1e99}'])
)
def test_no_bytes_are_a_sweep_by_chance(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(data)
    with pytest.raises(SweepFileError, match=r"any\.json"):
        load_sweep(file)


@pytest.mark.parametrize("command", [["--plot", "nowhere.json"], ["--plot", __file__]], ids=["none", "no JSON"])
def test_a_file_that_cannot_be_plotted_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", *command])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert command[1] in line


# --- measuring, with an engine that the test plays -------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[CountingEngine]:
    engine = CountingEngine(f"ipc://{tmp_path}/engine.sock")
    engine.start()
    yield engine
    engine.stop()


def flags(engine: CountingEngine, file: Path, *more: str) -> list[str]:
    return ["--ipc", engine.address, "--input-len", "3-9", "--output-len", "2-5", "--json", str(file), *more]


def prompts(requests: list[Generate]) -> list[tuple[int, ...]]:
    found = []
    for request in requests:
        assert isinstance(request.prompt, TokenPrompt)
        found.append(tuple(unpack_ints(request.prompt.token_ids)))
    return found


async def test_every_load_is_measured_with_the_same_lengths_and_new_prompts(
    engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "sweep.json"
    size = ["--concurrency", "3,1", "--num-requests", "20", "--no-warmup", "--name", "counted"]
    assert await measure(parse_arguments(flags(engine, file, *size))) == 0
    first, second = engine.seen[:20], engine.seen[20:]
    lengths = [
        collections.Counter((len(prompt), request.params.max_tokens) for prompt, request in zip(prompts(each), each))
        for each in (first, second)
    ]
    assert lengths[0] == lengths[1]
    assert prompts(first) != prompts(second)
    assert max(max(prompt) for prompt in prompts(engine.seen)) < VOCAB_SIZE
    sweep = load_sweep(file)
    assert (sweep.name, sweep.swept, sweep.target["model"]) == ("counted", "concurrency", "tiny")
    assert [point.load for point in sweep.points] == [3, 1]
    for point, seen in zip(sweep.points, (first, second)):
        assert point.requests == 20
        assert point.input_tokens == sum(map(len, prompts(seen)))
        assert point.output_tokens == sum(request.params.max_tokens or 0 for request in seen)
        assert point.cached_tokens == 2 * 20
    printed = capsys.readouterr()
    assert printed.out.startswith("| concurrency | output tok/s | tok/s per user | TTFT p50, ms | p99 | ITL p50, ms |")
    assert [line.split(" ")[1] for line in printed.out.splitlines()[2:]] == ["3", "1"]
    assert f"2 of 2 points are in {file}" in printed.err


async def test_a_rate_for_a_time_is_so_many_requests(engine: CountingEngine, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    size = ["--rate", "40,0.1", "--duration", "0.5", "--no-warmup"]
    assert await measure(parse_arguments(flags(engine, file, *size))) == 0
    sweep = load_sweep(file)
    assert (sweep.swept, sweep.name) == ("request_rate", "tiny")
    assert [(point.load, point.requests) for point in sweep.points] == [(40, 20), (0.1, 1)]


async def test_warm_up_requests_are_short_and_not_counted(engine: CountingEngine, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    size = ["--concurrency", "2,5", "--num-requests", "1", "--output-len", "30"]
    assert await measure(parse_arguments(flags(engine, file, *size))) == 0
    assert [request.params.max_tokens for request in engine.seen] == [8] * 5 + [30] * 2
    assert [point.requests for point in load_sweep(file).points] == [1, 1]


async def test_users_send_one_request_after_another_until_the_time_is_over(engine: CountingEngine) -> None:
    def requests() -> Iterator[BenchmarkRequest]:
        while True:
            yield from new_requests(1, LengthRange(3, 3), LengthRange(20, 20), VOCAB_SIZE, random.Random(0))

    async with AsyncClient(engine.address) as client:
        workload = Workload("users", [], 0.0, concurrency=4)
        results = await run_users(IpcTransport(client), workload, requests(), duration_s=0.3, show_progress=False)
    start = results[0].sent
    events = sorted([(result.sent, 1) for result in results] + [(result.token_times[-1], -1) for result in results])
    under_way = most = 0
    for _, change in events:
        under_way += change
        most = max(most, under_way)
    assert most == 4
    assert len(results) > 8
    assert all(result.output_len == 20 for result in results)
    assert max(result.sent for result in results) < start + 0.3
    assert max(result.token_times[-1] for result in results) > start + 0.2


async def test_nothing_more_is_sent_after_a_failure(
    engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.failure = "not a number"
    file = tmp_path / "sweep.json"
    size = ["--concurrency", "3", "--duration", "60", "--no-warmup"]
    assert await measure(parse_arguments(flags(engine, file, *size))) == 1
    assert len(engine.seen) <= 6
    printed = capsys.readouterr()
    assert "request 0: not a number" in printed.err
    assert "no point was measured" in printed.err
    assert not file.exists()


async def test_a_point_that_lost_tokens_is_not_saved_and_those_before_it_are(
    engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.missing_tokens, engine.num_whole = 1, 10
    file = tmp_path / "sweep.json"
    size = ["--concurrency", "1,2,4", "--num-requests", "8", "--no-warmup"]
    assert await measure(parse_arguments(flags(engine, file, *size))) == 1
    assert [point.load for point in load_sweep(file).points] == [1]
    printed = capsys.readouterr()
    assert "6 of 8 requests went wrong" in printed.err
    assert f"1 of 3 points are in {file}" in printed.err
    assert len(engine.seen) == 16


async def test_lengths_that_do_not_fit_are_refused_before_anything_is_sent(
    engine: CountingEngine, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--input-len and --output-len make up to 609 tokens .* context has 512"):
        await measure(parse_arguments(flags(engine, tmp_path / "a.json", "--rate", "1", "--output-len", "5-600")))
    assert engine.seen == []


async def test_a_place_that_cannot_be_written_to_is_found_before_anything_is_sent(
    engine: CountingEngine, tmp_path: Path
) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        await measure(parse_arguments(flags(engine, tmp_path, "--rate", "1")))
    assert engine.seen == []


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("", "--concurrency --rate --plot"),
        ("--concurrency 1,2 --rate 1 --json a", "--rate"),
        ("--concurrency 1,2", "--json"),
        ("--concurrency 1,1 --json a", "'1,1'"),
        ("--concurrency 0,1 --json a", "'0,1'"),
        ("--concurrency 1.5 --json a", "'1.5'"),
        ("--concurrency , --json a", "','"),
        ("--rate inf --json a", "'inf'"),
        ("--rate 1,-2 --json a", "'1,-2'"),
        ("--rate nan --json a", "'nan'"),
        ("--rate 1 --json a --duration 0", "--duration must be positive, got 0"),
        ("--rate 1 --json a --duration nan", "--duration must be positive, got nan"),
        ("--rate 1 --json a --num-requests -3", "--num-requests must be positive, got -3"),
        ("--rate 1 --json a --num-requests 3 --duration 3", "--duration"),
        ("--rate 1 --json a --temperature -1", "--temperature must not be negative, got -1"),
        ("--rate 1 --json a --input-len 5-3", "'5-3'"),
        ("--rate 1 --json a --vocab-size 0", "--vocab-size must be positive, got 0"),
        ("--rate 1 --json a --out b", "--out goes only with --plot"),
        ("--rate 1 --json a --name \n", "--name"),
        ("--plot a --json b", "--json does not go with --plot"),
        ("--plot a --no-warmup", "--warmup does not go with --plot"),
        ("--plot a --seed 0", "--seed does not go with --plot"),
    ],
    ids=lambda value: value.replace("\n", "newline"),
)
def test_flags_that_mean_nothing_are_refused(command: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(command.split(" ") if command else [])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
