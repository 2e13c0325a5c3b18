"""The size of the update that an adaptive optimizer is about to make, before the learning rate.

    u = g / sqrt(v)      v: its second moment, with the gradient of this step, without its bias

The root mean square of u is near 1 in a healthy run and jumps where v is too small for what comes,
which precedes a spike of the loss (StableAdamW, arXiv:2304.13013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradwatch.torch.gradients import Gradients

__all__ = ["has_second_moments", "update_norms"]

KEYS = ("exp_avg_sq", "square_avg")
"""What the second moment is called: in the Adam family, and in RMSprop."""


def has_second_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer divides by the root of a moving average of squares."""
    return all("betas" in group or "alpha" in group for group in optimizer.param_groups)


def update_norms(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    gradients: Gradients,
    device: torch.device,
) -> torch.Tensor:
    """[Q] L2 norm of each u, in float32; 0 of a parameter that has made no step yet.

    Args:
        parameters: those that have a gradient, in order.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    norms = []
    for i, (parameter, value) in enumerate(zip(parameters, gradients.values, strict=True)):
        moments = _second_moments(optimizer.state.get(parameter, {}), groups[parameter])
        if moments is None or i in gradients.rows:
            norms.append(torch.zeros((), device=device))
            continue
        norms.append(_norm(value, gradients.unit, *moments).to(device, torch.float32))
    return torch.stack(norms) if norms else torch.zeros(0, device=device)


def _second_moments(state: Any, group: Any) -> tuple[torch.Tensor, float, Any, float] | None:
    """v before this step, its decay, 1 minus the decay to the power of its steps then, and eps."""
    squares = next((state[key] for key in KEYS if key in state), None)
    if squares is None:
        return None
    if "betas" not in group:
        return squares, group["alpha"], 1.0, group["eps"]
    decay = group["betas"][1]
    step = state.get("step", 0)
    on_host = not isinstance(step, torch.Tensor) or step.device.type == "cpu"
    steps = (float(step) if on_host else step) + 1
    return squares, decay, 1 - decay**steps, group["eps"]


def _norm(
    value: torch.Tensor, unit: Any, squares: torch.Tensor, decay: float, bias: Any, eps: float
) -> torch.Tensor:
    gradient = (value * unit).abs()
    moment = (decay * squares.abs() + (1 - decay) * gradient * gradient) / bias
    norm: torch.Tensor = torch.linalg.vector_norm(
        gradient / moment.sqrt().clamp_(min=eps), dtype=torch.float32
    )
    return norm
