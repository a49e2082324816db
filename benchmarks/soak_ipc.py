"""Requests of a soak over IPC: short ones of random ids, run, streamed, left and cancelled. Knows nothing of memory."""

from __future__ import annotations

import asyncio
import random

from benchmarks.workloads import LengthRange, random_ids
from frontend import AsyncClient, SamplingParams

_INPUT_LEN, _OUTPUT_LEN = LengthRange(4, 32), LengthRange(1, 16)
# What a client does with a request, and how often.
_KINDS = {"run": 5, "stream": 3, "leave": 1, "cancel": 1}


class IpcRequests:
    """Requests through the Python client."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self._client = client
        self._chooser = random.Random(seed)

    async def one(self) -> str:
        """Sends a request of some kind, which it returns the name of. Raises EngineError if the engine fails it."""
        choose = self._chooser
        engine = self._client.engine
        (kind,) = choose.choices(list(_KINDS), weights=list(_KINDS.values()))
        prompt = random_ids(choose, _INPUT_LEN.draw(choose), engine.vocab_size)
        max_tokens = _OUTPUT_LEN.draw(choose)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=choose.choice((0.0, 0.7, 1.0)),
            top_p=choose.choice((1.0, 0.9)),
            top_k=choose.choice((-1, 20)),
            seed=choose.choice((None, choose.getrandbits(31))),
            ignore_eos=choose.random() < 0.5,
            detokenize=engine.has_tokenizer and choose.random() < 0.5,
        )
        if kind == "run":
            await self._client.run_request(prompt, params, stream=choose.random() < 0.5)
        elif kind == "cancel":
            request = asyncio.create_task(self._client.run_request(prompt, params))
            await asyncio.wait([request], timeout=choose.uniform(0, 0.05))
            request.cancel()
            await asyncio.wait([request])
            if not request.cancelled() and (error := request.exception()) is not None:
                raise error
        else:
            # One that is left is aborted, unless it ended first.
            leave_after = choose.randrange(max_tokens) if kind == "leave" else max_tokens
            received = 0
            stream = self._client.stream(prompt, params)
            async for chunk in stream:
                received += len(chunk.token_ids)
                if received > leave_after:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
        return f"IPC: {kind}"
