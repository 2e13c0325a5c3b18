"""What gradwatch raises, and when.

* GradwatchError
  x PolicyError            the policy file is wrong: raised before the first step
  x AttachError            this model or optimizer cannot be watched, with the way out
    + TwoClippersError     something else clips too
  x RecordingError         a recording cannot be read
  x MonitoringError        a server of the monitoring did not answer as expected
  x TrainingStopped        the policy said stop: the one exception meant to reach the loop
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "GradwatchError",
    "MonitoringError",
    "PolicyError",
    "RecordingError",
    "TrainingStopped",
    "TwoClippersError",
]


class GradwatchError(Exception):
    """Every error of gradwatch."""


class PolicyError(GradwatchError, ValueError):
    """A policy that cannot be followed; each line is `file:line:column: path message`."""


class AttachError(GradwatchError, RuntimeError):
    """A model or an optimizer that cannot be watched."""


class TwoClippersError(AttachError):
    """A second clipper beside the policy's own."""


class RecordingError(GradwatchError):
    """A recording that is missing, foreign or newer than this version."""


class MonitoringError(GradwatchError):
    """A server of the monitoring, such as Prometheus or Grafana, did not answer as expected."""


class TrainingStopped(GradwatchError):
    """The policy ended the run, before the next update.

    `step` is the step that was due, `reason` the rule or the guard that decided.
    """

    def __init__(self, message: str, *, step: int, reason: str) -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason


def stopped_before(step: int, why: str, reason: str) -> TrainingStopped:
    """The error that ends a run before the update of a step."""
    message = f"stopped before the update of step {step}: {why}"
    return TrainingStopped(message, step=step, reason=reason)
