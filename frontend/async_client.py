"""The Python client for asyncio: one IPC connection to a running engine, any number of requests on it.

`frontend.client.Client` is the same for ordinary code; it runs this one in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import zmq
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
from frontend.outputs import RequestOutput, StreamChunk
from protocol.address import default_address, is_engine_running
from protocol.errors import EngineUnavailableError, InvalidRequestError
from protocol.logprobs import unpack_logprobs
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    EngineInfo,
    Failed,
    FrontendMessage,
    Generate,
    GetStats,
    Heartbeat,
    Hello,
    Outputs,
    Prompt,
    Received,
    Refused,
    Started,
    Stats,
    TokenPrompt,
    Welcome,
    unpack_ints,
)
from protocol.sampling import SamplingParams
from protocol.transport import MAX_MESSAGE_BYTES, AsyncChannel, DisconnectWatch, encode, open_socket

HEARTBEAT_S = 5.0
# How many bytes a client takes before it says so: a quarter of the least that --max-stream-buffer can be.
RECEIVED_EVERY_BYTES = 16 * 1024
# How often a client looks whether the engine is still there.
LOOK_S = 0.5


class AsyncClient:
    """A connection to a running engine. Use it in one event loop, from any number of tasks.

    Args:
        address: the engine's `ipc://` address; None takes this user's default.
        timeout: seconds to wait for an engine that is still starting.
    """

    def __init__(self, address: str | None = None, *, timeout: float = 60.0) -> None:
        self.address = address or default_address()
        self._timeout = timeout
        self._requests: dict[int, ClientRequest] = {}
        self._request_ids = itertools.count()
        self._queries: dict[int, asyncio.Future[Stats]] = {}
        self._channel: AsyncChannel | None = None
        self._gone: str | None = None
        self._num_bytes_confirmed = 0

    # --- connection -----------------------------------------------------------------------------------------------

    async def connect(self) -> EngineInfo:
        """Connects and returns what the engine says of itself.

        Raises:
            EngineUnavailableError: no engine is there, it does not become ready in time, or it refuses this client.
        """
        if not is_engine_running(self.address):
            raise EngineUnavailableError(
                f"no engine is running at {self.address}; start one with `python launch.py`, or pass its address"
            )
        self._welcome: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        socket = open_socket(zmq.Context.instance(), zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._watch = DisconnectWatch(socket, lambda: self._lose("the engine has closed the connection"))
        self._channel = AsyncChannel(socket, FrontendMessage, self._on_message)
        socket.connect(self.address)
        self._channel.send(Hello(PROTOCOL_VERSION, HEARTBEAT_S))
        self._heart = asyncio.get_running_loop().create_task(self._beat())
        try:
            self.engine = await asyncio.wait_for(asyncio.shield(self._welcome), self._timeout)
        except TimeoutError:
            await self.close()
            raise EngineUnavailableError(
                f"the engine at {self.address} was not ready within {self._timeout:g} s"
            ) from None
        except BaseException:
            await self.close()
            raise
        return self.engine

    async def close(self) -> None:
        """Aborts what is running and closes the connection. May be called again."""
        if self._channel is None:
            return
        if self._gone is None and self._requests:
            # They stay in the table: whoever waits for one is told below.
            self._channel.send(Abort(list(self._requests)))
        self._heart.cancel()
        self._watch.close()
        self._channel.close()
        self._channel = None
        self._lose("the client was closed")

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _beat(self) -> None:
        """Tells the engine that this client lives, and notices when the engine does not."""
        last_beat = time.monotonic()
        while self._gone is None:
            await asyncio.sleep(LOOK_S)
            if not is_engine_running(self.address):
                self._lose("the engine is gone")
            elif self._channel is not None and time.monotonic() - last_beat > HEARTBEAT_S / 2:
                last_beat = time.monotonic()
                self._channel.send(Heartbeat())

    def _lose(self, reason: str) -> None:
        """Ends everything that waits: nothing more will come."""
        if self._gone is not None:
            return
        self._gone = reason
        if not self._welcome.done():
            self._welcome.set_exception(EngineUnavailableError(f"{reason} ({self.address})"))
            # Nobody looks at it when the client was closed first.
            self._welcome.exception()
        for request in self._requests.values():
            request.error = EngineUnavailableError(f"{reason} before the request was finished ({self.address})")
            request.wake()
        self._requests.clear()
        for query in self._queries.values():
            if not query.done():
                query.set_exception(EngineUnavailableError(f"{reason} ({self.address})"))
        self._queries.clear()

    def _connected(self) -> AsyncChannel:
        if self._channel is None or self._gone is not None:
            raise EngineUnavailableError(f"{self._gone or 'the client is not connected'} ({self.address})")
        return self._channel

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_message(self, _: bytes, message: Any) -> None:
        channel = self._channel
        if channel is not None and channel.num_bytes_received - self._num_bytes_confirmed > RECEIVED_EVERY_BYTES:
            self._num_bytes_confirmed = channel.num_bytes_received
            channel.send(Received(channel.num_bytes_received))
        if isinstance(message, Outputs):
            self._on_outputs(message)
        elif isinstance(message, Started):
            request = self._requests.get(message.request_id)
            if request is not None:
                request.prompt_token_ids = unpack_ints(message.prompt_token_ids).tolist()
        elif isinstance(message, Failed):
            request = self._requests.pop(message.request_id, None)
            query = self._queries.pop(message.request_id, None)
            if request is not None:
                request.fail(message)
            elif query is not None and not query.done():
                query.set_exception(EngineUnavailableError(f"{message.message} ({self.address})"))
        elif isinstance(message, Stats):
            query = self._queries.pop(message.query_id, None)
            if query is not None and not query.done():
                query.set_result(message)
        elif isinstance(message, Welcome):
            if message.protocol_version != PROTOCOL_VERSION:
                self._lose(f"the engine speaks protocol version {message.protocol_version}, not {PROTOCOL_VERSION}")
            elif not self._welcome.done():
                self._welcome.set_result(message.engine)
        elif isinstance(message, Refused):
            self._lose(message.reason)
        else:
            self._lose(f"the engine sent a message that cannot be understood: {message}")

    def _on_outputs(self, outputs: Outputs) -> None:
        """A step's tokens of all requests of this client, in one message."""
        now = time.perf_counter()
        requests = self._requests
        touched: dict[int, ClientRequest] = {}
        ids, tokens = unpack_ints(outputs.request_ids, "<i8").tolist(), unpack_ints(outputs.token_ids).tolist()
        for request_id, token in zip(ids, tokens, strict=True):
            request = requests.get(request_id)
            if request is not None:
                request.token_ids.append(token)
                request.metrics.token_times.append(now)
                if request.waiter is not None and not request.waits_for_end:
                    touched[request_id] = request
        for table in outputs.logprobs:
            for row, measured in unpack_logprobs(table):
                request = requests.get(ids[row])
                if request is not None:
                    request.logprobs.append(measured)
        for stretch in outputs.prompt_logprobs:
            request = requests.get(stretch.request_id)
            if request is not None:
                request.prompt_logprobs.append(stretch.tokens)
        for request_id, text in outputs.texts:
            request = requests.get(request_id)
            if request is not None:
                request.text_parts.append(text)
        for finished in outputs.finished:
            request = requests.pop(finished.request_id, None)
            if request is not None:
                request.finished = finished
                request.metrics.finished_time = now
                touched[request.request_id] = request
        for request in touched.values():
            if request.metrics.first_token_time is None and request.metrics.token_times:
                request.metrics.first_token_time = request.metrics.token_times[0]
            request.wake()

    def _submit(
        self, prompt: Prompt, params: SamplingParams, stream: bool, options: Mapping[str, Any]
    ) -> list[ClientRequest]:
        """Sends a request for each answer that is wanted."""
        check_options(**options)
        requests: list[ClientRequest] = []
        try:
            for index in range(params.n):
                requests.append(self._submit_choice(prompt, params, index, stream, options))
        except BaseException:
            self._abort([request.request_id for request in requests])
            raise
        return requests

    def _submit_choice(
        self, prompt: Prompt, params: SamplingParams, index: int, stream: bool, options: Mapping[str, Any]
    ) -> ClientRequest:
        params = params.choice(index)
        ids = unpack_ints(prompt.token_ids).tolist() if isinstance(prompt, TokenPrompt) else []
        request = ClientRequest(next(self._request_ids), prompt, params, ids, time.perf_counter(), index)
        generate = Generate(request.request_id, prompt, params, stream, **options)
        try:
            frame = encode(generate)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            # Half of a surrogate pair in a text, or an object in a message that is no JSON.
            raise InvalidRequestError(f"the request cannot be encoded: {error}") from error
        if len(frame) > MAX_MESSAGE_BYTES:
            # The engine would cut off this client, with everything else that it has running.
            raise InvalidRequestError(f"the request takes {len(frame)} bytes, of which {MAX_MESSAGE_BYTES} are allowed")
        if not self._connected().send_frame(frame):
            raise EngineUnavailableError(f"the engine does not take requests at the moment ({self.address})")
        self._requests[request.request_id] = request
        return request

    def _abort(self, request_ids: list[int]) -> None:
        running = [request_id for request_id in request_ids if self._requests.pop(request_id, None) is not None]
        if running and self._channel is not None and self._gone is None:
            self._channel.send(Abort(running))

    # --- requests ---------------------------------------------------------------------------------------------------

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
        running = self._submit(wire, params_for_each(sampling_params, 1)[0], True, options)
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
            self._abort([request.request_id for request in running])

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
        [request] = self._submit(as_prompt(prompt), sampling_params.choice(0), stream, {})
        if token_times is not None:
            request.metrics.token_times = token_times
        return await self._finish(request)

    async def stats(self) -> Stats:
        """The engine's counters."""
        query_id = next(self._request_ids)
        query: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        channel = self._connected()
        if not channel.send(GetStats(query_id)):
            raise EngineUnavailableError(f"the engine does not take queries at the moment ({self.address})")
        self._queries[query_id] = query
        return await query

    async def _finish(self, request: ClientRequest) -> RequestOutput:
        request.waits_for_end = True
        try:
            while not request.is_over:
                await request.wait()
            return request.output()
        finally:
            self._abort([request.request_id])

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
            return self._submit_choice(prompts[prompt], params[prompt], choice, False, options)

        self._connected()
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
            self._abort(batch.running)
        answers: list[list[ClientRequest]] = [[] for _ in prompts]
        for (prompt, _), request in zip(jobs, batch.requests, strict=True):
            assert request is not None
            request.batch = None
            answers[prompt].append(request)
        return [first.output(others) for first, *others in answers]
