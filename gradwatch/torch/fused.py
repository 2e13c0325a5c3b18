"""A fused optimizer's own multiplication and its own way to drop a step.

Fused kernels divide the gradient by `optimizer.grad_scale` as they load it, and return at once
where `optimizer.found_inf` is 1: clipping without a pass of its own, and skipping without asking
the host. Both attributes belong to a loss scaler where there is one, so what is set for one step
is put back behind it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

__all__ = ["FusedSwitches", "fits"]

KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Exactly these: a subclass or any other optimizer may ignore the attributes without a word."""

MISSING = object()


def fits(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimizer multiplies and drops by itself; tried out on 4 elements."""
    if type(optimizer) not in KNOWN or optimizer is None:
        return False
    groups = optimizer.param_groups
    if not groups or not all(group.get("fused") for group in groups):
        return False
    devices = {p.device for group in groups for p in group["params"]}
    return all(device.type == "meta" or _works(optimizer, device) for device in devices)


def _works(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether twice the gradient at a scale of 2 is the same step, and whether one is dropped."""
    known = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in known}
    defaults |= {"lr": 0.5, "fused": True, "weight_decay": 0.0}
    try:
        plain, divided, dropped = (_stepped(optimizer, defaults, device, n) for n in range(3))
    except Exception:
        return False
    return torch.equal(plain, divided) and bool((dropped == 1.0).all()) and bool((plain != 1).any())


def _stepped(
    optimizer: torch.optim.Optimizer, defaults: dict[str, Any], device: torch.device, case: int
) -> torch.Tensor:
    """Ones after one step: as it is, with twice the gradient and a scale of 2, or dropped."""
    parameter = torch.nn.Parameter(torch.ones(4, device=device))
    probe = type(optimizer)([parameter], **defaults)
    parameter.grad = torch.full((4,), 2.0 if case == 1 else 1.0, device=device)
    if case == 1:
        probe.grad_scale = torch.tensor(2.0, device=device)  # type: ignore[attr-defined]
    if case == 2:
        probe.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
        _seed_momentum(probe)
    probe.step()
    return parameter.detach()


class FusedSwitches:
    """Sets the two attributes for one step and puts them back."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._armed: dict[str, tuple[torch.Tensor, Any]] = {}

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """What a loss scaler has the kernel divide by, 0-d; None where it does not."""
        return getattr(self._optimizer, "grad_scale", None)

    @property
    def found_inf(self) -> torch.Tensor | None:
        """1 where a loss scaler drops the step, 0-d; None without one."""
        return getattr(self._optimizer, "found_inf", None)

    def drops_cleanly(self) -> bool:
        """Whether a dropped step leaves the state as it is: a first one would make it."""
        return all(
            self._has_state(group, parameter)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )

    def arm(self, divisor: torch.Tensor | None = None, skip: torch.Tensor | None = None) -> None:
        """For the step that is due.

        Args:
            divisor: 0-d float32, beside the loss scale.
            skip: 0-d; dropped where it is not 0. Exactly 1.0 is what kernels understand.
        """
        self.disarm()
        scale, found_inf = self.loss_scale, self.found_inf
        if divisor is not None:
            self._set("grad_scale", divisor if scale is None else scale * divisor)
        if skip is not None:
            skip = (skip != 0).to(torch.float32)
            self._set("found_inf", skip if found_inf is None else torch.maximum(found_inf, skip))
            self.seed_momentum()

    def seed_momentum(self) -> None:
        """Before a step that may be dropped, be it by a loss scaler."""
        _seed_momentum(self._optimizer)

    def _set(self, name: str, value: torch.Tensor) -> None:
        self._armed[name] = (value, getattr(self._optimizer, name, MISSING))
        setattr(self._optimizer, name, value)

    def disarm(self) -> None:
        """Puts back what was there before `arm`; also after a step that raised."""
        armed, self._armed = self._armed, {}
        for name, (ours, before) in armed.items():
            if getattr(self._optimizer, name, MISSING) is not ours:
                continue  # a loss scaler has set its own since
            if before is not MISSING:
                setattr(self._optimizer, name, before)
            else:
                delattr(self._optimizer, name)

    def _has_state(self, group: dict[str, Any], parameter: torch.Tensor) -> bool:
        state = self._optimizer.state.get(parameter, {})
        if type(self._optimizer) is torch.optim.SGD:
            return not group.get("momentum") or state.get("momentum_buffer") is not None
        return bool(state)


def _seed_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives SGD the buffers of 0 from which its first step makes the gradient, bit for bit.

    Dropped on its first step, fused SGD keeps buffers of unset memory (torch 2.6 to 2.13).
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        if not group.get("momentum") or group.get("dampening"):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
