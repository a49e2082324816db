"""An error of CUDA ends the worker, which is replaced, and a request that causes it is found."""

import asyncio
from pathlib import Path

import pytest

from frontend import AsyncClient, SamplingParams
from protocol.errors import RequestFailedError
from tests.e2e.conftest import RunningEngine
from tests.support.faulty_worker import POISON

FLAGS = (
    *("--model", "benchmarks/models/qwen3-0.6b", "--load-format", "dummy", "--skip-tokenizer-init"),
    *("--no-http", "--device", "cuda", "--give-up-after", "2", "--max-num-seqs", "8"),
)
NUM_STREAMS, NUM_TOKENS = 3, 4000


def test_an_illegal_memory_access_costs_nobody_but_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "illegal_memory_access")
    tmp_path.chmod(0o700)
    launcher = ("-m", "tests.support.faulty_worker", "launch")
    engine = RunningEngine(tmp_path, *FLAGS, launcher=launcher).wait_until_ready()

    async def stream(client: AsyncClient, prompt: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [token async for chunk in client.stream(prompt, params) for token in chunk.token_ids]

    async def run() -> list[list[int]]:
        async with AsyncClient(engine.address) as client:
            others = [asyncio.create_task(stream(client, [3 + i] * 40)) for i in range(NUM_STREAMS)]
            await asyncio.sleep(0.2)
            with pytest.raises(RequestFailedError, match="alone: AcceleratorError: CUDA error: an illegal memory acc"):
                await stream(client, [1, POISON, POISON, 2])
            return await asyncio.gather(*others)

    try:
        answers = asyncio.run(run())
        assert [len(tokens) for tokens in answers] == [NUM_TOKENS] * NUM_STREAMS
        assert engine.output.count("starting it again") >= 2
        assert engine.stop() == 0
    finally:
        engine.stop_at_any_cost()
