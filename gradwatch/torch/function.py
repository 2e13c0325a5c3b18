"""The policy as one call, without a watch: what `torch.nn.utils.clip_grad_norm_` is to a norm."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from gradwatch.backend import act, measure_and_decide
from gradwatch.errors import PolicyError, TrainingStopped
from gradwatch.policy import Policy, StatisticLimit, check_against
from gradwatch.records import Layout, Parameter
from gradwatch.rules.chain import Chain
from gradwatch.rules.guard import SkipHistory, judge
from gradwatch.saying import say
from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.layers import watched_parameters

__all__ = ["clip_grads_"]

Parameters = (
    torch.nn.Module | Iterable[torch.nn.Parameter] | Iterable[tuple[str, torch.nn.Parameter]]
)


@torch.no_grad()
def clip_grads_(parameters: Parameters, policy: Policy) -> torch.Tensor:
    """See `gradwatch.clip_grads_`."""
    if policy.accumulate is not None:
        raise PolicyError(f"{policy.source}: clip_grads_ sees no micro-batches: leave accumulate "
                          "out, or attach a watch")  # fmt: skip
    if learns := [rule.name for rule in policy.clip if isinstance(rule.limit, StatisticLimit)]:
        raise PolicyError(
            f"{policy.source}: clip_grads_ has no history that {learns[0]} could learn from: give "
            "it a number or a schedule, or attach a watch"
        )
    if unknown := [rule.name for rule in policy.clip if rule.measure in ("loss", "update")]:
        raise PolicyError(
            f"{policy.source}: clip_grads_ sees neither loss nor optimizer, which {unknown[0]} "
            "compares: attach a watch"
        )
    tensors, described = _listed(parameters)
    if not tensors:
        return torch.tensor(0.0)
    layout = Layout.of(described, policy.grouping)
    check_against(policy, layout)
    backend = TorchBackend(tensors)
    chain = Chain(policy, layout, backend.xp)
    gradients = backend.gather()
    rules, limits = chain.rules(gradients.present), chain.limits(0)
    _, decision = measure_and_decide(
        backend, gradients, chain, rules, limits, policy.guard, apply=policy.enforcing
    )
    total_norm = torch.as_tensor(decision.total_norm)
    over = [bool(flag) for flag in decision.over]
    verdict, _ = judge(policy.guard, rules, over, float(total_norm), SkipHistory(), 0)
    for rule, is_over in zip(rules, over, strict=True):
        if rule.then == "warn" and is_over:
            say(logging.WARNING, "rule %s is over its limit (total norm %.4g)", rule.name,
                float(total_norm))  # fmt: skip
    if not policy.enforcing:
        return total_norm
    if verdict.stop:
        raise TrainingStopped(
            f"stopped before the update: {verdict.stop}", step=0, reason=verdict.skip or ""
        )
    act(backend, gradients, decision, verdict)
    return total_norm


def _listed(parameters: Parameters) -> tuple[list[torch.nn.Parameter], list[Parameter]]:
    if isinstance(parameters, torch.nn.Module):
        return watched_parameters(parameters, None)
    entries = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for entry in entries:
        tensor = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                "clip_grads_ takes a module, its named_parameters(), tensors or a tensor. "
                f"Received: {type(tensor).__name__}"
            )
    named = [
        entry if isinstance(entry, tuple) else (str(position), entry)
        for position, entry in enumerate(entries)
    ]
    tensors: dict[torch.nn.Parameter, str] = {}
    for name, tensor in named:
        tensors.setdefault(tensor, name)
    described = [Parameter(name=name, shape=tuple(t.shape)) for t, name in tensors.items()]
    return list(tensors), described
