"""Who hears of a run's end, and of its alerts at once: arguments, else the environment, checked.

For those who cannot change the code, and for a cluster that knows its servers, each option has a
variable.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradwatch.alerting import DirectAlerts
from gradwatch.errors import AttachError
from gradwatch.export.alertmanager import Alertmanagers
from gradwatch.export.pushgateway import push_summary
from gradwatch.export.urls import ServerUrl
from gradwatch.pipeline import Pipeline
from gradwatch.records import Anomaly

__all__ = ["JOB", "LINGER_SECONDS", "Ends", "end_well"]

LINGER_SECONDS = 20.0
JOB = "gradwatch"
"""The job that Prometheus scrapes runs under in the configurations that come with gradwatch."""

LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
OURS = ("alertname", "severity", "run")


@dataclass(frozen=True, slots=True)
class Ends:
    """The options, settled."""

    linger: float
    insists: bool
    """Whether a number was given, so that a scraper that never came is waited for as well."""

    pushgateway: ServerUrl | None
    alertmanagers: tuple[ServerUrl, ...]
    labels: Mapping[str, str]
    """What Prometheus adds to the alerts of this run; `job` among them."""

    @classmethod
    def of(
        cls,
        linger: float | None = None,
        pushgateway: str | None = None,
        alertmanager: str | Sequence[str] | None = None,
        alert_labels: Mapping[str, str] | None = None,
    ) -> Ends:
        """
        Raises:
            AttachError: an option, or the variable that stands for it, cannot be used.
        """
        try:
            seconds, what = _given("linger", linger)
            gateway, gateway_what = _given("pushgateway", pushgateway)
            managers, manager_what = _given("alertmanager", alertmanager)
            labels, labels_what = _given("alert_labels", alert_labels)
            return cls(
                linger=LINGER_SECONDS if seconds is None else _seconds(seconds, what),
                insists=seconds is not None,
                pushgateway=ServerUrl.of(gateway, gateway_what) if gateway else None,
                alertmanagers=tuple(ServerUrl.of(one, manager_what) for one in _listed(managers)),
                labels={"job": JOB, **_labels(labels, labels_what)},
            )
        except ValueError as error:
            raise AttachError(str(error)) from error


def end_well(pipeline: Pipeline, ends: Ends) -> None:
    """Has a run post its alerts, and push how it ended."""

    def count() -> None:
        pipeline.tally.hook_error("export")

    if ends.alertmanagers and pipeline.info.rank == 0:  # the others would find the same
        alerts = DirectAlerts(pipeline.info.run, ends.labels, pipeline.tally.last_events)
        managers = Alertmanagers(ends.alertmanagers, alerts.current, count)

        def post(found: Anomaly) -> None:
            if alerts.note(found):
                managers.tell()

        pipeline.consumer.callbacks.append(post)
        pipeline.closers.append(managers.close)
        pipeline.end_before_sigterm()
    if (gateway := ends.pushgateway) is not None:
        tally, job = pipeline.tally, ends.labels["job"]
        pipeline.closers.append(
            lambda: push_summary(gateway, job, tally.snapshot(), tally.largest_norm, count)
        )
        pipeline.end_before_sigterm()


def _given(option: str, argument: Any) -> tuple[Any, str]:
    """An option's value, and what to call it where that is wrong."""
    if argument is not None:
        return argument, option
    name = f"GRADWATCH_{option.upper()}"
    return os.environ.get(name) or None, name


def _seconds(value: object, what: str) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if 0 <= seconds < math.inf:
        return seconds
    raise ValueError(f"{what} must be seconds >= 0. Received: {value!r}")


def _listed(managers: str | Sequence[str] | None) -> list[str]:
    several = managers.split(",") if isinstance(managers, str) else managers or ()
    return [one for one in several if one.strip()]


def _labels(given: str | Mapping[str, str] | None, what: str) -> dict[str, str]:
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        given = {name.strip(): value.strip() for name, _, value in parts}
    for name, value in (given or {}).items():
        if not LABEL.fullmatch(name) or name in OURS or not isinstance(value, str) or not value:
            raise ValueError(
                f"{what} must be labels that Prometheus adds, such as job=gradwatch,cluster=a, "
                f"and none of {', '.join(OURS)}. Received: {name}={value!r}"
            )
    return dict(given or {})
