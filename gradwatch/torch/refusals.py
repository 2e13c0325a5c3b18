"""What a policy asks for and this optimizer or loop cannot give: refused before the first step."""

from __future__ import annotations

import logging

import torch

from gradwatch.errors import AttachError, PolicyError
from gradwatch.policy import Policy, SampleTarget
from gradwatch.policy.locating import policy_error
from gradwatch.saying import say
from gradwatch.torch.updates import has_second_moments

__all__ = ["accumulates_for_the_loop", "is_captured", "refuse_to_enforce", "refuse_unknown_updates"]


def refuse_to_enforce(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        AttachError: this optimizer can be observed only.
    """
    if policy.enforcing and isinstance(optimizer, torch.optim.LBFGS):
        raise AttachError(
            "LBFGS compares gradients along a line search, and changing them would break it. "
            "Attach without a policy, with mode: shadow, or use another optimizer."
        )


def refuse_unknown_updates(policy: Policy, optimizer: torch.optim.Optimizer | None) -> None:
    """
    Raises:
        PolicyError: a rule compares updates that this optimizer does not scale by second moments.
    """
    rules = [rule for rule in policy.clip if rule.measure == "update"]
    if rules and (optimizer is None or not has_second_moments(optimizer)):
        kind = "none" if optimizer is None else type(optimizer).__name__
        mistake = rules[0].origin.mistake(
            ("measure",), ": update needs an optimizer with second moments, such as Adam, AdamW or "
            f"RMSprop. Received: {kind}",
        )  # fmt: skip
        raise policy_error(rules[0].origin.source, [mistake])


def is_captured(device: torch.device, *, enforcing: bool) -> bool:
    """Whether the step that is due goes into a CUDA graph, whose replays run no hook.

    Raises:
        PolicyError: the policy would hold at none of them.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return False
    said = (
        "this optimizer step is being captured in a CUDA graph, and no hook runs when a graph is "
        "replayed: it would be neither measured nor clipped. Capture forward and backward alone, "
        "and call optimizer.step() behind the replay"
    )
    if enforcing:
        raise PolicyError(said)
    say(logging.WARNING, "%s", said)
    return True


def accumulates_for_the_loop(policy: Policy) -> bool:
    """
    Raises:
        PolicyError: the weights that it asks for cannot be known.
    """
    accumulate = policy.accumulate
    if accumulate is None:
        return False
    if accumulate.drive == "loop" and accumulate.sync is not None:
        raise PolicyError(
            f"{policy.source}: accumulate.sync says when gradients are reduced, which is the "
            "loop's under drive: loop. Leave it out, or use watch.micro_batches with drive: hook"
        )
    if accumulate.drive == "loop" and isinstance(accumulate.steps, SampleTarget):
        raise PolicyError(
            f"{policy.source}: accumulate.steps: {{target: ...}} counts samples, which drive: loop "
            "does not see. Use watch.micro_batches with drive: hook"
        )
    if accumulate.drive == "loop" and accumulate.weigh == "weight":
        raise PolicyError(
            f"{policy.source}: accumulate.weigh: weight needs the weight of each loss, which "
            "drive: loop does not see. Use watch.micro_batches with drive: hook"
        )
    return accumulate.drive == "hook" and policy.mode == "enforce"
