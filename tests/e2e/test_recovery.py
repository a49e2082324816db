"""When the worker or the core dies, is stopped or hangs, requests go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from frontend import AsyncClient, SamplingParams
from protocol.errors import EngineUnavailableError, RequestFailedError
from tests.e2e.conftest import RunningEngine
from tests.support.faulty_worker import POISON
from tests.support.metrics import growth, read_metrics

Start = Callable[..., RunningEngine]
FAULTY = ("-m", "tests.support.faulty_worker", "launch")
MODULES = ["worker.main", "core.engine"]


def make_requests(number: int) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and seeded ones, long and short, that end at their limit."""
    return [
        (
            [3 + (7 * i + j) % 500 for j in range(5 + i % 40)],
            SamplingParams(temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=60 + i % 90, ignore_eos=True),
        )
        for i in range(number)
    ]


async def stream(client: AsyncClient, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token async for chunk in client.stream(prompt, params) for token in chunk.token_ids]


async def answers(address: str, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    async with AsyncClient(address) as client:
        return await asyncio.gather(*[stream(client, *request) for request in requests])


async def answers_meanwhile(
    engine: RunningEngine, requests: Sequence[tuple[list[int], SamplingParams]], *actions: Callable[[], None]
) -> list[list[int]]:
    """The answers, while the actions are done a quarter of a second apart."""
    task = asyncio.create_task(answers(engine.address, requests))
    for action in actions:
        await asyncio.sleep(0.25)
        assert not task.done(), "the answers were there before everything was done"
        action()
    return await task


@pytest.fixture(scope="module")
def recovering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """One engine for the tests of recovery, which counts no deaths against it."""
    directory = tmp_path_factory.mktemp("recovering")
    directory.chmod(0o700)
    flags = ("--port", "0", "--give-up-after", "1000", "--step-timeout", "2")
    engine = RunningEngine(directory, *flags).wait_until_ready()
    yield engine
    engine.stop_at_any_cost()


async def test_streams_go_on_when_a_process_is_killed(recovering: RunningEngine) -> None:
    requests = make_requests(32)
    expected = await answers(recovering.address, requests)
    assert [len(tokens) for tokens in expected] == [params.max_tokens for _, params in requests]

    def kill(module: str) -> Callable[[], None]:
        return lambda: recovering.child(module).kill()

    with httpx.Client(base_url=recovering.url) as http:
        before = read_metrics(http)
        for order in (MODULES[:1], MODULES[1:], MODULES):
            assert await answers_meanwhile(recovering, requests, *map(kill, order)) == expected
        assert http.get("/health").status_code == 200
        restarts = growth(before, read_metrics(http))
    assert {name: count for name, count in restarts.items() if name.startswith("mini_vllm:")} == {
        "mini_vllm:process_restarts_total{worker}": 2,
        "mini_vllm:process_restarts_total{core}": 2,
    }


@pytest.mark.parametrize("module", MODULES)
async def test_a_process_that_no_longer_answers_is_replaced(recovering: RunningEngine, module: str) -> None:
    requests = make_requests(16)
    expected = await answers(recovering.address, requests)
    stopped = recovering.child(module)
    assert await answers_meanwhile(recovering, requests, lambda: stopped.send_signal(signal.SIGSTOP)) == expected
    assert not stopped.is_running()
    assert "not answered for 2 s" in recovering.output


async def test_a_stopped_worker_is_replaced_though_the_core_dies_too(recovering: RunningEngine) -> None:
    requests = make_requests(8)
    expected = await answers(recovering.address, requests)
    stopped = recovering.child("worker.main")
    actions = (lambda: stopped.send_signal(signal.SIGSTOP), recovering.child("core.engine").kill)
    assert await answers_meanwhile(recovering, requests, *actions) == expected
    assert not stopped.is_running()
    assert "has not met the core within 2 s" in recovering.output


@pytest.mark.slow
async def test_a_worker_that_is_stopped_while_it_starts_is_replaced(recovering: RunningEngine) -> None:
    requests = make_requests(8)
    expected = await answers(recovering.address, requests)
    first = recovering.child("worker.main")

    def stop_the_next() -> None:
        while (worker := recovering.child("worker.main")).pid == first.pid:
            pass
        worker.send_signal(signal.SIGSTOP)

    assert await answers_meanwhile(recovering, requests, first.kill, stop_the_next) == expected
    assert "has not started within" in recovering.output


async def test_health_says_why_and_requests_wait_while_the_engine_recovers(recovering: RunningEngine) -> None:
    expected = await answers(recovering.address, make_requests(2))
    async with httpx.AsyncClient(base_url=recovering.url, timeout=60) as http:
        recovering.child("worker.main").kill()
        while (health := await http.get("/health")).status_code == 200:
            pass
        assert health.json() == {
            "status": "recovering",
            "reason": "the worker process ended unexpectedly (killed by SIGKILL)",
        }
        start = time.monotonic()
        assert await answers(recovering.address, make_requests(2)) == expected
        assert (await http.get("/health")).json() == {"status": "ready"}
        assert time.monotonic() - start < 10


async def test_what_only_the_core_knew_of_a_request_is_there_again(recovering: RunningEngine) -> None:
    """Grammar, penalties, log-probabilities and the prompt's go on after the core's death."""
    body = {
        "prompt": "Name: ",
        "max_tokens": 120,
        "temperature": 0.8,
        "seed": 3,
        "logprobs": 2,
        "frequency_penalty": 0.5,
        "structured_outputs": {"regex": "[a-z ]{100}[0-9]{3}"},
        "echo": True,
    }
    async with httpx.AsyncClient(base_url=recovering.url, timeout=60) as http:
        (expected,) = (await http.post("/v1/completions", json=body)).json()["choices"]
        for module in MODULES:
            task = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.12)
            recovering.child(module).kill()
            (choice,) = (await task).json()["choices"]
            assert choice["text"] == expected["text"]
            assert choice["finish_reason"] == expected["finish_reason"]
            got, wanted = choice["logprobs"], expected["logprobs"]
            assert got["tokens"] == wanted["tokens"]
            # A prompt's products round otherwise than a token's.
            assert got["token_logprobs"][1:] == pytest.approx(wanted["token_logprobs"][1:], abs=1e-4)


async def test_a_client_that_leaves_during_recovery_leaves_nothing_behind(recovering: RunningEngine) -> None:
    async with AsyncClient(recovering.address) as client:
        running: list[AsyncIterator] = [client.stream(*request) for request in make_requests(20)]
        for chunks in running:
            await anext(chunks)
        recovering.child("core.engine").kill()
    async with AsyncClient(recovering.address) as client:
        await client.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
        async with asyncio.timeout(20):
            while (stats := await client.stats()).num_running or stats.num_waiting:
                await asyncio.sleep(0.05)
        assert stats.num_free_blocks == stats.num_blocks


def test_streams_go_on_when_a_process_dies_while_the_engine_stops(start_engine: Start, tmp_path: Path) -> None:
    engine = start_engine("--port", "0", "--shutdown-timeout", "20").wait_until_ready()
    requests = make_requests(8)

    async def run() -> None:
        expected = await answers(engine.address, requests)

        def stop_and_kill() -> None:
            engine.process.terminate()
            engine.child("worker.main").kill()

        assert await answers_meanwhile(engine, requests, stop_and_kill) == expected

    asyncio.run(run())
    assert engine.wait() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", MODULES)
def test_an_engine_that_is_stopped_while_it_recovers_ends_in_order(
    start_engine: Start, module: str, tmp_path: Path
) -> None:
    engine = start_engine("--port", "0", "--shutdown-timeout", "1").wait_until_ready()
    engine.child(module).kill()
    engine.wait_for("starting it again")
    children = engine.children()
    start = time.monotonic()
    engine.process.terminate()
    assert engine.wait() == 0
    assert time.monotonic() - start < 8
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []


def test_an_engine_whose_worker_dies_again_and_again_gives_up(start_engine: Start, tmp_path: Path) -> None:
    engine = start_engine("--port", "0", "--give-up-after", "2").wait_until_ready()
    children = engine.children()

    async def run() -> str:
        async with AsyncClient(engine.address) as client:
            task = asyncio.create_task(stream(client, [1, 2, 3], SamplingParams(max_tokens=20_000, ignore_eos=True)))
            await asyncio.sleep(0.2)
            engine.child("worker.main").kill()
            await asyncio.to_thread(engine.wait_for, "recovered after")
            engine.child("worker.main").kill()
            with pytest.raises(EngineUnavailableError) as error:
                await task
            return str(error.value)

    message = asyncio.run(run())
    assert "the worker process has died 2 times within 60 s" in message
    assert "killed by SIGKILL" in message
    assert engine.wait() == 1
    assert message in engine.output
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []


def test_the_death_of_the_frontend_ends_the_engine_and_clients_hear_of_it(start_engine: Start, tmp_path: Path) -> None:
    engine = start_engine("--port", "0").wait_until_ready()
    children = engine.children()

    async def run() -> None:
        async with AsyncClient(engine.address) as client, httpx.AsyncClient(base_url=engine.url) as http:
            endless = SamplingParams(max_tokens=20_000, ignore_eos=True)
            task = asyncio.create_task(stream(client, [1, 2, 3], endless))
            body = {"prompt": [1, 2, 3], "max_tokens": 1500, "ignore_eos": True}
            post = asyncio.create_task(http.post("/v1/completions", json=body, timeout=60))
            await asyncio.sleep(0.5)
            engine.child("frontend.server").kill()
            with pytest.raises(EngineUnavailableError, match="engine"):
                await task
            with pytest.raises(httpx.RemoteProtocolError, match="disconnected"):
                await post

    asyncio.run(run())
    assert engine.wait() == 1
    assert "the frontend process ended unexpectedly (killed by SIGKILL)" in engine.output
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["error", "segfault", "hang"])
def test_the_request_that_crashes_the_worker_is_found_and_the_others_go_on(
    start_engine: Start, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    flags = ("--port", "0", "--give-up-after", "2", "--step-timeout", "1")
    engine = start_engine(*flags, launcher=FAULTY).wait_until_ready()
    requests = [(prompt, msgspec.structs.replace(params, max_tokens=300)) for prompt, params in make_requests(3)]
    poison = ([1, POISON, POISON, 2], SamplingParams(max_tokens=50, ignore_eos=True))

    async def run() -> tuple[list[list[int]], list[list[int]]]:
        expected = await answers(engine.address, requests)
        async with AsyncClient(engine.address) as client:
            others = [asyncio.create_task(stream(client, *request)) for request in requests]
            await asyncio.sleep(0.1)
            with pytest.raises(RequestFailedError, match="crashed while it computed this request alone"):
                await stream(client, *poison)
            return expected, await asyncio.gather(*others)

    expected, got = asyncio.run(run())
    assert got == expected
    # It took more crashes than the engine would have put up with, had they not been searching for the cause.
    assert engine.output.count("starting it again") >= 2
    assert engine.stop() == 0


def test_what_is_left_of_the_processes_that_died_is_nothing(recovering: RunningEngine) -> None:
    launcher = psutil.Process(recovering.process.pid)
    assert len(launcher.children()) == 3
    fds = launcher.num_fds()
    for module in MODULES:
        before = recovering.output.count("recovered after")
        recovering.child(module).kill()
        deadline = time.monotonic() + 20
        while recovering.output.count("recovered after") == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert launcher.num_fds() <= fds + 2
    assert len(launcher.children()) == 3
    assert os.path.exists(recovering.directory)
