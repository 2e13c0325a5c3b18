"""A folder, a data source, dashboards and annotations, made so that they are as wanted."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gradwatch.grafana.server import Server, checked_url
from gradwatch.report.card import printable

__all__ = ["UID", "Annotation", "Grafana", "Outcome"]

DATASOURCE = "gradwatch-prometheus"
"""uid of the data source; the one of deploy/grafana has the same."""

UID = re.compile(r"[a-zA-Z0-9_-]{1,40}")

PAGE = 1000
"""Annotations or folders that are asked for at once."""


class Outcome(StrEnum):
    """What became of one thing."""

    created = "created"
    updated = "updated"
    unchanged = "unchanged"


@dataclass(frozen=True, slots=True)
class Annotation:
    """A mark in time that every dashboard may show."""

    time_ms: int
    """Unix time in milliseconds."""

    tags: tuple[str, ...]
    """As Grafana keeps them: at most one colon each, at most 100 bytes behind it."""

    text: str
    """HTML."""

    @property
    def key(self) -> tuple[int, frozenset[str]]:
        """What makes two of them the same one."""
        return self.time_ms, frozenset(self.tags)


class Grafana:
    """What one Grafana holds. Every failure is a MonitoringError of one line."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def version(self) -> str:
        """Asks for nothing else, and needs no permission; `?` where it is not told."""
        said = self._server.ask("GET", "/health", about="health", keys=("database",))
        return str(said.get("version") or "?")

    def ensure_folder(self, title: str) -> tuple[str, Outcome]:
        """The uid of the folder of that title; it is made where there is none.

        One that gradwatch has made and somebody has renamed gets its title back.
        """
        folders = self._folders()
        for other in folders:
            if other.get("title") == title:
                return str(other["uid"]), Outcome.unchanged
        uid, about = _folder_uid(title), f"folder {printable(title)}"
        if any(other["uid"] == uid for other in folders):
            changed = {"title": title, "overwrite": True}
            self._server.ask("PUT", f"/folders/{uid}", changed, about=about,
                             needs="folders:write, of the role Editor")  # fmt: skip
            return uid, Outcome.updated
        self._server.ask("POST", "/folders", {"uid": uid, "title": title}, about=about,
                         needs="folders:create, of the role Editor")  # fmt: skip
        return uid, Outcome.created

    def _folders(self) -> list[dict[str, Any]]:
        """Those of the root that may be seen. Asking for one by its uid would be answered with 403
        where it is missing, and not by an admin."""
        found: list[dict[str, Any]] = []
        while True:
            path = f"/folders?limit={PAGE}&page={len(found) // PAGE + 1}"
            page = self._server.ask("GET", path, about="folders", needs="folders:read", kind=list,
                                    keys=("uid",))  # fmt: skip
            found += page
            if len(page) < PAGE:
                return found

    def ensure_datasource(self, url: str) -> Outcome:
        """The Prometheus at `url`, as Grafana reaches it, under the uid `DATASOURCE`."""
        wanted = {"type": "prometheus", "access": "proxy", "url": checked_url(url, "Prometheus")}
        settings = {"httpMethod": "POST"}
        path, about = f"/datasources/uid/{DATASOURCE}", f"data source {DATASOURCE}"
        role = "of the role Admin"
        there = self._server.ask(
            "GET", path, about=about, needs=f"datasources:read, {role}", or_none=True
        )
        if there is None:
            made = {"uid": DATASOURCE, "name": "gradwatch Prometheus", **wanted}
            self._server.ask("POST", "/datasources", {**made, "jsonData": settings},
                      about=about, needs=f"datasources:create, {role}")  # fmt: skip
            return Outcome.created
        if _holds(there, wanted):
            return Outcome.unchanged
        kept = {name: value for name, value in there.items() if name != "secureJsonFields"}
        changed = {**kept, **wanted, "jsonData": {**(there.get("jsonData") or {}), **settings}}
        self._server.ask("PUT", path, changed, about=about, needs=f"datasources:write, {role}")
        return Outcome.updated

    def push_dashboard(self, dashboard: Mapping[str, Any], folder: str) -> Outcome:
        """Puts a dashboard with a uid into a folder, in place of what has that uid there.

        Unchanged is one that holds all of `dashboard`, whatever the server has added.
        """
        # Numbers of another Grafana, which would be those of another dashboard here.
        wanted = {name: value for name, value in dashboard.items() if name not in ("id", "version")}
        uid = wanted["uid"]
        about = f"dashboard {uid}"
        there = self._server.ask("GET", f"/dashboards/uid/{uid}",
                          about=about, needs="dashboards:read", or_none=True)  # fmt: skip
        if there is not None:
            is_in_folder = (there.get("meta") or {}).get("folderUid") == folder
            if is_in_folder and _holds(there.get("dashboard"), wanted):
                return Outcome.unchanged
        pushed = {"dashboard": wanted, "folderUid": folder, "overwrite": True,
                  "message": "gradwatch dashboards push"}  # fmt: skip
        self._server.ask("POST", "/dashboards/db", pushed, about=about,
                  needs="dashboards:create and dashboards:write, of the role Editor")  # fmt: skip
        return Outcome.created if there is None else Outcome.updated

    def annotate(self, annotations: Sequence[Annotation]) -> dict[Outcome, int]:
        """Adds those that are not there: of the same time and tags. Says how many are which."""
        counts = {Outcome.created: 0, Outcome.unchanged: 0}
        there = self._known(annotations) if annotations else set()
        for one in annotations:
            if one.key in there:
                counts[Outcome.unchanged] += 1
                continue
            body = {"time": one.time_ms, "tags": list(one.tags), "text": one.text}
            # Not tried again by itself: it may be there although the answer failed.
            self._server.ask("POST", "/annotations", body, about="annotation", retry=False,
                      needs="annotations:create, of the role Editor")  # fmt: skip
            there.add(one.key)
            counts[Outcome.created] += 1
        return counts

    def _known(self, annotations: Sequence[Annotation]) -> set[tuple[int, frozenset[str]]]:
        """Those of the server that could be one of these; newest first, page by page."""
        tags = sorted(frozenset.intersection(*(one.key[1] for one in annotations)))
        times = [one.time_ms for one in annotations]
        start, end = min(times), max(times)
        found: set[tuple[int, frozenset[str]]] = set()
        while True:
            asked = [("type", "annotation"), ("from", start), ("to", end), ("limit", PAGE),
                     *(("tags", tag) for tag in tags)]  # fmt: skip
            page = self._server.ask(
                "GET", f"/annotations?{urllib.parse.urlencode(asked)}", about="annotations",
                needs="annotations:read", kind=list, keys=("time",),
            )  # fmt: skip
            keys = {(int(one["time"]), frozenset(one.get("tags") or ())) for one in page}
            if keys <= found:
                return found
            found |= keys
            end = min(time_ms for time_ms, _ in keys)


def _folder_uid(title: str) -> str:
    """The title where it can be one, else one that is made from it."""
    if UID.fullmatch(title):
        return title
    readable = re.sub(r"[^a-zA-Z0-9_-]+", "-", title).strip("-")[:31]
    return f"{readable}-{hashlib.sha256(title.encode()).hexdigest()[:8]}".lstrip("-")


def _holds(there: object, wanted: object) -> bool:
    """Whether all of `wanted` is there; a server may have added keys, but no items of lists."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            name in there and _holds(there[name], value) for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(there, list)
            and len(there) == len(wanted)
            and all(map(_holds, there, wanted))
        )
    return there == wanted
