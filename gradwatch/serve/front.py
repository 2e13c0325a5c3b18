"""A request in, what stands before the metrics out: who may ask, then the live page.

token, origin  ->  refused, or the page's answer from a thread of its own, or None
"""

from __future__ import annotations

import asyncio
import gzip
import hmac
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from gradwatch.export.messages import Answer, Request, Response

if TYPE_CHECKING:
    from gradwatch.page.site import Pages

__all__ = ["Front", "pages_of"]

THREADS = 2
COOKIE = "gradwatch_token"
COOKIE_SECONDS = 30 * 86400
COMPRESSED_BYTES = 1024
HTML = "text/html; charset=utf-8"
READING = ("GET", "HEAD")


class Front:
    """Asked before /metrics is."""

    def __init__(
        self,
        pages: Pages | None,
        *,
        agent_page: Callable[[], str],
        token: str = "",
        compress: bool = False,
    ) -> None:
        """
        Args:
            pages: the live page; None where what it needs is not installed.
            agent_page: what /metrics holds, as HTML.
            token: asked of everybody; empty where nobody needs one.
            compress: for those who are not on this machine.
        """
        self._pages = pages
        self._agent_page = agent_page
        self._token = token
        self._compress = compress
        # A page may take seconds to read a long recording; a scrape does not wait for it.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gradwatch-page")
        self._lock = threading.Lock()
        self._in_work = 0

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a page."""
        return self._in_work > 0

    def answer(self, request: Request) -> Answer | None:
        """None where it is none of ours and the asker may have it."""
        refused = self._refused(request)
        if refused is not None:
            return refused
        if request.method not in READING:
            return None
        if request.path == "/agent":
            return Response(
                body=_agent(self._agent_page()), content_type="text/html; charset=utf-8"
            )
        if self._pages is None or not self._pages.knows(request.path):
            return None
        with self._lock:
            self._in_work += 1
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, self._page, self._pages, request)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _page(self, pages: Pages, request: Request) -> Response:
        try:
            response = pages.answer(request)
        finally:
            with self._lock:
                self._in_work -= 1
        accepts = "gzip" in request.headers.get("accept-encoding", "")
        if not (self._compress and accepts and len(response.body) >= COMPRESSED_BYTES):
            return response
        headers = {**response.headers, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        body = gzip.compress(response.body, compresslevel=3, mtime=0)
        return replace(response, body=body, headers=headers)

    def _refused(self, request: Request) -> Response | None:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return Response(status=403, body=b"Asked for by a page of another origin.\n")
        if not self._token or request.path == "/healthz":
            return None
        asked = parse_qs(request.query).get("token", [""])[0]
        if asked and self._is_token(asked) and request.method in READING:
            return self._remembered(request)
        if self._is_token(_bearer(request)) or self._is_token(_cookie(request)):
            return None
        return Response(status=401, body=TOKEN_WANTED, headers={"WWW-Authenticate": "Bearer"})

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token.encode())

    def _remembered(self, request: Request) -> Response:
        """A browser keeps the token in a cookie, and the address is without it."""
        rest = [(k, v) for k, v in parse_qsl(request.query) if k != "token"]
        where = request.path.rsplit("/", 1)[1] or "."
        cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Max-Age={COOKIE_SECONDS}"
        location = f"{where}?{urlencode(rest)}" if rest else where
        return Response(status=303, headers={"Location": location, "Set-Cookie": cookie})


TOKEN_WANTED = (
    b"A token is wanted: open /?token=... once in a browser, or send 'Authorization: Bearer ...'.\n"
)


def pages_of(directory: Path, on_error: Callable[[Exception], None]) -> Pages | None:
    """The live page, or None where what it needs is not installed."""
    try:
        from gradwatch.page.site import Pages
    except ImportError:
        return None
    return Pages(directory, on_error)


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _cookie(request: Request) -> str:
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _agent(table: str) -> bytes:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>gradwatch: metrics</title>'
        f'<body><h1>What is in <a href="metrics">metrics</a></h1>{table}'
        '<p><a href=".">All runs</a></p></body></html>\n'
    ).encode()
