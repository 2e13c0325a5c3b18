"""The `accumulate:` section: how micro-batches become one optimizer step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from gradwatch.policy.forms import Schedule, StairsMap, has_steps
from gradwatch.policy.values import Count, Section

__all__ = ["Accumulate", "SampleTarget"]


class SampleTarget(Section):
    """Accumulate until so many samples have contributed."""

    target: Count
    """Samples per optimizer step."""


def _steps_form(value: Any) -> str | None:
    if isinstance(value, Schedule) or (isinstance(value, dict) and has_steps(value)):
        return "<schedule>"
    if isinstance(value, (dict, SampleTarget)):
        return "<target>"
    return None if isinstance(value, (list, tuple)) else "<number>"


class Accumulate(Section):
    """How micro-batches become one optimizer step."""

    steps: Annotated[
        Annotated[Count, Tag("<number>")]
        | Annotated[StairsMap, Tag("<schedule>")]
        | Annotated[SampleTarget, Tag("<target>")],
        Discriminator(
            _steps_form,
            custom_error_type="policy",
            custom_error_message="must be a whole number, a schedule such as {0: 1, 1000: 4}, "
            "or {target: 4096}",
        ),
    ]
    """Micro-batches per optimizer step: a number, stairs by optimizer step, or a sample target."""

    drive: Literal["hook", "loop"] = "hook"
    """Who makes the window: `hook` turns `steps` calls of step() into one; in `loop` the training
    loop accumulates and divides by `steps`, and short windows are made exact means."""

    weigh: Literal["mean", "sum", "weight"] = "mean"
    """How micro-batches combine; `weight` is the number that is given with the loss."""

    partial: Literal["step", "drop", "carry"] = "step"
    """What becomes of a last, shorter window: an exact mean, nothing, or the next one's begin."""

    sync: Literal["boundary", "every"] | None = None
    """When gradients are reduced over processes: once a window (`boundary`, with
    `watch.micro_batches`), or with `every` micro-batch. Left out: `boundary` under
    DistributedDataParallel, `every` under FSDP, which otherwise keeps whole gradients."""
