"""A model for each detector of the `detect:` section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from gradwatch.policy.values import (
    Factor,
    Fraction,
    Names,
    Positive,
    Section,
    Span,
    Steps,
    refuse,
)

__all__ = [
    "ClipSaturated",
    "Collapsed",
    "Dead",
    "Detector",
    "Diverging",
    "Exploding",
    "LossScaleCollapse",
    "LossSpike",
    "Nonfinite",
    "Outlier",
    "Overflow",
    "OversizedUpdate",
    "RankDivergence",
    "RankOutlier",
    "Spike",
    "StalledUpdate",
    "Stuck",
    "SwallowedUpdate",
    "Underflow",
    "Unused",
    "Vanishing",
]

Action = Literal["record", "warn", "stop"]


class Detector(Section):
    """What one kind of anomaly needs to know."""

    then: Action = "warn"
    """What a finding leads to, beside being recorded, counted and exported: nothing more, a line in
    the log, or the end of the run before its next update."""


class _OfLayers(Detector):
    layers: Names = ("*",)
    """A glob or a list of globs on the layers that are looked at."""

    exclude: Names = ()
    """Globs that take layers out again."""


class _Counting(Detector):
    need: Span = 3
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 5
    """The number of last steps that are looked at."""

    @model_validator(mode="after")
    def _needs_no_more_than_it_looks_at(self) -> Self:
        if self.need > self.of:
            refuse(f"must have need <= of (here {self.need} of {self.of})")
        return self


class Outlier(_Counting, _OfLayers):
    """A norm and its own baseline; what several detectors share."""

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


class _Sampled(_Counting, _OfLayers):
    need: Span = 20
    """Samples out of the last `of` that must be abnormal."""

    of: Span = 25
    """The number of last samples that are looked at."""


class Nonfinite(Detector):
    """A norm that holds inf or NaN: immediate."""


class Overflow(Detector):
    """A norm that holds inf or NaN in a step that the loss scaler drops: how it finds its scale."""

    then: Action = "record"
    """The same as for any detector; it pages nobody."""


class Exploding(Outlier):
    """A layer whose norm stays far above its own baseline."""


class Spike(Outlier):
    """A layer whose norm jumps far above its own baseline for single steps."""

    then: Action = "record"
    """The same as for any detector; it pages nobody."""

    need: Span = 1
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 1
    """The number of last steps that are looked at."""


class LossSpike(Detector):
    """A loss that stays above its own baseline."""

    z: Positive = 4.0
    """Distance of ln(loss) from its median, in units of 1.4826 x MAD, to be exceeded."""

    times: Factor = 1.1
    """The loss must also exceed so many times its median."""

    floor: Positive = 0.02
    """Least scale of ln(loss)."""

    warmup: Span = 64
    """Accepted values before the detector may fire."""

    window: Span = 128
    """Accepted values that the median and the MAD are taken from."""

    need: Span = 3
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 5
    """The number of last steps that are looked at."""


class Diverging(Detector):
    """A loss that has been lower, and stays away from there."""

    times: Factor = 1.25
    """How many times its best median the median of the loss must exceed."""

    share: Fraction = 0.1
    """The median must also exceed this share of the first losses: near 0 everything is noise."""

    over: Span = 50
    """Losses that a median is taken of."""

    steps: Span = 25
    """Steps in a row for which that must hold."""

    after: Steps = 200
    """Losses before the detector may fire."""


class Vanishing(_Counting, _OfLayers):
    """A layer whose norm stays a tiny share of the largest layer's."""

    share: Fraction = 1e-5
    """Norm of the layer over the norm of the largest layer, to stay below."""

    need: Span = 20
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 25
    """The number of last steps that are looked at."""

    after: Steps = 20
    """Steps of the run before the detector may fire."""


class Collapsed(Outlier):
    """A parameter whose norm stays far below its own baseline, while the loss does not."""

    times: Factor = 100.0
    """The norm must also be below its median divided by this."""

    need: Span = 20
    """Steps out of the last `of` that must be abnormal."""

    of: Span = 25
    """The number of last steps that are looked at."""


class LossScaleCollapse(Detector):
    """A loss scale that finds no level, or drops too many steps."""

    least: Positive = 1.0
    """Below it the scale has collapsed."""

    halvings: Span = 8
    """How often the scale may be halved within `window` steps, once it was found."""

    share: Fraction = 0.25
    """Dropped steps among the last `window`, to be exceeded."""

    window: Span = 64
    """The number of last steps that are looked at."""


class Unused(_OfLayers):
    """A parameter that is to be trained and gets no gradient."""

    steps: Span = 100
    """Steps in a row without one."""


class Stuck(Detector):
    """A run that makes no step, or the same one again and again."""

    steps: Span = 20
    """Steps in a row whose norm is the same to the bit."""

    seconds: Positive = 300.0
    """Without a step; longer where steps take longer."""

    times: Factor = 10.0
    """Without a step for so many times the median of the last steps."""


class ClippedElsewhere(Detector):
    """A gradient that was cut to length before gradwatch measured it."""

    steps: Span = 4
    """Steps among the last `window` whose norm is the largest one, digit by digit, while the
    layers differ."""

    window: Span = 256
    """The number of last steps that are looked at."""

    @model_validator(mode="after")
    def _needs_no_more_than_it_looks_at(self) -> Self:
        if self.steps > self.window:
            refuse(f"must have steps <= window (here {self.steps} of {self.window})")
        return self


class ClipSaturated(Detector):
    """Clipping that never rests: the limit, not the gradient, sets the length of a step."""

    then: Action = "record"
    """The same as for any detector; it pages nobody."""

    share: Fraction = 0.95
    """Clipped steps among the last `window`, to be exceeded."""

    window: Span = 256
    """The number of last steps that are looked at."""


class Dead(_Sampled):
    """A layer whose gradient is zero nearly everywhere."""

    share: Fraction = 0.999
    """Zeros among the elements of its gradient."""


class StalledUpdate(_Sampled):
    """A layer whose weights hardly move."""

    ratio: Positive = 1e-7
    """Norm of the update over the norm of the weights, to stay below."""

    need: Span = 50
    """Samples out of the last `of` that must be abnormal."""

    of: Span = 60
    """The number of last samples that are looked at."""


class OversizedUpdate(_Sampled):
    """A layer whose weights are rewritten by single updates."""

    ratio: Positive = 0.3
    """Norm of the update over the norm of the weights, to be exceeded."""

    least: Positive = 1e-3
    """Norm of the weights below which nothing is said: zeros may grow."""

    need: Span = 3
    """Samples out of the last `of` that must be abnormal."""

    of: Span = 5
    """The number of last samples that are looked at."""


class Underflow(_Sampled):
    """A layer whose gradient is lost in float16 at the present loss scale."""

    share: Fraction = 0.3
    """Share of its elements that are zero or too small for float16, above the median of the
    layer."""

    warmup: Span = 10
    """Samples that the median is taken from."""


class SwallowedUpdate(_Sampled):
    """A layer whose updates are too small for the precision of its weights."""

    share: Fraction = 0.5
    """Weights that a step leaves unchanged, among those with a gradient."""


class RankDivergence(Detector):
    """Weights that are to be the same on several processes, and are not."""

    every: Span = 100
    """Steps between two comparisons of their checksums."""


class RankOutlier(_Counting):
    """A process whose own gradient is not like that of the others; needs three of them."""

    z: Factor = 6.0
    """Distance of its log norm from the median, in units of the median distance."""

    floor: Positive = 0.1
    """The least unit, in log units."""

    need: Span = 3
    """Samples out of the last `of` that must be abnormal."""

    of: Span = 5
    """The number of last samples that are looked at."""
