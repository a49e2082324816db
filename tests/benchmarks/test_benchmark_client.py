"""The benchmark client against endpoints that the test plays itself: every token is counted, and a lost one is noticed.

The HTTP server here is every OpenAI-compatible server in turn: with token ids and without, in whole events or pieces.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import parse_arguments, run
from protocol.messages import TokenPrompt, unpack_ints
from tests.support.counting_engine import VOCAB_SIZE, CountingEngine

SMALL = ["--num-requests", "6", "--input-len", "3-9", "--output-len", "2-5", "--no-warmup"]


async def measure(*flags: str) -> int:
    return await run(parse_arguments([*flags]))


# --- over IPC -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ipc_engine(tmp_path: Path) -> Iterator[CountingEngine]:
    engine = CountingEngine(f"ipc://{tmp_path}/engine.sock")
    engine.start()
    yield engine
    engine.stop()


async def test_ipc_requests_are_what_was_asked_for_and_all_figures_are_saved(
    ipc_engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    flags = ["--ipc", ipc_engine.address, *SMALL, "--temperature", "0.5", "--runs", "2", "--json", str(file)]
    assert await measure(*flags) == 0
    printed = capsys.readouterr()
    assert "| requests | 6 |" in printed.out
    assert "2 runs: output tok/s median" in printed.out
    assert "prefix cache" in printed.err
    assert len(ipc_engine.seen) == 12
    for request in ipc_engine.seen:
        assert isinstance(request.prompt, TokenPrompt)
        assert max(unpack_ints(request.prompt.token_ids)) < VOCAB_SIZE
        params = request.params
        assert (params.temperature, params.ignore_eos, params.detokenize) == (0.5, True, False)
    saved = json.loads(file.read_text())
    assert (saved["target"]["model"], saved["target"]["block_size"]) == ("tiny", 16)
    assert [len(run["requests"]) for run in saved["runs"]] == [6, 6]
    for request, seen in zip(saved["runs"][0]["requests"], ipc_engine.seen):
        assert request["output_len"] == request["wanted_len"] == seen.params.max_tokens == len(request["token_times"])
        assert request["cached_len"] == 2


async def test_a_warm_up_run_is_not_counted(ipc_engine: CountingEngine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert await measure("--ipc", ipc_engine.address, *SMALL, "--warmup", "--json", str(file)) == 0
    assert len(ipc_engine.seen) == 12
    assert len(json.loads(file.read_text())["runs"]) == 1


async def test_tokens_lost_over_ipc_fail_the_run(
    ipc_engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ipc_engine.missing_tokens = 1
    file = tmp_path / "run.json"
    assert await measure("--ipc", ipc_engine.address, *SMALL, "--output-len", "4", "--json", str(file)) == 1
    printed = capsys.readouterr()
    assert "3 tokens came back, 4 were asked for" in printed.err
    assert "6 of 6 requests went wrong" in printed.err
    assert printed.out == ""
    assert not file.exists()


async def test_a_request_that_fails_over_ipc_fails_the_run(
    ipc_engine: CountingEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    ipc_engine.failure = "not a number"
    assert await measure("--ipc", ipc_engine.address, *SMALL) == 1
    assert "request 0: not a number" in capsys.readouterr().err


async def test_no_more_requests_are_under_way_than_allowed(ipc_engine: CountingEngine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert await measure("--ipc", ipc_engine.address, *SMALL, "--concurrency", "1", "--json", str(file)) == 0
    requests = json.loads(file.read_text())["runs"][0]["requests"]
    assert all(later["sent"] >= earlier["token_times"][-1] for earlier, later in itertools.pairwise(requests))


async def test_arrivals_have_the_rate_asked_for(ipc_engine: CountingEngine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    flags = ["--ipc", ipc_engine.address, *SMALL, "--num-requests", "200", "--request-rate", "400"]
    assert await measure(*flags, "--json", str(file)) == 0
    sent = [request["sent"] for request in json.loads(file.read_text())["runs"][0]["requests"]]
    assert sent == sorted(sent)
    # Half a second is expected: the seed fixes the draw, and a busy machine only makes it longer.
    assert 0.35 < sent[-1] - sent[0] < 2


async def test_an_online_workload_is_measured_and_saved(
    ipc_engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    size = ["--prompt-lens", "3,600", "--num-requests", "2", "--streams", "3", "--output-len", "5", "--no-warmup"]
    flags = ["--ipc", ipc_engine.address, "--workload", "idle", *size, "--json", str(file), "--runs", "2"]
    assert await measure(*flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("| time to first token, 3-token prompt | 2 |") == 2
    assert "A prompt of 600 tokens does not fit" in printed
    assert [request.params.max_tokens for request in ipc_engine.seen] == [2, 2, 5, 5, 5] * 2
    saved = json.loads(file.read_text())
    assert saved["workload"]["prompt_lens"] == [3, 600]
    assert [len(run["requests"]) for run in saved["runs"]] == [5, 5]


async def test_tokens_lost_in_an_online_workload_fail_it(
    ipc_engine: CountingEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    ipc_engine.missing_tokens = 1
    assert await measure("--ipc", ipc_engine.address, "--workload", "poisson", "--num-requests", "4") == 1
    assert "4 of 4 requests went wrong" in capsys.readouterr().err


# --- over HTTP ------------------------------------------------------------------------------------------------------


class HttpServer:
    """An OpenAI-compatible server, as far as a benchmark sees it.

    Attributes:
        token_ids: what it makes of `return_token_ids`: "returned", "ignored" or "refused".
        tokens_per_event: how many tokens it gathers for an event.
        newline: how its lines end.
        piece: its answers are written in pieces of so many bytes.
        ending: events before `[DONE]`, given the number of tokens sent.
    """

    def __init__(self) -> None:
        self.token_ids = "returned"
        self.tokens_per_event = 1
        self.newline = "\n"
        self.piece = 65536
        self.missing_tokens = 0
        self.closes_idle = False
        self.status = "200 OK"
        self.dies_after_bytes: int | None = None
        self.ending: Callable[[int], list[dict[str, Any]]] = lambda count: [
            {"choices": [], "usage": {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 1}}}
        ]
        self.requests: list[dict[str, Any]] = []
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(lengths[0])
        if head.startswith(b"get /v1/models"):
            self._whole(writer, "200 OK", {"data": [{"id": "some-model"}]})
            return True
        assert head.startswith(b"post /v1/completions")
        request = json.loads(body)
        if request.get("return_token_ids") and self.token_ids == "refused":
            self._whole(writer, "400 Bad Request", {"error": "unknown field return_token_ids"})
        elif not request.get("stream"):
            self._whole(writer, "200 OK", {"choices": [self._choice(1)], "usage": {"completion_tokens": 1}})
        elif self.status != "200 OK":
            self.requests.append(request)
            self._whole(writer, self.status, {"error": {"message": "the prompt is\ntoo long"}})
        else:
            self.requests.append(request)
            return await self._stream(writer, request)
        return True

    def _whole(self, writer: asyncio.StreamWriter, status: str, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(encoded)}\r\n\r\n".encode() + encoded)

    def _choice(self, count: int) -> dict[str, Any]:
        ids = {"token_ids": [7] * count} if self.token_ids == "returned" else {}
        return {"index": 0, "text": "a" * count, **ids}

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, Any]) -> bool:
        count = request["max_tokens"] - self.missing_tokens
        events: list[Any] = []
        for start in range(0, count, self.tokens_per_event):
            events.append({"choices": [self._choice(min(self.tokens_per_event, count - start))]})
        texts = [json.dumps(event) for event in events + self.ending(count)] + ["[DONE]"]
        answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        for text in texts:
            event = f": a comment{self.newline}data: {text}{self.newline * 2}".encode()
            answer += b"%x\r\n%b\r\n" % (len(event), event)
        answer += b"0\r\n\r\n"
        if self.dies_after_bytes is not None:
            answer = answer[: self.dies_after_bytes]
        for start in range(0, len(answer), self.piece):
            writer.write(answer[start : start + self.piece])
            await writer.drain()
            await asyncio.sleep(0)
        return not self.closes_idle and self.dies_after_bytes is None


@pytest.fixture
async def http_server() -> AsyncIterator[tuple[HttpServer, str]]:
    answers = HttpServer()
    server = await asyncio.start_server(answers.serve, "127.0.0.1", 0)
    yield answers, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


Served = tuple[HttpServer, str]


@pytest.mark.parametrize("token_ids", ["returned", "ignored", "refused"])
async def test_tokens_are_counted_whatever_a_server_makes_of_token_ids(
    http_server: Served, tmp_path: Path, token_ids: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = http_server
    server.token_ids = token_ids
    file = tmp_path / "run.json"
    assert await measure("--http", url, "--vocab-size", "40", *SMALL, "--json", str(file)) == 0
    saved = json.loads(file.read_text())
    assert saved["target"] == {"address": f"{url}/v1", "model": "some-model"}
    for request, sent in zip(saved["runs"][0]["requests"], server.requests):
        assert request["output_len"] == request["wanted_len"] == len(request["token_times"]) == sent["max_tokens"]
        assert request["cached_len"] == 1
        assert max(sent["prompt"]) < 40
        assert (sent["model"], sent["ignore_eos"], sent["stream"]) == ("some-model", True, True)
        assert ("return_token_ids" in sent) == (token_ids == "returned")
    assert "| output tok/s |" in capsys.readouterr().out


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("piece", [1, 7, 65536])
async def test_events_are_found_however_the_bytes_arrive(http_server: Served, newline: str, piece: int) -> None:
    server, url = http_server
    server.newline, server.piece = newline, piece
    assert await measure("--http", url, *SMALL, "--output-len", "3") == 0


async def test_several_tokens_in_an_event_all_count(http_server: Served, tmp_path: Path) -> None:
    server, url = http_server
    server.tokens_per_event = 4
    file = tmp_path / "run.json"
    assert await measure("--http", url, *SMALL, "--output-len", "10", "--json", str(file)) == 0
    requests = json.loads(file.read_text())["runs"][0]["requests"]
    assert [len(request["token_times"]) for request in requests] == [10] * 6


async def test_connections_are_used_again(http_server: Served) -> None:
    server, url = http_server
    assert await measure("--http", url, *SMALL, "--runs", "3", "--concurrency", "2") == 0
    # Two for the requests, one each for what is asked before the first of them.
    assert server.num_connections == 4


async def test_a_server_that_closes_idle_connections_is_no_failure(http_server: Served) -> None:
    server, url = http_server
    server.closes_idle = True
    assert await measure("--http", url, *SMALL, "--runs", "3", "--concurrency", "2") == 0
    assert len(server.requests) >= 18


def _no_usage(_: int) -> list[dict[str, Any]]:
    return []


def _error(_: int) -> list[dict[str, Any]]:
    return [{"error": {"message": "the engine core is gone"}}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"missing_tokens": 1}, "3 tokens came back, 4 were asked for"),
        ({"status": "400 Bad Request"}, "too long"),
        ({"status": "503 Service Unavailable"}, "status 503"),
        ({"ending": _no_usage}, "reported no usage"),
        ({"ending": _error}, "the engine core is gone"),
        ({"dies_after_bytes": 200}, "the server closed the connection"),
        ({"dies_after_bytes": 0}, "the server closed the connection"),
    ],
    ids=["missing", "400", "503", "no-usage", "error", "dies-in-the-answer", "dies-before-it"],
)
async def test_what_goes_wrong_over_http_fails_the_run(
    http_server: Served, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], message: str
) -> None:
    server, url = http_server
    for name, value in fault.items():
        setattr(server, name, value)
    assert await measure("--http", url, *SMALL, "--output-len", "4") == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "flags",
    [
        ["--runs", "0"],
        ["--num-requests", "-1"],
        ["--input-len", "0"],
        ["--output-len", "9-3"],
        ["--request-rate", "0"],
        ["--workload", "huge"],
        ["--shared-prefix", "-1"],
        ["--streams", "0"],
        ["--workload", "idle", "--prompt-lens", "16,0"],
        ["--workload", "nano", "--num-requests", "5"],
        ["--workload", "poisson", "--streams", "5"],
        ["--workload", "arrival", "--concurrency", "5"],
        ["--stream-output-len", "5"],
    ],
    ids=" ".join,
)
def test_flags_that_mean_nothing_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(flags)
    assert caught.value.code == 2
