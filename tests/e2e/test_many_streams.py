"""A thousand streams at once: every one gets its own answer, whole, and the frontend stays small."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable

import httpx

from benchmarks.processes import EngineProcesses
from tests.e2e.conftest import RunningEngine

STREAMS, TOKENS = 1000, 24
SUBJECTS = ("fox", "baker", "king", "whale", "teacher", "robot", "farmer", "cat", "sailor", "giant")
OPENINGS = ("Once upon a time, a", "The story of the", "Yesterday the", "In a small town lived a", "Long ago, the")
PROMPTS = [f"{opening} {subject}" for opening in OPENINGS for subject in SUBJECTS]


def body(prompt: str, **fields: bool) -> dict:
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **fields}


async def stream(client: httpx.AsyncClient, prompt: str) -> tuple[str, str | None]:
    """The text of a streamed answer and how it ended."""
    text, reason = "", None
    async with client.stream("POST", "/v1/completions", json=body(prompt, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                reason = choice["finish_reason"]
    return text, reason


async def answers(url: str) -> tuple[list[str], list[tuple[str, str | None]]]:
    """What each prompt gives alone, and what every stream got."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits, trust_env=False) as client:
        alone = [
            (await client.post("/v1/completions", json=body(prompt))).json()["choices"][0]["text"] for prompt in PROMPTS
        ]
        return alone, await asyncio.gather(*(stream(client, PROMPTS[i % len(PROMPTS)]) for i in range(STREAMS)))


def test_a_thousand_streams_get_their_own_answers(start_engine: Callable[..., RunningEngine]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    engine = start_engine("--port", "0", "--max-num-seqs", str(STREAMS), "--max-model-len", "64")
    engine.wait_until_ready()
    expected, got = asyncio.run(answers(engine.url))
    assert len(set(expected)) > 0.8 * len(PROMPTS), "prompts that give the same answer would hide a mix-up"
    for index, (text, reason) in enumerate(got):
        assert text == expected[index % len(PROMPTS)]
        assert reason == "length"
    assert EngineProcesses(engine.address).look()["frontend.server"].memory < 500
