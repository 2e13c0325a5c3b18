"""How a run ended, left at a Pushgateway; and what was left there, taken away again.

    Snapshot -> summary -> PUT /metrics/job/JOB/rank/RANK/run/RUN     once, when the run ends

What was pushed never goes stale and is there until it is deleted.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

from prometheus_client import CollectorRegistry, Gauge, delete_from_gateway, push_to_gateway
from prometheus_client.exposition import default_handler

from gradwatch.export.metrics import END_METRICS, METRICS, PREFIX
from gradwatch.export.series import clean
from gradwatch.export.urls import FAILURES, ServerUrl
from gradwatch.saying import say
from gradwatch.tally import Labels, Snapshot

__all__ = ["Group", "delete", "left_behind", "push_summary", "summary"]

ANSWER_SECONDS = 2.0
PUSH_SECONDS = 3.0
"""For all of a push, whatever the server does."""

PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""What may stand in a path as it is: neither empty nor one of its dots."""

COUNTED = {
    "end_skipped_steps": "skipped_steps_total",
    "end_clipped_steps": "clipped_steps_total",
    "end_events": "events_total",
}


def summary(snapshot: Snapshot, largest_norm: float, now: float) -> CollectorRegistry:
    """What is pushed: `END_METRICS`, and the time of the last event of each kind, by which the
    rules find an alert that nobody has scraped."""
    numbers, labelled = snapshot.numbers, snapshot.labelled
    values: dict[str, Mapping[Labels, float]] = {
        "end_state": labelled["run_state"],
        "end_timestamp_seconds": {(): now},
        "end_steps": {(): numbers["steps_total"]},
        **{name: labelled[counter] for name, counter in COUNTED.items()},
        "end_total_norm": {(): numbers.get("total_norm", math.nan)},
        "end_total_norm_max": {(): largest_norm},
        "end_loss": {(): numbers["loss"]} if "loss" in numbers else {},
        "last_event_timestamp_seconds": labelled["last_event_timestamp_seconds"],
    }
    registry = CollectorRegistry(auto_describe=False)
    for name, of_labels in values.items():
        spec = END_METRICS.get(name) or METRICS[name]
        gauge = Gauge(spec.full_name, spec.help, spec.labels, registry=registry)
        for labels, value in of_labels.items():
            (gauge.labels(*map(clean, labels)) if labels else gauge).set(value)
    return registry


def push_summary(
    server: ServerUrl,
    job: str,
    snapshot: Snapshot,
    largest_norm: float,
    on_error: Callable[[], None],
) -> None:
    """Pushes within 3 seconds, or says once why not. Replaces what a run of this name had left."""
    info = snapshot.info
    group = Group(job, clean(info.run), str(info.rank))
    registry = summary(snapshot, largest_norm, time.time())
    failures: list[object] = ["no answer in time"]

    def push() -> None:
        try:
            push_to_gateway(
                str(server), job, registry, _grouping(group),
                timeout=ANSWER_SECONDS, handler=_authorized(server),
            )  # fmt: skip
            failures.clear()
        except HTTPError as error:
            failures[:] = [error]
            error.close()
        except Exception as error:
            failures[:] = [error]

    pushing = threading.Thread(target=push, name="gradwatch-push", daemon=True)
    pushing.start()
    pushing.join(PUSH_SECONDS)  # a timeout of a socket is none for a name that is looked up
    if failures:
        on_error()
        say(
            logging.WARNING,
            "how the run ended could not be pushed to the Pushgateway %s (%s)",
            server, failures[0],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """What one rank of a run has left behind."""

    job: str
    run: str
    rank: str
    pushed: float = 0.0
    """Unix time."""


def left_behind(server: ServerUrl) -> list[Group]:
    """Every group of gradwatch at a Pushgateway.

    Raises:
        OSError: the server is away, or its answer is none of a Pushgateway.
    """
    try:
        answer = json.loads(server.ask("/api/v1/metrics", seconds=ANSWER_SECONDS))
        return [_group(found) for found in answer["data"] if PREFIX + "end_state" in found]
    except (KeyError, TypeError, *FAILURES) as error:
        raise OSError(f"{server}: {error}") from error


def delete(server: ServerUrl, group: Group) -> None:
    """
    Raises:
        OSError: the server is away, or refuses.
    """
    delete_from_gateway(
        str(server), group.job, _grouping(group),
        timeout=ANSWER_SECONDS, handler=_authorized(server),
    )  # fmt: skip


def _group(found: Mapping[str, Any]) -> Group:
    labels = found["labels"]
    pushed = float(found["push_time_seconds"]["metrics"][0]["value"])
    return Group(labels["job"], labels.get("run", ""), labels.get("rank", ""), pushed)


def _grouping(group: Group) -> dict[str, str]:
    """The key of a group, in the form that takes any name where a name needs it."""
    return dict(_escaped(label, getattr(group, label)) for label in ("rank", "run"))


def _escaped(label: str, value: str) -> tuple[str, str]:
    if PLAIN.fullmatch(value):
        return label, value
    encoded = base64.urlsafe_b64encode(value.encode()).decode()
    return f"{label}@base64", encoded or "="


def _authorized(server: ServerUrl) -> Callable[..., Callable[[], None]]:
    return functools.partial(_handler, server.authorization)


def _handler(
    authorization: str | None,
    url: str,
    method: str,
    timeout: float | None,
    headers: list[tuple[str, str]],
    data: bytes,
) -> Callable[[], None]:
    own = [] if authorization is None else [("Authorization", authorization)]
    return default_handler(url, method, timeout, [*headers, *own], data)
