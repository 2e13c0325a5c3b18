"""Questions to a Prometheus over its HTTP API; every failure is one line that says what to do."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from gradwatch.errors import MonitoringError

__all__ = ["TOKEN", "Prometheus", "QueryError"]

TOKEN = "GRADWATCH_PROMETHEUS_TOKEN"
"""Environment variable with a bearer token, for a Prometheus behind a proxy that asks for one."""

SECONDS = 30.0


class QueryError(MonitoringError):
    """Prometheus refused one query and said why."""


class Prometheus:
    """One Prometheus, or whatever speaks its API (Thanos, Mimir)."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            MonitoringError: `url` is no http address.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MonitoringError(
                f"the address of Prometheus must be like http://127.0.0.1:9090. Received: {url!r}"
            )
        if parts.username or parts.password:
            raise MonitoringError(
                f"the address of Prometheus must not hold a password. Put a token into {TOKEN}"
            )
        self._base = url.rstrip("/")

    def query(self, query: str, at: float) -> list[dict[str, Any]]:
        """The result of an instant query, one entry per series or one for a scalar."""
        return _series(self._ask("query", {"query": query, "time": f"{at:.3f}"}))

    def query_range(
        self, query: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """The result over time; times and step in seconds."""
        asked = {
            "query": query, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}",
        }  # fmt: skip
        return _series(self._ask("query_range", asked))

    def label_values(self, label: str, series: str, start: float, end: float) -> list[str]:
        """The values of a label among the series that a selector finds."""
        asked = {"match[]": series, "start": f"{start:.3f}", "end": f"{end:.3f}"}
        return list(self._ask(f"label/{urllib.parse.quote(label, safe='')}/values", asked))

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that is loaded, with its health."""
        groups = self._ask("rules", {})["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def formatted(self, query: str) -> str:
        """The query as Prometheus itself writes it (2.41 and newer)."""
        return str(self._ask("format_query", {"query": query}))

    def alertmanagers(self) -> Sequence[str]:
        """The addresses that alerts are sent to."""
        return [one["url"] for one in self._ask("alertmanagers", {})["activeAlertmanagers"]]

    def _ask(self, path: str, parameters: dict[str, str]) -> Any:
        url = f"{self._base}/api/v1/{path}"
        whole = f"{url}?{urllib.parse.urlencode(parameters)}" if parameters else url
        request = urllib.request.Request(whole)
        if token := os.environ.get(TOKEN):
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(url, error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            raise MonitoringError(
                f"{url}: no answer ({_reason(error)}). Is Prometheus running there?"
            ) from None
        said = _json(body)
        if said is None or said.get("status") != "success":
            raise MonitoringError(
                f"{url}: this is not the API of a Prometheus. Expected JSON with a status of "
                f"success. Received: {body[:80]!r}"
            )
        return said["data"]


def _series(data: dict[str, Any]) -> list[dict[str, Any]]:
    if data["resultType"] in ("scalar", "string"):
        return [{"metric": {}, "value": data["result"]}]
    return list(data["result"])


def _refused(url: str, status: int, body: bytes) -> MonitoringError:
    said = _json(body)
    if said is not None and said.get("errorType") in ("bad_data", "execution", "timeout"):
        return QueryError(str(said.get("error")))
    if status in (401, 403):
        return MonitoringError(f"{url}: {status}, not allowed. Put a valid token into {TOKEN}")
    if status == 404:
        return MonitoringError(
            f"{url}: 404. Is this a Prometheus, and is its path prefix part of the address?"
        )
    return MonitoringError(f"{url}: answered {status}: {body[:80]!r}")


def _json(body: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(body)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)
