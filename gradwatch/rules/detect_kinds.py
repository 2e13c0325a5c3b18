"""The kinds that persist, each with its level, its condition and what it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradwatch.policy import Detect, layers_of
from gradwatch.policy.detectors import Detector as Config
from gradwatch.records import Layout, Level
from gradwatch.rules.detect_loss import Diverging, LossSpike
from gradwatch.rules.detect_parameters import Collapsed, Unused
from gradwatch.rules.detect_run import ClippedElsewhere, ClipSaturated, LossScale, Repeated
from gradwatch.rules.detect_sampled import Lost, dead, oversized, stalled, swallowed
from gradwatch.rules.episodes import Episodes
from gradwatch.rules.persistent import Condition, Persistent

__all__ = ["persistent"]


def persistent(layout: Layout, detect: Detect) -> Iterator[tuple[str, Persistent]]:
    """The detectors that a policy asks for, by kind."""
    num_parameters = len(layout.parameters)
    if (scale := detect.loss_scale_collapse) is not None:
        yield _of_run("loss_scale_collapse", "alert", LossScale(scale), 1, 1, scale.window)
    if (loss := detect.loss_spike) is not None:
        yield _of_run("loss_spike", "alert", LossSpike(loss), loss.need, loss.of, loss.of)
    if (diverging := detect.diverging) is not None:
        steps = diverging.steps
        yield _of_run("diverging", "warning", Diverging(diverging), steps, steps, steps)
    if (stuck := detect.stuck) is not None:
        yield _of_run("stuck", "warning", Repeated(stuck), stuck.steps, stuck.steps, 1)
    if (elsewhere := detect.clipped_elsewhere) is not None:
        condition = ClippedElsewhere(num_parameters, elsewhere)
        steps, window = elsewhere.steps, elsewhere.window
        yield _of_run("clipped_elsewhere", "warning", condition, steps, window, window)
    if (saturated := detect.clip_saturated) is not None:
        yield _of_run("clip_saturated", "event", ClipSaturated(saturated), 1, 1, 1)
    yield from _sampled(layout, detect)
    if (collapsed := detect.collapsed) is not None:
        yield _of_parameters(
            "collapsed", "alert", Collapsed(num_parameters, collapsed), layout, collapsed,
            Episodes(num_parameters, need=collapsed.need, of=collapsed.of,
                     clear_after=collapsed.of),
        )  # fmt: skip
    if (unused := detect.unused) is not None:
        yield _of_parameters(
            "unused", "warning", Unused(layout, unused), layout, unused,
            Episodes(num_parameters, need=unused.steps, of=unused.steps, clear_after=1),
        )  # fmt: skip


def _sampled(layout: Layout, detect: Detect) -> Iterator[tuple[str, Persistent]]:
    wanted: list[tuple[str, Level, Any, Condition]] = []
    if detect.dead is not None:
        wanted.append(("dead", "alert", detect.dead, dead(layout, detect.dead)))
    if (update := detect.stalled_update) is not None:
        wanted.append(("stalled_update", "alert", update, stalled(update)))
    if (large := detect.oversized_update) is not None:
        wanted.append(("oversized_update", "alert", large, oversized(large)))
    if (underflow := detect.underflow) is not None:
        wanted.append(("underflow", "warning", underflow, Lost(layout, underflow)))
    if (update_ := detect.swallowed_update) is not None:
        wanted.append(("swallowed_update", "warning", update_, swallowed(layout, update_)))
    for kind, level, config, condition in wanted:
        episodes = Episodes(
            len(layout.layers), need=config.need, of=config.of, clear_after=config.of
        )
        yield (
            kind,
            Persistent(
                kind,
                level,
                condition,
                episodes,
                subjects=layout.layers,
                watched_S=layers_of(config, layout),
                layer_of_S=np.arange(len(layout.layers)),
                num_layers=len(layout.layers),
            ),
        )


def _of_run(
    kind: str, level: Level, condition: Condition, need: int, of: int, clear_after: int
) -> tuple[str, Persistent]:
    episodes = Episodes(1, need=need, of=of, clear_after=clear_after)
    return kind, Persistent(kind, level, condition, episodes)


def _of_parameters(
    kind: str, level: Level, condition: Condition, layout: Layout, config: Config,
    episodes: Episodes,
) -> tuple[str, Persistent]:  # fmt: skip
    watched_L = layers_of(config, layout)
    return kind, Persistent(
        kind,
        level,
        condition,
        episodes,
        subjects=[parameter.name for parameter in layout.parameters],
        watched_S=None if watched_L is None else watched_L[layout.layer_of_P],
        layer_of_S=layout.layer_of_P,
        num_layers=len(layout.layers),
    )
