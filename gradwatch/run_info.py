"""What is known of a run when a watch is attached to it."""

from __future__ import annotations

import socket
from typing import Any

from gradwatch.policy import Policy
from gradwatch.records import Layout, RunInfo
from gradwatch.rules.chain import measures_of

__all__ = ["run_info"]


def run_info(model: object, policy: Policy, layout: Layout, **of_run: Any) -> RunInfo:
    """
    Args:
        of_run: the fields of `RunInfo` that neither the model, the policy nor the machine tells.
    """
    return RunInfo(
        layout=layout,
        rules=tuple(rule.name for rule in policy.clip),
        multiplying=tuple(rule.name for rule in policy.clip if rule.then in ("scale", "zero")),
        measures=measures_of(policy),
        mode=policy.effective_mode,
        policy=policy.canonical_yaml(),
        policy_sha256=policy.sha256,
        host=socket.gethostname(),
        model=type(model).__name__,
        **of_run,
    )
