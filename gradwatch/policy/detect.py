"""The `detect:` section: every detector, all of them on unless switched off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from gradwatch.policy.detectors import (
    ClippedElsewhere,
    ClipSaturated,
    Collapsed,
    Dead,
    Detector,
    Diverging,
    Exploding,
    LossScaleCollapse,
    LossSpike,
    Nonfinite,
    Overflow,
    OversizedUpdate,
    RankDivergence,
    RankOutlier,
    Spike,
    StalledUpdate,
    Stuck,
    SwallowedUpdate,
    Underflow,
    Unused,
    Vanishing,
)
from gradwatch.policy.values import OFF, Section, Span, refuse

__all__ = ["KINDS", "Culprits", "Detect"]

Culprits = Literal["none", "flags", "replay", "always"]


def _or_off(value: Any) -> Any:
    if isinstance(value, str) and value == OFF:
        return None
    if not (value is None or isinstance(value, (dict, Section))):
        refuse(f"must be a mapping of keys, or {OFF}")
    return value


OFF_OR = BeforeValidator(_or_off)


class Detect(Section):
    """Which detectors run, and how."""

    every: Span = 10
    """Steps between two samples of what norms do not tell: zeros, updates, lost precision."""

    culprit: Culprits = "flags"
    """How to look for what went bad first in a step that is not finite: not at all; from its
    gradients, weights and loss; also by running its last micro-batch forward once more (keeps that
    batch until the step is over); or from flags of every module, set in every pass (slow)."""

    nonfinite: Annotated[Nonfinite | None, OFF_OR] = Nonfinite()
    """A norm that is not finite."""

    exploding: Annotated[Exploding | None, OFF_OR] = Exploding()
    """A norm far above its own baseline, persistently."""

    rank_divergence: Annotated[RankDivergence | None, OFF_OR] = RankDivergence()
    """Weights that differ between processes that share them."""

    loss_scale_collapse: Annotated[LossScaleCollapse | None, OFF_OR] = LossScaleCollapse()
    """A loss scale below 1, or one that does not settle."""

    loss_spike: Annotated[LossSpike | None, OFF_OR] = LossSpike()
    """A loss above its own baseline, persistently."""

    rank_outlier: Annotated[RankOutlier | None, OFF_OR] = RankOutlier()
    """One process whose gradient is not like those of the others; sampled."""

    vanishing: Annotated[Vanishing | None, OFF_OR] = Vanishing()
    """A norm that is a tiny share of the largest layer's, persistently."""

    collapsed: Annotated[Collapsed | None, OFF_OR] = Collapsed()
    """A parameter's norm far below its own baseline, persistently."""

    dead: Annotated[Dead | None, OFF_OR] = Dead()
    """A gradient of zeros; sampled."""

    stalled_update: Annotated[StalledUpdate | None, OFF_OR] = StalledUpdate()
    """Updates that are nothing beside the weights; sampled."""

    oversized_update: Annotated[OversizedUpdate | None, OFF_OR] = OversizedUpdate()
    """Updates that are large beside the weights; sampled."""

    underflow: Annotated[Underflow | None, OFF_OR] = Underflow()
    """Gradients that the loss scale leaves too small for float16; sampled."""

    swallowed_update: Annotated[SwallowedUpdate | None, OFF_OR] = SwallowedUpdate()
    """Updates that the precision of the weights swallows; sampled."""

    diverging: Annotated[Diverging | None, OFF_OR] = Diverging()
    """A loss that goes away from its best."""

    stuck: Annotated[Stuck | None, OFF_OR] = Stuck()
    """No step for long, or the same norm again and again."""

    clipped_elsewhere: Annotated[ClippedElsewhere | None, OFF_OR] = ClippedElsewhere()
    """A gradient that something else clips before it is measured."""

    unused: Annotated[Unused | None, OFF_OR] = Unused()
    """A parameter that gets no gradient."""

    overflow: Annotated[Overflow | None, OFF_OR] = Overflow()
    """A norm that is not finite in a step that a loss scaler drops."""

    spike: Annotated[Spike | None, OFF_OR] = Spike()
    """A norm far above its own baseline, for single steps."""

    clip_saturated: Annotated[ClipSaturated | None, OFF_OR] = ClipSaturated()
    """Clipping in nearly every step."""

    def kinds(self) -> Iterator[tuple[str, Detector]]:
        """The kinds that are on, most urgent first."""
        for kind in KINDS:
            if (detector := self[kind]) is not None:
                yield kind, detector

    def __getitem__(self, kind: str) -> Detector | None:
        if kind not in KINDS:
            raise KeyError(kind)
        detector: Detector | None = getattr(self, kind)
        return detector


KINDS = tuple(key for key in Detect.model_fields if key not in ("every", "culprit"))
"""Every kind of anomaly, most urgent first."""
