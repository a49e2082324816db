"""Whose request it is, as a number: equal for one client, and meaning nothing else.

Numbers differ from one start of the frontend to the next, as Python's hashes do, so that nobody learns a key from one.
"""

from __future__ import annotations

from starlette.types import Scope


def ipc_client(identity: bytes) -> int:
    """Of a connection of the Python client."""
    return _number("ipc", identity)


def http_client(scope: Scope, *, has_keys: bool) -> int:
    """Of an API key, where the engine asks for one, and else of the address that the connection comes from."""
    if has_keys:
        header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return _number("key", header.partition(b" ")[2].strip())
    address = scope.get("client")
    return _number("address", address[0] if address else "")


def _number(kind: str, who: str | bytes) -> int:
    return hash((kind, who)) & (2**63 - 1)
