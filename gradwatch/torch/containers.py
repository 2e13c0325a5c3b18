"""An optimizer around others in, whether it can be watched and at which learning rate out.

What wraps optimizers either passes the calls on (found inside), is an optimizer over all parameters
itself (torchtitan's container), or keeps gradients elsewhere (an engine).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gradwatch.errors import AttachError

__all__ = ["is_watchable", "learning_rate", "refuse_engine"]

ENGINES = ("deepspeed", "megatron", "fairscale")
"""Packages whose modules and optimizers keep gradients in flat buffers."""

CLIPS_BY = {
    "deepspeed": "gradient_clipping in its configuration clips, engine.get_global_grad_norm() has "
    "the norm",
    "megatron": "--clip-grad clips, and optimizer.step() returns the norm",
}


def is_watchable(optimizer: Any) -> bool:
    """Whether it takes step hooks.

    Raises:
        AttachError: no gradient would be there when they run.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):  # an engine's Adam alone is a plain one
        refuse_engine(optimizer, "Attach where a plain torch optimizer takes the step")
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    if any("InBackward" in kind for kind in kinds):
        raise AttachError(
            f"{kinds[0]} updates parameters inside the backward pass, so there is no moment at "
            "which all gradients are there, and its step() does nothing. Use the optimizer that "
            "steps after backward()."
        )
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


def refuse_engine(thing: Any, way_out: str) -> None:
    """
    Raises:
        AttachError: it is of a package that keeps gradients in flat buffers.
    """
    engine = type(thing).__module__.partition(".")[0]
    if engine in ENGINES:
        own = f"; {CLIPS_BY[engine]}" if engine in CLIPS_BY else ""
        raise AttachError(
            f"{engine}'s {type(thing).__name__} keeps gradients in flat buffers of its own, where "
            f"no parameter has one to be measured{own}. {way_out}."
        )


def learning_rate(optimizer: torch.optim.Optimizer | None) -> float:
    """Of the first group; NaN where there is none or where reading it would wait for a device.

    The groups of a container are those that it was made with: schedules act on the ones inside.
    """
    inside = getattr(optimizer, "optimizers", None)
    if isinstance(inside, (list, tuple)) and inside and hasattr(inside[0], "param_groups"):
        optimizer = inside[0]
    rate = math.nan if optimizer is None else optimizer.param_groups[0].get("lr", math.nan)
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return math.nan
    try:
        return float(rate)
    except (TypeError, ValueError, RuntimeError):  # None where an optimizer finds its own
        return math.nan
