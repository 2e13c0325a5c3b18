"""What a decision costs: chosen once, when a watch is attached, and said in words.

    optimizer, devices, policy  ->  Plan

On CPU the host reads everything anyway and nothing is touched that need not be. On an accelerator
reading waits for the device, so a decision is applied there unread wherever that is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradwatch.policy import ClipRule, Policy, StatisticLimit, select
from gradwatch.records import Layout
from gradwatch.torch.fused import fits

__all__ = ["ON_HOST", "Plan", "plan_for"]


@dataclass(frozen=True, slots=True)
class Plan:
    reads_host: bool
    """Whether each decision is read before it is applied."""

    fused: bool
    """Whether the optimizer multiplies and drops by itself."""

    one_scale: bool
    """Whether every tensor is multiplied by the same number."""

    on_accelerator: bool
    reason: str = ""
    """Why an accelerator is read; empty where it is not."""

    def __str__(self) -> str:
        if not self.on_accelerator:
            return "decides on the host; applies only what is clipped"
        if self.reads_host:
            return f"reads the accelerator once a step: {self.reason}"
        how = "the fused optimizer applies it" if self.fused else "one multiplication a step"
        return f"decides on the accelerator; {how}; nothing is read in the step"


ON_HOST = Plan(reads_host=True, fused=False, one_scale=True, on_accelerator=False)
"""Of any optimizer on CPU."""


def plan_for(
    policy: Policy,
    layout: Layout,
    optimizer: torch.optim.Optimizer | None,
    parameters: Sequence[torch.Tensor],
) -> Plan:
    """The cheapest plan that does what the policy says."""
    devices = {parameter.device for parameter in parameters}
    on_accelerator = any(device.type != "cpu" for device in devices)
    fused = policy.enforcing and fits(optimizer)
    reason = _why_read(policy, optimizer, devices, fused) if on_accelerator else ""
    return Plan(
        reads_host=bool(reason) or not on_accelerator,
        fused=fused,
        one_scale=_has_one_scale(policy, layout),
        on_accelerator=on_accelerator,
        reason=reason,
    )


def _has_one_scale(policy: Policy, layout: Layout) -> bool:
    touching = ("unit", "element")
    scaling = [r for r in policy.clip if r.then == "scale" and r.per not in touching]
    whole = len(layout.parameters)
    return all(rule.per == "all" and len(select(rule, layout)) == whole for rule in scaling)


def _keeps_everything(rule: ClipRule) -> bool:
    return isinstance(rule.limit, StatisticLimit) and rule.limit.window == "all"


def _why_read(
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    devices: set[torch.device],
    fused: bool,
) -> str:
    """The first reason why the host must know before the update."""
    if len(devices) > 1:
        return "the parameters are on several devices"
    if not policy.enforcing:
        return ""
    if who := policy.who("stop"):
        return f"{who[0]} stops the run"
    if who := policy.who("zero"):
        return f"{who[0]} zeroes, and 0 times NaN is NaN"
    if unbounded := [rule.name for rule in policy.clip if _keeps_everything(rule)]:
        return f"{unbounded[0]} keeps all of its history (window: all), which is on the host"
    if not (who := policy.who("skip")):
        return ""
    if not fused:
        return f"{who[0]} skips, and only a fused optimizer (fused=True) skips by itself"
    assert optimizer is not None
    if any(group.get("dampening") for group in optimizer.param_groups):
        return f"{who[0]} skips, and fused SGD with dampening cannot skip its first step"
    return ""
