"""Requests over IPC, through the project's own asyncio client."""

from __future__ import annotations

import time

from benchmarks.runner import RequestResult
from benchmarks.workloads import BenchmarkRequest
from frontend import AsyncClient, EngineError, SamplingParams


class IpcTransport:
    """One connection for all requests, as a program that uses the client would have."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def describe(self) -> dict[str, str | int]:
        engine = self._client.engine
        return {
            "address": self._client.address,
            "model": engine.model,
            "max_model_len": engine.max_model_len,
            "block_size": engine.block_size,
            "num_blocks": engine.num_blocks,
        }

    async def vocab_size(self) -> int | None:
        return self._client.engine.vocab_size

    async def max_model_len(self) -> int | None:
        return self._client.engine.max_model_len

    async def send(self, request: BenchmarkRequest, temperature: float, result: RequestResult) -> None:
        params = SamplingParams(
            temperature=temperature, max_tokens=request.output_len, ignore_eos=True, detokenize=False
        )
        result.sent = time.perf_counter()
        try:
            output = await self._client.run_request(request.prompt_token_ids, params, token_times=result.token_times)
        except EngineError as error:
            result.error = str(error)
            return
        result.output_len = len(output.outputs[0].token_ids)
        result.cached_len = output.num_cached_tokens

    async def close(self) -> None:
        await self._client.close()
