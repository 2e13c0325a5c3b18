"""Where a run is scraped: a port near the one that was asked for, served until it is closed.

Never raises into training: what fails is counted, warned of once, and leaves a run without an
endpoint.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping

from gradwatch.export.addresses import is_loopback, listen_near, reachable
from gradwatch.export.messages import Answer, Request, Response
from gradwatch.export.scrapes import Scrapes
from gradwatch.export.server import Server
from gradwatch.export.site import Site

__all__ = ["Endpoint"]

logger = logging.getLogger("gradwatch")


class Endpoint:
    """/metrics, /healthz and a page that leads to both; or nothing, where no port could be had."""

    def __init__(
        self,
        render: Callable[[str], tuple[str, bytes]],
        *,
        host: str = "127.0.0.1",
        port: int = 9464,
        offset: int = 0,
        siblings: int = 1,
        health: Callable[[], Mapping[str, object]] = dict,
        title: str = "gradwatch",
        page: Callable[[], str] = str,
        beside: Callable[[Request], Answer | None] = lambda request: None,
        listener: socket.socket | None = None,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """
        Args:
            render: the Accept header to content type and body of /metrics.
            host: the address that is listened on; `0.0.0.0` or `::` for all of them.
            port: the first of 16; 0 for any free one.
            offset: which of them is tried first, from 0.
            siblings: processes of this machine that have a port each, from `port` on.
            health: what /healthz tells beside `status: ok`.
            title: of the page.
            page: HTML that the page shows beside its links.
            beside: asked first of each request; None leaves it to the pages here.
            listener: what is listened on instead of `host` and `port`; it belongs to the endpoint
                from now on.
            on_error: told of each exception that an answer raised.
        """
        self.port: int | None = None
        """Where it listens, or None."""

        self.authority: str | None = None
        """`host:port` as others reach it, or None."""

        self.on_loopback = False
        """Whether this machine alone reaches it."""

        self._on_error = on_error
        self._error_logged = False
        self._pid = os.getpid()
        self._scrapes = Scrapes()
        self._server: Server | None = None
        listener = listen_near(host, port, offset, siblings) if listener is None else listener
        if listener is None:
            return
        address, self.port = listener.getsockname()[:2]
        self.authority = reachable(address, self.port)
        self.on_loopback = is_loopback(address)
        site = Site(
            render,
            health,
            title=title,
            page=page,
            beside=beside,
            on_loopback=self.on_loopback,
            on_error=self._failed,
        )
        self._server = Server(listener, site.answer, on_served=self._served, on_error=self._failed)

    @property
    def url(self) -> str | None:
        """Of the metrics, or None."""
        return None if self.authority is None else f"http://{self.authority}/metrics"

    def scraped_since(self, moment: float) -> bool:
        """Whether a scrape that began after this moment (monotonic) was answered to its end."""
        return self._scrapes.came_since(moment)

    def close(self, linger_seconds: float = 0.0, *, even_for_the_first: bool = False) -> None:
        """Ends it; a second call, and one in a forked child, does nothing.

        Args:
            linger_seconds: how long to wait, at most, for one more scrape. Where nobody scraped
                there is no waiting, and 2.5 scrape intervals are enough. Ctrl-C ends the wait.
            even_for_the_first: wait where nobody scraped, too.
        """
        server, self._server = self._server, None
        if server is None or os.getpid() != self._pid:
            return
        try:
            self._scrapes.wait_for_one_more(linger_seconds, even_for_the_first=even_for_the_first)
        finally:
            server.stop()

    def _served(self, request: Request, response: Response, came: float) -> None:
        if (request.method, request.path, response.status) == ("GET", "/metrics", 200):
            self._scrapes.note(came)

    def _failed(self, error: Exception) -> None:
        self._on_error(error)
        if not self._error_logged:
            self._error_logged = True
            logger.warning(
                "gradwatch failed to answer a request; training goes on, and further failures are "
                "counted in gradwatch_hook_errors_total only",
                exc_info=error,
            )
