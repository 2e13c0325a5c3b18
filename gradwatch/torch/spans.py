"""Least and largest value of whatever a module takes or gives, on its device, read later.

anything  ->  spans_of: [2] float64 for each tensor in it  ->  flags_of: a Flag, read at once
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gradwatch.rules.culprit_forward import Flag, flag_of, worst

__all__ = ["flags_of", "is_opaque", "spans_of", "tensors_in"]

PLAIN = (bool, int, float, complex, str, bytes, type, torch.device, torch.dtype)
DEEPEST = 8
"""Levels of containers that are looked into."""


def tensors_in(value: Any, depth: int = DEEPEST) -> Iterator[torch.Tensor]:
    """The tensors of a tensor, or of a container of them; other objects are not looked into."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth:
        if isinstance(value, Mapping):
            inner: Any = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        else:
            return
        for one in inner:
            yield from tensors_in(one, depth - 1)


@torch.no_grad()
def spans_of(value: Any) -> list[torch.Tensor]:
    """[2] for each tensor of numbers that may be not finite; NaN where it holds one."""
    return [span for tensor in tensors_in(value) if (span := _span(tensor)) is not None]


def _span(tensor: torch.Tensor) -> torch.Tensor | None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_nested:
        return None
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
        tensor = tensor.values()
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif torch.finfo(tensor.dtype).bits < 16:
        tensor = tensor.float()
    span = torch.stack(torch.aminmax(tensor.detach()))
    return span.float() if span.device.type == "mps" else span.double()


def is_opaque(value: Any, depth: int = DEEPEST) -> bool:
    """Whether it holds something that may hold numbers and is not looked into."""
    if isinstance(value, torch.Tensor):
        return value.is_nested
    if value is None or isinstance(value, PLAIN):
        return False
    if not depth:
        return True
    if isinstance(value, Mapping):
        return any(is_opaque(one, depth - 1) for one in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(is_opaque(one, depth - 1) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return any(is_opaque(getattr(value, one.name, None), depth - 1) for one in fields)
    return True


def flags_of(spans: Sequence[Sequence[torch.Tensor]], *, masks: bool = True) -> list[Flag]:
    """The flag of each group of spans; one read for each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for group in spans:
        for span in group:
            by_device.setdefault(span.device, []).append(span)
    read = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
    return [worst(flag_of(*next(read[s.device]), masks=masks) for s in group) for group in spans]
