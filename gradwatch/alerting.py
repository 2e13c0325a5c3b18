"""Anomalies in, the alerts out that Prometheus will find by its rules, in advance.

    Anomaly -> the rule that looks for its kind -> its labels and how long it holds

An alert is known by its labels alone, so this one and that of the rule are one for Alertmanager:
name and severity come from the rules, and what Prometheus adds has to be told.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gradwatch.dashboards.alert import THRESHOLDS, Alert
from gradwatch.dashboards.alerts import alerts
from gradwatch.dashboards.rules import runbook_link
from gradwatch.export.series import clean
from gradwatch.records import Anomaly

__all__ = ["DirectAlerts"]

HELD_SECONDS = THRESHOLDS.event_seconds
"""As long as the rule's own alert stays open behind the last step that it is about."""

_LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")


@dataclass(slots=True)
class _Episode:
    alert: Alert
    message: str
    began: float
    """Unix time, as is `last`."""

    last: float


class DirectAlerts:
    """Those of one run. Told by the consumer, asked by the threads that post."""

    def __init__(
        self,
        run: str,
        labels: Mapping[str, str],
        last_events: Callable[[], Mapping[str, float]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            labels: what Prometheus adds: the job, its external labels.
            last_events: Unix time of the last step of an episode, by kind, as a rule reads it.
        """
        self._labels = {**labels, "run": clean(run)}
        self._last_events = last_events
        self._clock = clock
        self._rules = {kind: alert for alert in alerts() for kind in alert.events}
        self._episodes: dict[str, _Episode] = {}
        """By the name of the alert: several kinds may raise the same one."""

    def note(self, anomaly: Anomaly) -> bool:
        """Takes a finding in; whether there is a rule for it."""
        alert = self._rules.get(anomaly.kind)
        if alert is None or anomaly.level != "alert":
            return False
        now = self._clock()
        known = self._episodes.get(alert.name)
        began = known.began if known is not None and self._end_of(known) > now else now
        self._episodes[alert.name] = _Episode(alert, anomaly.message, began, now)
        return True

    def current(self) -> list[Mapping[str, Any]]:
        """The alerts that hold, as Alertmanager's API v2 wants them."""
        last, now = self._last_events(), self._clock()
        held = []
        for episode in tuple(self._episodes.values()):
            kinds = episode.alert.events
            episode.last = max(episode.last, *(last.get(kind, 0.0) for kind in kinds))
            if self._end_of(episode) > now:
                held.append(self._payload(episode))
        return held

    def _end_of(self, episode: _Episode) -> float:
        return episode.last + HELD_SECONDS

    def _payload(self, episode: _Episode) -> Mapping[str, Any]:
        alert = episode.alert
        labels = {**self._labels, "alertname": alert.name, "severity": alert.severity}
        summary = _LABEL.sub(lambda found: labels.get(found[1], ""), alert.summary)
        return {
            "labels": labels,
            "annotations": {
                "summary": summary,
                "description": clean(episode.message),
                "runbook_url": runbook_link(alert),
            },
            "startsAt": _rfc3339(episode.began),
            "endsAt": _rfc3339(self._end_of(episode)),
        }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
