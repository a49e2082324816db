"""The page's files as they are sent: types, and headers that keep the page to this server."""

from __future__ import annotations

import httpx
import pytest

from tests.frontend.conftest import REPOSITORY, Frontend, error_of


@pytest.mark.parametrize(
    ("path", "file", "kind"),
    [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/static/style.css", "style.css", "text/css; charset=utf-8"),
        ("/static/main.js", "main.js", "text/javascript; charset=utf-8"),
        ("/static/icon.svg", "icon.svg", "image/svg+xml"),
    ],
)
def test_files_are_sent_whole_and_once(frontend: Frontend, path: str, file: str, kind: str) -> None:
    response = httpx.get(frontend.url + path)
    assert response.status_code == 200
    assert response.text == (REPOSITORY / "frontend" / "static" / file).read_text()
    assert response.headers["content-type"] == kind
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert "//" not in policy
    again = httpx.get(frontend.url + path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/static/none.js", "/static/", "/static/../page.py", "/static/%2e%2e%2fpage.py"])
def test_nothing_else_is_sent(frontend: Frontend, path: str) -> None:
    error_of(httpx.get(frontend.url + path), 404)


def test_the_page_asks_no_other_host() -> None:
    for file in (REPOSITORY / "frontend" / "static").iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, file
        assert "https://" not in text, file
