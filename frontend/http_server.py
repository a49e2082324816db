"""Runs the HTTP application on a socket that is bound before anything else starts.

Binding first makes a port in use an error of the start, with the flag that changes it, and makes port 0 known.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from frontend.http_protocol import BoundedProtocol, max_connections
from protocol.errors import ConfigError

_BACKLOG = 2048
# Longer than the pools of HTTP clients keep a connection, so that it is the client that closes it.
_KEEP_ALIVE_S = 75
# What answers get to leave after the last request has ended.
_CLOSE_TIMEOUT_S = 2


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use or may not be used, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host {host} is not an address: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; choose another with --port"
        elif error.errno == errno.EADDRNOTAVAIL:
            message = f"{host} is not an address of this machine; choose another with --host"
        else:
            message = f"cannot serve HTTP on port {port} of {host}: {error.strerror}; choose another with --port"
        raise ConfigError(message) from error
    return listener


def http_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business, not the HTTP server's."""
        yield


class HttpServer:
    def __init__(self, app: Any, listener: socket.socket, receive_timeout_s: float) -> None:
        """A request must be there as a whole within `receive_timeout_s`."""

        class Protocol(BoundedProtocol):
            most_connections = max_connections()

        Protocol.receive_timeout_s = receive_timeout_s
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        )
        self._server = _Server(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))

    async def close(self) -> None:
        """Stops listening, lets the answers that are under way leave, and closes the connections."""
        self._server.should_exit = True
        await self._task
