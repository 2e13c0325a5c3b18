"""Whose parameter is this? Asked once, of all processes, when a watch is attached.

    local parameters, each with a key of the piece that it is  ->  Share: places among all, owned

Every process tells what it holds. A piece that several hold (a replica) is counted by the first of
them, pieces of one tensor (shards) by each of theirs. No knowledge of process groups is needed:
data, sharded, tensor, pipeline and expert parallel training differ only in who holds what.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gradwatch.errors import AttachError
from gradwatch.records import Parameter
from gradwatch.rules.detect_ranks import Pieces

__all__ = [
    "ATTACH_SECONDS",
    "Share",
    "answer_roll",
    "is_sharded",
    "local",
    "missing_ranks",
    "name_of",
    "shared_by",
    "store_of_processes",
    "world_size",
]

ATTACH_SECONDS = 60.0
"""For which a process waits for the others to attach too."""

WHOLE = "whole"
"""Of a piece: that it is all of a plain tensor."""

_attached = itertools.count()


@dataclass(frozen=True, slots=True)
class Share:
    """What one process holds of the parameters of all."""

    rank: int
    size: int
    group: Any
    parameters: tuple[Parameter, ...]
    """[P] of all processes, in the same order on each of them."""

    places: tuple[int, ...]
    """Of the local parameters among those."""

    owned: tuple[bool, ...]
    """Which of the local ones this process counts."""

    is_split: bool
    """Whether any process lacks a part of what another one has: norms must be added up."""

    pieces: Pieces
    """Of all processes."""

    apart: str = ""
    """A parameter of which not every process has a part, or which is another one on each, where
    there is such a one: what goes wrong with it is not seen by all of them."""

    agrees: bool = False
    """Whether the processes have to exchange anything in a step."""


def world_size(group: Any = None) -> int:
    """Processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; writing to it writes to the tensor."""
    if not is_sharded(tensor):
        return tensor
    part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part


def shared_by(
    tensors: Sequence[torch.Tensor],
    described: Sequence[Parameter],
    group: Any = None,
    shard_keys: Mapping[str, Hashable] | None = None,
    policy: str = "",
) -> Share:
    """Elects who counts what; every process of the group has to call it.

    Args:
        group: the processes that train together; None for all.
        shard_keys: by glob on names, which piece this process has of parameters that have the same
            name and shape on several processes but are different ones, such as experts.
        policy: a hash of what each process does with what is measured.

    Raises:
        AttachError: a process did not attach within a minute, or with another policy, or
            parameters are sums that were never finished.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    _wait_for_everyone(group, rank, size)
    mine = [
        (parameter, _piece(tensor, parameter, shard_keys or {}))
        for tensor, parameter in zip(tensors, described, strict=True)
    ]
    told: list[Any] = [None] * size
    dist.all_gather_object(told, (policy, mine), group=group)
    for other, (theirs, _) in enumerate(told):
        if theirs != told[0][0]:
            raise AttachError(
                f"rank {other} has another policy than rank 0, and they would decide differently. "
                "Pass the same policy on every rank"
            )
    everyone = [held for _, held in told]
    parameters: dict[str, Parameter] = {}
    owners: dict[tuple[str, tuple[Hashable, ...]], int] = {}
    holders: dict[tuple[str, tuple[Hashable, ...]], int] = {}
    for holder, held in enumerate(everyone):
        for parameter, piece in held:
            parameters.setdefault(parameter.name, parameter)
            owners.setdefault((parameter.name, piece), holder)
            holders[parameter.name, piece] = holders.get((parameter.name, piece), 0) + 1
    plain = {name for (name, piece), count in holders.items() if WHOLE in piece and count < size}
    on_ranks = [{parameter.name for parameter, _ in held} for held in everyone]
    apart = (name for name in parameters if name in plain or any(name not in n for n in on_ranks))
    place = {name: i for i, name in enumerate(parameters)}
    number = {piece: i for i, piece in enumerate(holders)}
    pieces = Pieces(
        tuple(tuple(place[one.name] for one, _ in held) for held in everyone),
        tuple(tuple(number[one.name, piece] for one, piece in held) for held in everyone),
    )
    return Share(
        rank=rank,
        size=size,
        group=group,
        parameters=tuple(parameters.values()),
        places=tuple(place[parameter.name] for parameter, _ in mine),
        owned=tuple(owners[parameter.name, piece] == rank for parameter, piece in mine),
        is_split=any(count < size for count in holders.values()),
        apart=next(apart, ""),
        pieces=pieces,
    )


def _piece(
    tensor: torch.Tensor, parameter: Parameter, shard_keys: Mapping[str, Hashable]
) -> tuple[Hashable, ...]:
    """Which part of the parameter a process holds; the same for the same part.

    Raises:
        AttachError: it is a sum that was never finished.
    """
    keys = [key for glob, key in shard_keys.items() if fnmatch.fnmatchcase(parameter.name, glob)]
    if not is_sharded(tensor):
        return (WHOLE, *keys)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise AttachError(
            f"{parameter.name} is a partial sum over its mesh ({placements}). Only parameters that "
            "are sharded or replicated can be watched"
        )
    coordinate = mesh.get_coordinate() or [-1] * len(placements)
    at = tuple((i, coordinate[i]) for i, one in enumerate(placements) if not one.is_replicate())
    return (str(placements), at, *keys)


def _wait_for_everyone(group: Any, rank: int, size: int) -> None:
    """
    Raises:
        AttachError: somebody did not come.
    """
    store = store_of_processes()
    if store is None:
        return
    number, name = next(_attached), name_of(group)
    keys = [f"gradwatch/attach/{name}/{number}/{one}" for one in range(size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timedelta(seconds=ATTACH_SECONDS))
    except Exception as error:
        missing = [str(one) for one, key in enumerate(keys) if not _has(store, key)]
        raise AttachError(
            f"rank {rank} has attached, and rank {', '.join(missing)} of {size} has not within "
            f"{ATTACH_SECONDS:g} seconds. Call gradwatch.attach on every rank, in the same order, "
            "or pass distributed=False to watch this process by itself"
        ) from error


def missing_ranks(group: Any, occasion: str, seconds: float = 5.0) -> list[int]:
    """The processes that do not answer, asked past the process group; [] where nobody can say."""
    store, rank, size = store_of_processes(), dist.get_rank(group), dist.get_world_size(group)
    if store is None:
        return []
    keys = [_alive(group, occasion, one) for one in range(size)]
    try:
        store.set(_roll(group), occasion)
        store.set(keys[rank], "here")
        store.wait(keys, timedelta(seconds=seconds))
    except Exception:
        return [one for one, key in enumerate(keys) if one != rank and not _has(store, key)]
    return []


def answer_roll(group: Any, known: str) -> str:
    """Says that this process lives, if another one asks: it may hang in the same collective.

    Args:
        known: the occasion that was answered last.

    Returns:
        The newest occasion.
    """
    store = store_of_processes()
    if store is None or not store.check([_roll(group)]):
        return known
    occasion: str = store.get(_roll(group)).decode()
    if occasion != known:
        store.set(_alive(group, occasion, dist.get_rank(group)), "here")
    return occasion


def _roll(group: Any) -> str:
    return f"gradwatch/roll/{name_of(group)}"


def _alive(group: Any, occasion: str, rank: int) -> str:
    return f"gradwatch/alive/{name_of(group)}/{occasion}/{rank}"


def _has(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except Exception:  # its host is gone
        return False


def store_of_processes() -> Any:
    """Where the processes have met: a dict over TCP that no collective is needed for."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    try:
        return None if get is None else get()
    except Exception:  # a process group that was made without one
        return None


def name_of(group: Any) -> str:
    return str(getattr(group or dist.group.WORLD, "group_name", "world"))
