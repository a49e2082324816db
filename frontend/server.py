"""The frontend process: HTTP and IPC in front, the engine core behind, text in between.

`python -m frontend.server <configuration file>`, started by the launcher. Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

from frontend.http_api import make_app
from frontend.http_server import HttpServer, bind_http, http_url
from frontend.ipc import IpcServer
from frontend.service import Service
from protocol.launcher_messages import FromLauncher
from protocol.process import ChildProcess, run_child
from protocol.transport import AsyncChannel


async def serve(child: ChildProcess) -> None:
    """Serves until SIGTERM, then ends in order: running requests get `--shutdown-timeout` to finish.

    Raises:
        ConfigError: an address cannot be bound or the tokenizer cannot be loaded.
        EngineError: the core refuses this frontend, or is gone before it was ready.
    """
    config = child.config
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    listener = bind_http(config.options.host, config.options.port) if config.options.http else None
    details: dict[str, str] = {"ipc": config.address}
    ipc = http = service = control = None
    try:
        service = Service(child.context, config)
        control = AsyncChannel(child.control.socket, FromLauncher, service.on_launcher)
        ipc = IpcServer(child.context, config.address, service)
        if listener is not None:
            details["http"] = http_url(listener)
            http = HttpServer(make_app(service), listener, config.options.receive_timeout)
        if await _start_or_stop(service, stop):
            ipc.engine_ready()
            child.ready(**details)
            await stop.wait()
            await service.drain(config.options.shutdown_timeout)
    finally:
        if http is not None:
            await http.close()
        if ipc is not None:
            ipc.close()
        if control is not None:
            control.close()
        if service is not None:
            service.close()
        if listener is not None:
            listener.close()


async def _start_or_stop(service: Service, stop: asyncio.Event) -> bool:
    """Whether the engine became ready before it was told to stop."""
    starting = asyncio.ensure_future(service.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    return False


def main(child: ChildProcess) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(child))
    else:
        uvloop.run(serve(child))


if __name__ == "__main__":
    run_child("frontend", main)
