"""The Python client for asyncio: one IPC connection to a running engine, any number of requests on it.

`frontend.client.Client` is the same for ordinary code; it runs this one in a thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from frontend.client_batch import Batch
from frontend.client_request import (
    ClientRequest,
    Conversation,
    PromptInput,
    as_chat_prompt,
    as_conversations,
    as_prompt,
    as_prompts,
    check_options,
    params_for_each,
    wait_for_any,
)
from frontend.engine_connection import EngineConnection
from frontend.outputs import RequestOutput, StreamChunk
from protocol.address import default_address
from protocol.errors import InvalidRequestError
from protocol.messages import EngineInfo, Prompt, Stats
from protocol.sampling import SamplingParams


class AsyncClient:
    """A connection to a running engine. Use it in one event loop, from any number of tasks.

    Args:
        address: the engine's `ipc://` address; None takes this user's default.
        timeout: seconds to wait for an engine that is still starting.
    """

    def __init__(self, address: str | None = None, *, timeout: float = 60.0) -> None:
        self.address = address or default_address()
        self._connection = EngineConnection(self.address, timeout)

    async def connect(self) -> EngineInfo:
        """Connects and returns what the engine says of itself.

        Raises:
            EngineUnavailableError: no engine is there, it does not become ready in time, or it refuses this client.
        """
        self.engine = await self._connection.connect()
        return self.engine

    async def close(self) -> None:
        """Aborts what is running and closes the connection. May be called again."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, all at once, with a progress bar; results are in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one for each; the default is `SamplingParams()`.
            priority: lower goes first; equal ones in order of arrival.
            cache_salt: requests share cached prefixes only with requests of the same salt.
            timeout: seconds that each request gets from its arrival at the engine, time in the queue included.

        Raises:
            InvalidRequestError: a request cannot be served; the others are aborted.
            EngineUnavailableError: the engine went away.
            EngineOverloadedError: more waits already than the engine allows, all of it from other calls. What is too
                much because of this call is sent later.
            RequestTimeoutError: a request was not finished in time.
            RequestFailedError: the engine could not finish a request.
        """
        return await self._run(
            as_prompts(prompts),
            sampling_params,
            use_tqdm,
            {"priority": priority, "cache_salt": cache_salt, "timeout": timeout},
        )

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered with the model's chat template. Otherwise as `generate`."""
        conversations = as_conversations(messages)
        prompts: list[Prompt] = [as_chat_prompt(each, tools, chat_template_kwargs) for each in conversations]
        return await self._run(
            prompts, sampling_params, use_tqdm, {"priority": priority, "cache_salt": cache_salt, "timeout": timeout}
        )

    async def stream(
        self,
        prompt: PromptInput | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """Answers one prompt or conversation piece by piece. Leaving the iteration early aborts the request.

        Several answers (`n`) come side by side; a chunk says of which it is.
        `tools` and `chat_template_kwargs` go with a conversation, as in `chat`. Raises as `generate` does.
        """
        wire: Prompt
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            wire = as_chat_prompt(prompt, tools, chat_template_kwargs)  # type: ignore[arg-type]
        else:
            for name, value in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
                if value is not None:
                    raise InvalidRequestError(f"{name} can only go with a conversation, not with a prompt", name)
            wire = as_prompt(prompt)  # type: ignore[arg-type]
        options = {"priority": priority, "cache_salt": cache_salt, "timeout": timeout}
        running = self._connection.submit(wire, params_for_each(sampling_params, 1)[0], True, options)
        try:
            while running:
                if not any(request.is_over or request.taken < len(request.token_ids) for request in running):
                    await wait_for_any(running)
                for request in running.copy():
                    chunk = request.take_chunk()
                    if chunk.text or chunk.token_ids or chunk.finish_reason:
                        yield chunk
                    elif request.error is not None:
                        # Only when all that came before it has been handed out.
                        raise request.error
                    if chunk.finish_reason is not None:
                        running.remove(request)
        finally:
            self._connection.abort([request.request_id for request in running])

    async def run_request(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams,
        *,
        stream: bool = True,
        token_times: list[float] | None = None,
    ) -> RequestOutput:
        """One request whose tokens are noted, with their times, as they arrive, without waking the caller for each.

        `token_times` is where the times go, for a caller who looks at them while the request runs.
        """
        [request] = self._connection.submit(as_prompt(prompt), sampling_params.choice(0), stream, {})
        if token_times is not None:
            request.metrics.token_times = token_times
        return await self._finish(request)

    async def stats(self) -> Stats:
        """The engine's counters."""
        return await self._connection.stats()

    async def _finish(self, request: ClientRequest) -> RequestOutput:
        request.waits_for_end = True
        try:
            while not request.is_over:
                await request.wait()
            return request.output()
        finally:
            self._connection.abort([request.request_id])

    async def _run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        options: Mapping[str, Any],
    ) -> list[RequestOutput]:
        params = params_for_each(sampling_params, len(prompts))
        check_options(**options)
        jobs = [(i, choice) for i, each in enumerate(params) for choice in range(each.n)]

        def send(job: int) -> ClientRequest:
            prompt, choice = jobs[job]
            return self._connection.submit_choice(prompts[prompt], params[prompt], choice, False, options)

        self._connection.require_connected()
        batch = Batch(len(jobs), self.engine.max_waiting, send)
        num_tokens = 0
        start = time.perf_counter()
        try:
            batch.send_some()
            with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                for _ in jobs:
                    num_tokens += len((await batch.next_ended()).token_ids)
                    bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tok/s", refresh=False)
                    bar.update()
        finally:
            self._connection.abort(batch.running)
        answers: list[list[ClientRequest]] = [[] for _ in prompts]
        for (prompt, _), request in zip(jobs, batch.requests, strict=True):
            assert request is not None
            request.batch = None
            answers[prompt].append(request)
        return [first.output(others) for first, *others in answers]
