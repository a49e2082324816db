"""The page at `/`: its files, read once, and the headers that let it load nothing from anywhere else.

Knows nothing of what the page does; it talks to the same HTTP API as everybody.
"""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_DIRECTORY = Path(__file__).parent / "static"
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asks again each time, so that a new version of the engine has a new page; what is unchanged is not sent again.
    "cache-control": "no-cache",
}
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}


def page_routes() -> list[Route]:
    """`/` and the files that it is made of, at `/static/…`."""
    files = {path.name: _File(path) for path in _DIRECTORY.iterdir() if path.is_file()}

    async def page(request: Request) -> Response:
        return files["index.html"].response(request)

    async def file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found.response(request)

    return [Route("/", page, methods=["GET"]), Route("/static/{name}", file, methods=["GET"])]


class _File:
    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._type = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        self._headers = {**_HEADERS, "etag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'}

    def response(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers, media_type=self._type)
