"""Requests of a soak over HTTP, of many kinds, each with the end that it must have. Knows nothing of memory.

Prompts, tools and schemas differ from one request to the next, so that a cache that keeps what it has seen would show.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from frontend import RequestFailedError

_SOME_WORDS = "the a fox dog river house two seven blue runs counts under over and why how Größe naïve 日本 🙂"
_WORDS = _SOME_WORDS.split()
_ENDLESS = {"ignore_eos": True, "max_tokens": 200}
# Bodies that are refused, by the name of the field at fault.
_REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("temperature", "/v1/completions", {"prompt": "x", "temperature": -1}),
    ("nonsense", "/v1/completions", {"prompt": "x", "nonsense": 1}),
    ("prompt", "/v1/completions", {"prompt": []}),
    ("n", "/v1/completions", {"prompt": "x", "n": 0}),
    ("messages", "/v1/chat/completions", {"messages": "hello"}),
    ("top_logprobs", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}),
    ("stream_options", "/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}}),
]
# The kinds of requests, and how often a request is of each.
KINDS = {
    "completion": 4,
    "completion, streamed": 4,
    "logprobs, n": 3,
    "echoed logprobs": 1,
    "chat, streamed": 4,
    "tools": 2,
    "tools, streamed": 2,
    "json_schema": 2,
    "responses": 1,
    "tokenize": 1,
    "metrics": 1,
    "refused": 3,
    "left in the stream": 4,
    "cancelled": 2,
    "timeout": 2,
    "timeout of a stream": 1,
}


class HttpRequests:
    """Requests to a server, on connections that are kept until `close_connections`."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._chooser = random.Random(seed)
        self._http = self._new_client()
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "completion": self._completion,
            "completion, streamed": self._streamed_completion,
            "logprobs, n": self._logprobs,
            "echoed logprobs": self._echo,
            "chat, streamed": self._streamed_chat,
            "tools": self._tools,
            "tools, streamed": self._streamed_tools,
            "json_schema": self._json_schema,
            "responses": self._responses,
            "tokenize": self._tokenize,
            "metrics": self._metrics,
            "refused": self._refused,
            "left in the stream": self._left,
            "cancelled": self._cancelled,
            "timeout": self._timeout,
            "timeout of a stream": self._timeout_of_stream,
        }

    async def one(self) -> str:
        """Sends a request of some kind, which it returns the name of. Raises as `send` does."""
        (kind,) = self._chooser.choices(list(KINDS), weights=list(KINDS.values()))
        await self.send(kind)
        return f"HTTP: {kind}"

    async def send(self, kind: str) -> None:
        """Sends a request of one of `KINDS`.

        Raises:
            RequestFailedError: it does not end as one of its kind must.
            httpx.HTTPError: the server closed the connection, or said nothing for a long time.
        """
        try:
            await self._kinds[kind]()
        except (LookupError, ValueError) as error:
            raise RequestFailedError(f"an answer to {kind!r} of another form: {error!r}") from error

    async def close_connections(self) -> None:
        """Leaves the server without connections of this client, as long as nothing is sent."""
        await self._http.aclose()
        self._http = self._new_client()

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=120, trust_env=False, verify=False)

    # --- kinds that end with an answer -------------------------------------------------------------------------------

    async def _completion(self) -> None:
        body = {"prompt": self._text(), "best_of": self._chooser.choice((None, None, 3)), **self._sampling()}
        answer = await self._post("/v1/completions", body)
        _require(answer["usage"]["completion_tokens"] >= (body["best_of"] or 1), answer)

    async def _streamed_completion(self) -> None:
        body = {"prompt": self._text(), "stop": ["zzz", "\n\n\n"], **self._sampling()}
        events = await self._stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
        _require(events[-1]["usage"]["completion_tokens"] >= 1, events)

    async def _logprobs(self) -> None:
        n = self._chooser.randint(2, 4)
        body = {"prompt": [self._text(), self._text()], "n": n, "logprobs": 3, **self._sampling()}
        answer = await self._post("/v1/completions", body)
        _require(len(answer["choices"]) == 2 * n and all(each["logprobs"] for each in answer["choices"]), answer)

    async def _echo(self) -> None:
        text = self._text()
        answer = await self._post("/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0})
        _require(answer["choices"][0]["text"] == text, answer)

    async def _streamed_chat(self) -> None:
        events = await self._stream("/v1/chat/completions", {"messages": self._messages(), **self._sampling()})
        _require(any(choice["finish_reason"] for event in events for choice in event["choices"]), events)

    async def _tools(self) -> None:
        choice = (await self._post("/v1/chat/completions", self._with_tools()))["choices"][0]
        _require(choice["finish_reason"] == "length" or choice["message"]["tool_calls"], choice)

    async def _streamed_tools(self) -> None:
        events = await self._stream("/v1/chat/completions", self._with_tools())
        choices = [choice for event in events for choice in event["choices"]]
        has_calls = any("tool_calls" in choice["delta"] for choice in choices)
        _require(has_calls or choices[-1]["finish_reason"] == "length", events)

    async def _json_schema(self) -> None:
        schema = self._schema()
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        body = {"messages": self._messages(), "response_format": wanted, "max_tokens": 200}
        choice = (await self._post("/v1/chat/completions", body))["choices"][0]
        if choice["finish_reason"] == "stop":
            _require(set(json.loads(choice["message"]["content"])) == set(schema["required"]), choice)

    async def _responses(self) -> None:
        answer = await self._post("/v1/responses", {"input": self._text(), "max_output_tokens": 16})
        _require(answer["status"] in ("completed", "incomplete"), answer)

    async def _tokenize(self) -> None:
        text = self._text()
        tokens = (await self._post("/tokenize", {"prompt": text}))["tokens"]
        _require((await self._post("/detokenize", {"tokens": tokens}))["prompt"] == text, tokens)

    async def _metrics(self) -> None:
        response = await self._http.get("/metrics")
        _require(response.status_code == 200 and "vllm:num_requests_running" in response.text, response.text)

    # --- kinds that end otherwise ------------------------------------------------------------------------------------

    async def _refused(self) -> None:
        param, path, body = self._chooser.choice(_REFUSED)
        answer = await self._post(path, body, 400)
        _require(answer["error"]["param"] == param, answer)

    async def _left(self) -> None:
        """The client disconnects after some events."""
        leave_after = self._chooser.randrange(12)
        body = {"prompt": self._text(), "stream": True, "n": self._chooser.choice((1, 1, 3)), **_ENDLESS}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            _require(response.status_code == 200, response.status_code)
            lines = response.aiter_lines()
            received = 0
            async for line in lines:
                received += line.startswith("data:")
                if received > leave_after:
                    break

    async def _cancelled(self) -> None:
        """The client disconnects before there is an answer, which would be long in coming."""
        request = asyncio.create_task(self._post("/v1/completions", {"prompt": self._text(), **_ENDLESS}))
        await asyncio.wait([request], timeout=self._chooser.uniform(0, 0.1))
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request

    async def _timeout(self) -> None:
        answer = await self._post("/v1/completions", {"prompt": self._text(), "timeout": 0.01, **_ENDLESS}, 504)
        _require(answer["error"]["code"] == "timeout", answer)

    async def _timeout_of_stream(self) -> None:
        body = {"prompt": self._text(), "timeout": 0.05, "stream": True, **_ENDLESS}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            text = (await response.aread()).decode()
        # A deadline that passes before the first event still has its status; a later one has an event.
        _require(response.status_code in (200, 504) and '"timeout_error"' in text, text)

    # --- what is sent ------------------------------------------------------------------------------------------------

    async def _post(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        response = await self._http.post(path, json=body)
        _require(response.status_code == status, f"status {response.status_code}: {response.text}")
        return response.json()

    async def _stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """All events of a stream, which must end as one does."""
        async with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            text = (await response.aread()).decode()
        _require(response.status_code == 200, f"status {response.status_code}: {text}")
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        _require(events[-1] == "[DONE]", text)
        return [json.loads(event) for event in events[:-1]]

    def _text(self) -> str:
        return " ".join(self._chooser.choices(_WORDS, k=self._chooser.randint(3, 30)))

    def _messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._text()}]

    def _sampling(self) -> dict[str, Any]:
        choose = self._chooser
        options: dict[str, Any] = {"max_tokens": choose.randint(1, 32), "temperature": choose.choice((0.0, 0.7, 1.0))}
        if choose.random() < 0.3:
            options |= {
                "presence_penalty": 0.5,
                "logit_bias": {"5": -1.0},
                "min_p": 0.05,
                "seed": choose.getrandbits(31),
            }
        return options

    def _schema(self) -> dict[str, Any]:
        """One that no other request is likely to have."""
        names = [f"{self._chooser.choice('abcdef')}{self._chooser.randrange(10_000)}" for _ in range(2)]
        properties = {names[0]: {"type": "boolean"}, names[1]: {"enum": ["one", "two", "three"]}}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    def _with_tools(self) -> dict[str, Any]:
        function = {"name": f"look_up_{self._chooser.randrange(10_000)}", "parameters": self._schema()}
        tools = [{"type": "function", "function": function}]
        return {"messages": self._messages(), "tools": tools, "tool_choice": "required", "max_tokens": 300}


def _require(holds: Any, seen: Any) -> None:
    if not holds:
        raise RequestFailedError(f"an answer that should not be: {str(seen)[:1000]}")
