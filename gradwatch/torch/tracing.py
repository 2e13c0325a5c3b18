"""The calls of a forward pass, module by module: what went in and what came out, as flags.

hooks on every module  ->  spans on the device  ->  calls(), read at once
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gradwatch.rules.culprit_forward import Call
from gradwatch.torch.spans import flags_of, spans_of

__all__ = ["Trace", "read"]

MOST_CALLS = 100_000
"""Of one pass; what comes behind them is not kept."""


@dataclass(slots=True)
class _Open:
    module: torch.nn.Module
    entered: int
    inputs: list[torch.Tensor]


@dataclass(slots=True)
class _Done:
    module: str
    entered: int
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Trace:
    """One pass, while it runs."""

    def __init__(self, name_of: Callable[[torch.nn.Module], str | None]) -> None:
        """
        Args:
            name_of: the path of a module; None for one that is not of the model.
        """
        self.done: list[_Done] = []
        self._name_of = name_of
        self._open: list[_Open] = []

    def enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """A call begins; the spans of its inputs."""
        spans = spans_of((args, kwargs))
        self._open.append(_Open(module, len(self.done), spans))
        return spans

    def leave(self, module: torch.nn.Module, outputs: Any) -> None:
        # A call that raised has not left, and its caller may have gone on all the same.
        while self._open and self._open[-1].module is not module:
            self._open.pop()
        if not self._open:
            return
        call, name = self._open.pop(), self._name_of(module)
        if name is not None and len(self.done) < MOST_CALLS:
            self.done.append(_Done(name, call.entered, call.inputs, spans_of(outputs)))


def read(traces: Iterable[Trace]) -> list[list[Call]]:
    """The calls of each trace, in the order in which they ended."""
    found = list(traces)
    done = [call for trace in found for call in trace.done]
    flags = iter(flags_of([spans for call in done for spans in (call.inputs, call.outputs)]))
    return [
        [Call(call.module, next(flags), next(flags), call.entered) for call in trace.done]
        for trace in found
    ]
