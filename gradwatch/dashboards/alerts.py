"""The alerts: when somebody should look, and what they read first.

One series per run, however many ranks it has; only alerts that ask for a human now are critical.
"""

from __future__ import annotations

from gradwatch.dashboards.alert import THRESHOLDS, Alert, Recording, Thresholds
from gradwatch.dashboards.alerts_of_decisions import alerts_of_decisions, recordings_of_decisions
from gradwatch.dashboards.alerts_of_events import alerts_of_events
from gradwatch.dashboards.alerts_of_gradwatch import alerts_of_gradwatch
from gradwatch.dashboards.alerts_of_liveness import alerts_of_liveness, recordings_of_liveness

__all__ = ["alerts", "recordings"]


def recordings(thresholds: Thresholds = THRESHOLDS) -> tuple[Recording, ...]:
    """In the order of evaluation: a rule may use those before it."""
    return (*recordings_of_liveness(), *recordings_of_decisions(thresholds))


def alerts(thresholds: Thresholds = THRESHOLDS) -> tuple[Alert, ...]:
    """What went wrong in training first, what went wrong in watching it last."""
    return (
        *alerts_of_events(thresholds),
        *alerts_of_decisions(thresholds),
        *alerts_of_liveness(thresholds),
        *alerts_of_gradwatch(thresholds),
    )
