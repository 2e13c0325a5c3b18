"""The `detect:` section: a model for each detector, all of them on unless switched off."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from gradwatch.policy.values import OFF, Factor, Fraction, Positive, Section, Span, Steps, refuse

__all__ = ["Detect", "Exploding", "Nonfinite", "Overflow", "Spike", "Vanishing"]

Action = Literal["record"]


class _Detector(Section):
    then: Action = "record"
    """What a finding leads to: it is recorded, counted and exported."""


class _Counting(_Detector):
    need: Span = 3
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 5
    """The number of last steps that are looked at."""

    @model_validator(mode="after")
    def _needs_no_more_than_it_looks_at(self) -> Self:
        if self.need > self.of:
            refuse(f"must have need <= of (here {self.need} of {self.of})")
        return self


class _Outlier(_Counting):
    z: Positive = 6.0
    """Distance of ln(norm) from its median, in units of 1.4826 x MAD, to be exceeded."""

    times: Factor = 4.0
    """The norm must also exceed so many times its median."""

    floor: Positive = 0.25
    """Least scale of ln(norm), so that a very steady norm does not make every step an outlier."""

    warmup: Span = 50
    """Accepted values before the detector may fire."""

    window: Span = 128
    """Accepted values that the median and the MAD are taken from."""

    @model_validator(mode="after")
    def _warms_up_within_its_window(self) -> Self:
        if self.warmup > self.window:
            refuse(f"must have warmup <= window (here {self.warmup} and {self.window})")
        return self


class Nonfinite(_Detector):
    """A norm that holds inf or NaN: immediate."""


class Overflow(_Detector):
    """A norm that holds inf or NaN in a step that the loss scaler drops: how it finds its scale."""


class Exploding(_Outlier):
    """A layer whose norm stays far above its own baseline."""


class Spike(_Outlier):
    """A layer whose norm jumps far above its own baseline for single steps."""

    need: Span = 1
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 1
    """The number of last steps that are looked at."""


class Vanishing(_Counting):
    """A layer whose norm stays a tiny share of the largest layer's."""

    share: Fraction = 1e-5
    """Norm of the layer over the norm of the largest layer, to stay below."""

    need: Span = 20
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 25
    """The number of last steps that are looked at."""

    after: Steps = 20
    """Steps of the run before the detector may fire."""


def _or_off(value: Any) -> Any:
    if isinstance(value, str) and value == OFF:
        return None
    if not (value is None or isinstance(value, (dict, Section))):
        refuse(f"must be a mapping of keys, or {OFF}")
    return value


class Detect(Section):
    """Which detectors run, and how."""

    nonfinite: Annotated[Nonfinite | None, BeforeValidator(_or_off)] = Nonfinite()
    """A norm that is not finite."""

    overflow: Annotated[Overflow | None, BeforeValidator(_or_off)] = Overflow()
    """A norm that is not finite in a step that a loss scaler drops."""

    exploding: Annotated[Exploding | None, BeforeValidator(_or_off)] = Exploding()
    """A norm far above its own baseline, persistently."""

    spike: Annotated[Spike | None, BeforeValidator(_or_off)] = Spike()
    """A norm far above its own baseline, for single steps."""

    vanishing: Annotated[Vanishing | None, BeforeValidator(_or_off)] = Vanishing()
    """A norm that is a tiny share of the largest layer's, persistently."""

    def parameters(self) -> dict[str, dict[str, object] | None]:
        """The parameters of each kind, defaults included; None for one that is switched off."""
        return {kind: None if detector is None else dict(detector) for kind, detector in self}
