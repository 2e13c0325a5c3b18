"""A policy and the settings of a trainer in, a refusal with its mend out where they contradict.

Framework-free: whoever reads a trainer's settings asks here.
"""

from __future__ import annotations

import logging

from gradwatch.errors import TwoClippersError
from gradwatch.policy import Policy
from gradwatch.policy.locating import policy_error
from gradwatch.saying import say

__all__ = ["clips", "refuse_other_windows", "refuse_second_clipper", "warn_of_clipped_norms"]


def clips(policy: Policy) -> bool:
    """Whether rules of it act on norms that a second clipper would have changed."""
    return policy.mode == "enforce" and any(rule.then != "warn" for rule in policy.clip)


def refuse_second_clipper(policy: Policy, setting: str, off: str) -> None:
    """
    Args:
        setting: what clips, as the user wrote it: `TrainingArguments.max_grad_norm=1.0`.
        off: what switches it off: `max_grad_norm=0`.

    Raises:
        TwoClippersError: the policy clips too.
    """
    if not clips(policy):
        return
    names = ", ".join(rule.name for rule in policy.clip if rule.then != "warn")
    raise TwoClippersError(
        f"two clippers: {setting} would clip before the rules of {policy.source} ({names}) see the "
        f"gradient. Set {off} and let the policy clip, or say mode: shadow in the policy to only "
        "observe what it would do."
    )


def warn_of_clipped_norms(setting: str, off: str, why: str) -> None:
    """Says, once a run, that its norms are those that something else has clipped."""
    say(
        logging.WARNING,
        "%s clips before gradwatch can measure (%s): the norms of this run are those after "
        "clipping, and an explosion is not seen. Set %s and let a policy clip to the same limit: "
        "the training is the same, and the norms are those before", setting, why, off,
    )  # fmt: skip


def refuse_other_windows(policy: Policy, setting: str, steps: int | None) -> None:
    """
    Args:
        setting: what accumulates, as the user wrote it: `Trainer(accumulate_grad_batches=4)`.
        steps: the micro-batches of its windows, of which it takes a step once; None where that
            changes while it trains.

    Raises:
        PolicyError: the policy's `accumulate` says otherwise.
    """
    accumulate = policy.accumulate
    if accumulate is None:
        return
    if accumulate.drive == "hook":
        if steps == 1:
            return
        path, said = ("accumulate", "drive"), (
            ": hook makes one step of several calls of step(), and this trainer accumulates by "
            f"itself and calls it once a window ({setting}). {_mend(steps)}"
        )  # fmt: skip
    elif accumulate.steps == steps:
        return
    else:
        path, said = ("accumulate", "steps"), (
            f" must be the trainer's own under drive: loop ({setting}). "
            f"Received: {accumulate.written()['steps']}. {_mend(steps)}"
        )  # fmt: skip
    raise policy_error(policy.source, [policy.origin.mistake(path, said)])


def _mend(steps: int | None) -> str:
    counted = "Leave accumulate: out, and the windows are counted as they come"
    if steps is None or steps == 1:
        return counted
    return f"Write accumulate: {{steps: {steps}, drive: loop}}, or leave it out"
