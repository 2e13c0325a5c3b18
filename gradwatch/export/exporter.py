"""One run's metrics, served: tally -> renderer -> endpoint, and a file that says where."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client.exposition import choose_encoder

from gradwatch.export.addresses import local_rank, local_size
from gradwatch.export.discovery import Discovery, scheduler_labels
from gradwatch.export.endpoint import Endpoint
from gradwatch.export.renderer import OPENMETRICS, TEXT, Renderer
from gradwatch.export.series import MOST_LAYERS
from gradwatch.records import Anomaly
from gradwatch.tally import Tally

__all__ = ["Exporter", "content_type"]

logger = logging.getLogger("gradwatch")

PAUSE_SECONDS = 0.0005
"""Between chunks of a large answer, so that the trainer gets on with its step meanwhile."""


class Exporter:
    """Serves the tally from creation until `close`."""

    def __init__(
        self,
        tally: Tally,
        *,
        host: str = "127.0.0.1",
        port: int = 9464,
        directory: Path | None = None,
        max_layers: int = MOST_LAYERS,
    ) -> None:
        """A port or a directory that cannot be had is warned of, and done without.

        Args:
            host: the address that is listened on; `0.0.0.0` or `::` for all of them.
            port: of the first process of this machine, and the first of 16; the next process has
                the next one. 0 for any free one.
            directory: of target files that Prometheus reads (file_sd).
            max_layers: how many layers have series of their own.
        """
        self._tally = tally
        self._news = float("-inf")
        self._renderer = Renderer(
            tally.info, max_layers=max_layers, pause=lambda: time.sleep(PAUSE_SECONDS)
        )
        self._endpoint = Endpoint(
            self._render,
            host=host,
            port=port,
            offset=local_rank(os.environ),
            siblings=local_size(os.environ),
            health=self._health,
            title=tally.info.run,
            on_error=lambda error: tally.hook_error("export"),
        )
        self._discovery = None if directory is None else self._announced(directory)

    @property
    def port(self) -> int | None:
        """Where the metrics are served, or None where no port could be had."""
        return self._endpoint.port

    @property
    def url(self) -> str | None:
        return self._endpoint.url

    def note(self, anomaly: Anomaly) -> None:
        """There is news in the metrics, which a scrape from now on will show."""
        self._news = time.monotonic()

    def close(
        self, *, linger_seconds: float = 0.0, only_for_news: bool = False, insists: bool = False
    ) -> None:
        """Stops serving, after one last scrape where there is a scraper to wait for.

        Does nothing in a forked child, or a second time.

        Args:
            only_for_news: do not wait where every anomaly was scraped.
            insists: where one was not, wait for a scraper that has never come, too.
        """
        is_news = self._news > float("-inf") and not self._endpoint.scraped_since(self._news)
        if only_for_news and not is_news:
            linger_seconds = 0.0
        try:
            self._endpoint.close(linger_seconds, even_for_the_first=insists and is_news)
        finally:
            if self._discovery is not None:
                self._discovery.close()

    def _announced(self, directory: Path) -> Discovery | None:
        authority = self._endpoint.authority
        if authority is None:
            return None
        labels = scheduler_labels(os.environ)
        if labels and self._endpoint.on_loopback:
            logger.warning(
                "Prometheus on another machine cannot reach %s: serve the metrics on an address of "
                "the cluster's network, with host= or GRADWATCH_HOST", authority,
            )  # fmt: skip
        try:
            return Discovery(directory, self._tally.info, authority, labels)
        except OSError as error:
            self._tally.hook_error("export")
            logger.warning("Prometheus is not told of this run: cannot write to %s (%s)",
                           directory, error)  # fmt: skip
            return None

    def _render(self, accept: str) -> tuple[str, bytes]:
        form = content_type(accept)
        return form, self._renderer.render(self._tally.snapshot(), form)

    def _health(self) -> Mapping[str, object]:
        snapshot = self._tally.snapshot()
        return {
            "run": snapshot.info.run,
            "rank": snapshot.info.rank,
            "state": snapshot.state,
            "step": snapshot.numbers.get("step"),
        }


def content_type(accept: str) -> str:
    """The one of our two that prometheus_client would choose for an Accept header."""
    try:
        chosen = choose_encoder(accept)[1]
    except Exception:  # it compares versions that are no numbers
        return TEXT
    return OPENMETRICS if chosen.startswith("application/openmetrics-text") else TEXT
