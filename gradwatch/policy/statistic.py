"""Limits that follow the history of the norm."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, model_validator

from gradwatch.policy.forms import has_steps
from gradwatch.policy.values import Count, Fraction, NotNegative, Positive, Section, Steps, refuse

__all__ = ["StatisticLimit", "is_statistic"]


class StatisticLimit(Section):
    """A limit that follows the norm's own history. Exactly one of `z`, `ratio`, `quantile`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [key]} for key in ("z", "ratio", "quantile")]}
    )

    z: Positive | None = None
    """Standard deviations above the mean of the history."""

    ratio: Positive | None = None
    """Times the exponential moving average of the history."""

    quantile: Fraction | None = None
    """Quantile of the history."""

    space: Literal["log", "raw"] = "log"
    """Whether the history holds ln(norm) or the norm; `raw` is for parity with papers."""

    decay: Fraction | None = None
    """How much of the history each step keeps. Left out, with no window: 0.99."""

    window: Count | Literal["all"] | None = None
    """Length of the history in steps, instead of a decay. Left out for a quantile: 128."""

    warmup: Steps = 100
    """Accepted values before the limit is in force."""

    until: Positive | None = None
    """The limit while warming up. Left out: none."""

    floor: NotNegative = 0.05
    """Least standard deviation, relative to the norm."""

    min: Positive | None = None
    """The limit is never below."""

    max: Positive | None = None
    """The limit is never above."""

    learn: Literal["winsor", "clipped", "accepted", "raw"] = "winsor"
    """What enters the history where a norm was over the limit."""

    to: Literal["limit", "mean", "reciprocal"] = "limit"
    """What a norm over the limit is scaled to."""

    @model_validator(mode="after")
    def _has_one_statistic(self) -> Self:
        given = [key for key in ("z", "ratio", "quantile") if getattr(self, key) is not None]
        if len(given) != 1:
            refuse("must have exactly one of z, ratio and quantile")
        if self.decay is not None and self.window is not None:
            refuse("must have a decay or a window, not both")
        if self.ratio is not None and self.window is not None:
            refuse("must have a decay for a ratio, not a window")
        if self.quantile is not None and self.decay is not None:
            refuse("must have a window for a quantile, not a decay")
        if self.z is not None and self.window == "all":
            refuse("must have a window of so many steps for z, or a decay")
        if self.min is not None and self.max is not None and self.min > self.max:
            refuse("must have min <= max")
        return self


STATISTICS = frozenset(StatisticLimit.model_fields)


def is_statistic(limit: Any) -> bool:
    """Whether a limit is written as a statistic."""
    return isinstance(limit, dict) and not has_steps(limit) and bool(STATISTICS & limit.keys())
