"""The user's side of the engine: clients for Python programs, and (in its own process) the server behind them.

    from frontend import Client, AsyncClient, LLM, SamplingParams

Importing this package imports neither torch nor the server.
"""

from frontend.async_client import AsyncClient
from frontend.client import Client
from frontend.llm import LLM
from frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamChunk
from protocol.errors import (
    ConfigError,
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
    InvalidRequestError,
    RequestFailedError,
    RequestTimeoutError,
)
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "EngineOverloadedError",
    "EngineUnavailableError",
    "InvalidRequestError",
    "Logprob",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutputsParams",
]
