"""The calls of a forward pass, module by module: what went in and what came out, as flags.

hooks on every module  ->  spans on the device  ->  calls(), read at once
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gradwatch.rules.culprit_forward import Call, Flag, worst
from gradwatch.torch.spans import flags_of, is_opaque, spans_of

__all__ = ["Trace", "known", "read"]

MOST_CALLS = 100_000
"""Of one pass; what comes behind them is not kept."""


@dataclass(slots=True)
class _Open:
    module: torch.nn.Module
    entered: int
    inputs: list[torch.Tensor]
    opaque: bool


@dataclass(slots=True)
class _Done:
    module: str
    entered: int
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    opaque: tuple[bool, bool]
    """Whether inputs and outputs hold what is not looked into."""


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
        self._open.append(_Open(module, len(self.done), spans, is_opaque((args, kwargs))))
        return spans

    def leave(self, module: torch.nn.Module, outputs: Any) -> None:
        # A call that raised has not left, and its caller may have gone on all the same.
        while self._open and self._open[-1].module is not module:
            self._open.pop()
        if not self._open:
            return
        call, name = self._open.pop(), self._name_of(module)
        if name is not None and len(self.done) < MOST_CALLS:
            opaque = call.opaque, is_opaque(outputs)
            self.done.append(_Done(name, call.entered, call.inputs, spans_of(outputs), opaque))


def read(traces: Iterable[Trace]) -> list[list[Call]]:
    """The calls of each trace, in the order in which they ended."""
    found = list(traces)
    done = [call for trace in found for call in trace.done]
    flags = iter(flags_of([spans for call in done for spans in (call.inputs, call.outputs)]))
    return [
        [
            Call(
                call.module,
                known(next(flags), call.opaque[0]),
                known(next(flags), call.opaque[1]),
                call.entered,
            )
            for call in trace.done
        ]
        for trace in found
    ]


def known(flag: Flag, opaque: bool) -> Flag:
    """A flag, where something beside it was not looked into."""
    return worst([flag, Flag.UNKNOWN]) if opaque else flag
