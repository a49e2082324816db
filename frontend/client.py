"""The Python client for ordinary code: `AsyncClient` on an event loop in a thread of its own.

The thread keeps the connection alive while the program computes, and lets several threads share one client.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from frontend.async_client import AsyncClient
from frontend.client_request import Conversation, PromptInput
from frontend.outputs import RequestOutput, StreamChunk
from protocol.errors import EngineUnavailableError
from protocol.messages import EngineInfo, Stats
from protocol.sampling import SamplingParams

T = TypeVar("T")


class Client:
    """A connection to a running engine, safe to use from several threads.

    Args:
        address: the engine's `ipc://` address; None takes this user's default.
        timeout: seconds to wait for an engine that is still starting.

    Raises:
        EngineUnavailableError: no engine is there, or it does not become ready in time.
    """

    def __init__(self, address: str | None = None, *, timeout: float = 60.0) -> None:
        self._async = AsyncClient(address, timeout=timeout)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mini-vllm client", daemon=True)
        self._thread.start()
        self._closed = False
        # What was handed to the loop before `close` ends there; nothing is handed to it after. Reentrant, because the
        # collector may end a forgotten stream while the lock is held.
        self._lock = threading.RLock()
        # Called by `close`, when the client is forgotten, and when the interpreter exits: it would stop the thread
        # wherever that is, and a stream that is ended after that would wait for ever.
        self._finalizer = weakref.finalize(self, _shut_down, self._async, self._loop, self._thread)
        try:
            self.engine: EngineInfo = self._wait(self._async.connect())
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._async.address

    @property
    def is_own_thread(self) -> bool:
        """Whether this is called in the client's thread, which the collector may do, and which must not wait here."""
        return threading.current_thread() is self._thread

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._closed or not self._finalizer.alive:
                coroutine.close()
                raise EngineUnavailableError(f"the client was closed ({self.address})")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._run(coroutine)
        try:
            return future.result()
        except BaseException:
            # An interrupted call takes its requests with it.
            future.cancel()
            raise

    def close(self) -> None:
        """Aborts what is running and closes the connection. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """See `AsyncClient.generate`."""
        return self._wait(
            self._async.generate(
                prompts, sampling_params, use_tqdm, priority=priority, cache_salt=cache_salt, timeout=timeout
            )
        )

    def chat(
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
        """See `AsyncClient.chat`."""
        return self._wait(
            self._async.chat(
                messages,
                sampling_params,
                use_tqdm,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                priority=priority,
                cache_salt=cache_salt,
                timeout=timeout,
            )
        )

    def stream(
        self,
        prompt: PromptInput | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[StreamChunk]:
        """See `AsyncClient.stream`. Leaving the loop early aborts the request."""
        chunks = self._async.stream(
            prompt,
            sampling_params,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
        )
        try:
            while True:
                try:
                    yield self._wait(anext(chunks))  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return
        finally:
            with contextlib.suppress(EngineUnavailableError):
                ending = self._run(chunks.aclose())  # type: ignore[attr-defined]
                if not self.is_own_thread:
                    ending.result()

    def stats(self) -> Stats:
        """The engine's counters."""
        return self._wait(self._async.stats())


def _shut_down(client: AsyncClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Closes the connection and ends the thread. In that thread itself, where the collector may run, it cannot wait."""

    async def end() -> None:
        try:
            await client.close()
            # Whoever waited has been told; let it hear.
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
            await loop.shutdown_asyncgens()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:
        thread.join()
        loop.close()
