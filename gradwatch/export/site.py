"""A request in, a response out: /metrics, /healthz, and a page that leads to both.

No sockets here. Nothing leaves `answer` but a response: what breaks while rendering is a 500 with
one line, and is counted.
"""

from __future__ import annotations

import gzip
import html
import ipaddress
import json
from collections.abc import Callable, Mapping

from gradwatch.export.messages import Answer, Request, Response

__all__ = ["Site"]

GZIP_LEAST_BYTES = 1024
HTML = "text/html; charset=utf-8"
JSON = "application/json"


class Site:
    """What an endpoint answers."""

    def __init__(
        self,
        render: Callable[[str], tuple[str, bytes]],
        health: Callable[[], Mapping[str, object]],
        *,
        title: str,
        page: Callable[[], str] = str,
        beside: Callable[[Request], Answer | None] = lambda request: None,
        on_loopback: bool,
        on_error: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            render: the Accept header to content type and body.
            health: what is told beside `status: ok`.
            title: of the page.
            page: HTML that the page shows beside its links.
            beside: asked first; None leaves it to the pages here.
            on_loopback: whether only this machine can ask. Then a foreign Host is refused, and
                nothing is compressed, since it would cost the trainer more than it saves.
            on_error: told of an exception of `render` or `health`.
        """
        self._pages = {
            "/": lambda _: Response(body=_page(title, page()), content_type=HTML),
            "/metrics": self._metrics,
            "/healthz": self._healthz,
        }
        self._beside = beside
        self._render = render
        self._health = health
        self._on_loopback = on_loopback
        self._on_error = on_error

    def answer(self, request: Request) -> Answer:
        if self._on_loopback and not _is_local(request.headers.get("host", "")):
            return Response(status=421, body=FOREIGN_HOST)
        page = self._pages.get(request.path)
        try:
            beside = self._beside(request)
            if beside is not None:
                return beside
            if page is None:
                return Response(status=404, body=b"There is /metrics and /healthz.\n")
            if request.method not in READING:
                return Response(status=405, body=b"Only GET and HEAD.\n", headers=ALLOW)
            return page(request)
        except Exception as error:
            self._on_error(error)
            line = " ".join(f"gradwatch failed to answer: {type(error).__name__}: {error}".split())
            return Response(status=500, body=line.encode("utf-8", "replace") + b"\n")

    def _metrics(self, request: Request) -> Response:
        content_type, body = self._render(request.headers.get("accept", ""))
        headers = {"Vary": "Accept, Accept-Encoding"}
        if self._compresses(request, body):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, compresslevel=1, mtime=0)
        return Response(body=body, content_type=content_type, headers=headers)

    def _compresses(self, request: Request, body: bytes) -> bool:
        asked = "gzip" in _accepted(request.headers.get("accept-encoding", ""))
        return asked and not self._on_loopback and len(body) >= GZIP_LEAST_BYTES

    def _healthz(self, _: Request) -> Response:
        text = json.dumps({"status": "ok", **self._health()})
        return Response(body=text.encode() + b"\n", content_type=JSON)


READING = ("GET", "HEAD")
ALLOW = {"Allow": "GET, HEAD"}

FOREIGN_HOST = (
    b"This endpoint listens on loopback and answers requests to localhost or to an address only.\n"
    b"Attach with host='0.0.0.0' to serve it under a name.\n"
)
"""A web page may point a name of its own at 127.0.0.1 and have the browser read from here; it
cannot do so with an address, and what scrapes on this machine has no need of other names."""


def _is_local(host: str) -> bool:
    """Whether a Host header is empty, an address or localhost."""
    name = host.rpartition("]")[0].removeprefix("[") or host.partition(":")[0]
    if name.lower() in ("", "localhost") or name.lower().endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _accepted(header: str) -> set[str]:
    """Encodings that a client takes; `q=0` means that it does not."""
    entries = (entry.strip().partition(";") for entry in header.lower().split(","))
    refused = {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return {name.strip() for name, _, weight in entries if weight.strip() not in refused}


def _page(title: str, shown: str) -> bytes:
    safe = html.escape(title.encode("utf-8", "backslashreplace").decode())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{safe}</title>'
        f'<body><h1>gradwatch: {safe}</h1><p><a href="/metrics">metrics</a></p>'
        f'<p><a href="/healthz">health</a></p>{shown}</body></html>\n'
    ).encode()
