"""Whether a model is trained by several processes, what they have to agree on, and what is refused.

model, policy, torch.distributed  ->  Share, or None for one process alone
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from gradwatch.errors import AttachError, PolicyError
from gradwatch.policy import Culprits, Policy
from gradwatch.records import Parameter
from gradwatch.saying import say
from gradwatch.torch.scaling import ScalerFollower
from gradwatch.torch.shares import Share, is_sharded, shared_by, world_size

__all__ = ["culprits_for", "refuse_scaler", "together"]


def together(
    model: torch.nn.Module,
    tensors: Sequence[torch.nn.Parameter],
    described: Sequence[Parameter],
    policy: Policy,
    distributed: bool | None,
    shard_keys: Mapping[str, Hashable] | None,
) -> Share | None:
    """What this process holds of the parameters of all; every process calls it.

    Raises:
        AttachError: parameters are sharded, and there is nobody to share them with; or a process
            did not attach.
        PolicyError: the policy asks for what is not measured across processes.
    """
    sharded = [d.name for t, d in zip(tensors, described, strict=True) if is_sharded(t)]
    if world_size() == 1 or distributed is False:
        if sharded and world_size() > 1:
            raise AttachError(
                f"{sharded[0]} is sharded over several processes, and distributed=False would "
                "measure the part of this one. Leave it out, and attach on every rank"
            )
        return None
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise AttachError(
            "FullyShardedDataParallel leaves each rank a part of its parameters without saying "
            "which, also with use_orig_params=True. Use torch.distributed.fsdp.fully_shard"
        )
    share = shared_by(tensors, described, shard_keys=shard_keys, policy=policy.sha256)
    accumulates = policy.accumulate is not None and policy.mode == "enforce"
    compares_loss = any(rule.measure == "loss" for rule in policy.clip)
    stops = any(detector.then == "stop" for _, detector in policy.detect.kinds())
    agrees = share.is_split or accumulates or compares_loss or stops
    if share.is_split:
        _refuse(policy, share, sharded, len(described))
    return replace(share, agrees=agrees)


def _refuse(policy: Policy, share: Share, sharded: Sequence[str], held: int) -> None:
    for rule in policy.clip:
        if rule.per == "unit":
            raise PolicyError(
                f"{policy.source}: rule {rule.name} is per unit, and {(sharded or ['a part'])[0]} "
                "is split over processes, of which none has all of a unit. Use per: tensor or layer"
            )
        if rule.measure == "update":
            raise PolicyError(
                f"{policy.source}: rule {rule.name} compares updates, which are not measured "
                "of parameters that are split over processes. Use a norm of the gradient"
            )
    if policy.accumulate is not None and held < len(share.parameters) and not sharded:
        raise PolicyError(
            f"{policy.source}: accumulate under pipeline stages is the schedule's, whose "
            "micro-batches are not those of a loop. Leave accumulate out"
        )


def refuse_scaler(share: Share | None, scaler: ScalerFollower | None) -> None:
    """
    Raises:
        AttachError: one process alone would drop a step.
    """
    if share is not None and share.apart and scaler is not None and scaler.enabled:
        raise AttachError(
            f"a GradScaler drops a step where it finds an infinity on its own rank, and "
            f"{share.apart} is not on every rank: the others would take the step, or wait for it. "
            "Train in bfloat16, which needs no scaler"
        )


def culprits_for(policy: Policy, model: torch.nn.Module, share: Share | None) -> Culprits:
    """How far the search for a culprit may go: a pass that needs all processes is not run again."""
    how = policy.detect.culprit
    if how not in ("replay", "always") or share is None:
        return how
    joint = [type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    if share.is_split:
        joint.append("a model that is split over processes")
    if not joint or how == "always":
        return how
    say(
        logging.WARNING,
        "detect.culprit: replay would run %s forward on one process without the others: the "
        "flags of the step are looked at instead", joint[0],
    )  # fmt: skip
    return "flags"
