"""Least and largest value of whatever a module takes or gives, on its device, read later.

anything  ->  spans_of: [2] float64 for each tensor in it  ->  flags_of: a Flag, read at once
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gradwatch.rules.culprit_forward import Flag, flag_of, worst

__all__ = ["flags_of", "is_opaque", "spans_of", "tensors_in"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.device, torch.dtype)
DEEPEST = 8
"""Levels of containers that are looked into."""


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a tensor, or of a container of them; other objects are not looked into."""
    return (one for one in _leaves(value, DEEPEST, set()) if isinstance(one, torch.Tensor))


def is_opaque(value: Any) -> bool:
    """Whether it holds something that may hold numbers and is not looked into."""
    return any(
        leaf.is_nested if isinstance(leaf, torch.Tensor) else not isinstance(leaf, PLAIN)
        for leaf in _leaves(value, DEEPEST, set())
    )


def _leaves(value: Any, depth: int, entered: set[int]) -> Iterator[Any]:
    """What is in containers, of each of them once, however often it is met."""
    inner = None if isinstance(value, torch.Tensor) else _held(value)
    if inner is None or not depth:
        yield value
    elif id(value) not in entered:
        entered.add(id(value))
        for one in inner:
            yield from _leaves(one, depth - 1, entered)


def _held(value: Any) -> Iterable[Any] | None:
    """What a container holds; None of anything else."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return None


@torch.no_grad()
def spans_of(value: Any) -> list[torch.Tensor]:
    """[2] for each tensor of numbers that may be not finite; NaN where it holds one."""
    return [span for tensor in tensors_in(value) if (span := _span(tensor)) is not None]


def _span(tensor: torch.Tensor) -> torch.Tensor | None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_nested:
        return None
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif torch.finfo(tensor.dtype).bits < 16:
        tensor = tensor.float()
    span = torch.stack(torch.aminmax(tensor.detach()))
    return span.float() if span.device.type == "mps" else span.double()


def flags_of(spans: Sequence[Sequence[torch.Tensor]]) -> list[Flag]:
    """The flag of each group of spans; one read for each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for group in spans:
        for span in group:
            by_device.setdefault(span.device, []).append(span)
    read = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
    return [worst(flag_of(*next(read[s.device])) for s in group) for group in spans]
