"""When the gradients of micro-batches are reduced over processes.

    model, accumulate.sync  ->  Reduction;  hold() before a forward pass, release() behind backward

A window needs one reduction, of its sum. DistributedDataParallel keeps a local sum in `.grad`
meanwhile; `fully_shard` keeps gradients that are not sharded, and so holds back only when asked.
All processes divide their losses by the same number, and take as many steps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from gradwatch.accumulation import Window
from gradwatch.backend import RanksMissing
from gradwatch.errors import GradwatchError, PolicyError
from gradwatch.policy import Accumulate

__all__ = ["Reduction"]

UNKNOWN = -1.0
"""Windows of a loader that does not say how long it is."""


class Reduction:
    """Of what wraps a model, or parts of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        accumulate: Accumulate | None,
        ask: Callable[[float], list[float]] | None = None,
    ) -> None:
        """
        Args:
            ask: [W] the numbers of all processes, from the one of this process; None where it is
                alone.

        Raises:
            PolicyError: what is to be held back cannot be.
        """
        sync = None if accumulate is None else accumulate.sync
        replicated, sharded = _wrapped(model) if dist.is_available() else ([], [])
        if accumulate is None or sync == "every":
            replicated = sharded = []
        # Torch itself fails in a first backward pass that such a model does not reduce.
        fixed = [module for module in replicated if module.static_graph]
        if fixed and sync == "boundary":
            raise PolicyError(
                "accumulate.sync: boundary cannot hold back the reduction of "
                "DistributedDataParallel(static_graph=True). Leave static_graph or sync out"
            )
        replicated = [module for module in replicated if not module.static_graph]
        self._replicated = [weakref.ref(module) for module in replicated]
        self._sharded = [weakref.ref(module) for module in sharded if sync == "boundary"]
        self._ask = None if accumulate is None else ask
        self._held = contextlib.ExitStack()
        self.is_held = False
        """Whether gradients of the window that is due are local sums."""

    @property
    def holds_back(self) -> bool:
        """Whether there is anything to hold back."""
        return bool(self._replicated or self._sharded)

    @property
    def keeps_whole(self) -> bool:
        """Whether what is held back is kept outside `.grad`."""
        return bool(self._sharded)

    def hold(self) -> None:
        """The next forward pass is of a micro-batch whose gradients are not reduced yet."""
        self.release()
        for of in self._replicated:
            if (module := of()) is not None:
                self._held.enter_context(module.no_sync())
        for of in self._sharded:
            if (module := of()) is not None:
                module.set_requires_gradient_sync(False, recurse=False)
                self._held.callback(module.set_requires_gradient_sync, True, recurse=False)
        self.is_held = self.holds_back

    @property
    def asks(self) -> bool:
        """Whether there are other processes to be asked."""
        return self._ask is not None

    def mean_weight(self, weight: float) -> float:
        """Of the processes that have one; 0 where nobody has."""
        there = [one for one in self._numbers(weight) if one > 0]
        return sum(there) / len(there) if there else 0.0

    def refuse_other_windows(self, loader: object, window: Window, partial: str) -> None:
        """
        Raises:
            GradwatchError: a process would wait for another one that takes no step.
        """
        windows_W = self._numbers(_windows_of(loader, window, partial))
        known = {int(windows): rank for rank, windows in enumerate(windows_W) if windows != UNKNOWN}
        if len(known) > 1:
            fewest, most = min(known), max(known)
            raise GradwatchError(
                f"rank {known[most]} would take {most} optimizer steps in this loop and rank "
                f"{known[fewest]} {fewest}, for which it would wait. Give each rank as many "
                "batches, e.g. by a DistributedSampler"
            )

    def _numbers(self, number: float) -> list[float]:
        assert self._ask is not None
        try:
            return self._ask(number)
        except RanksMissing as error:
            raise GradwatchError(str(error)) from error

    def release(self) -> None:
        """What follows is reduced as usual."""
        self._held.close()


def _windows_of(loader: object, window: Window, partial: str) -> float:
    """Optimizer steps that a loop over a loader will take, or `UNKNOWN`."""
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:  # also of one whose data set streams
        return UNKNOWN
    return UNKNOWN if window.target else float(window.steps_of(batches, partial=partial))


def _wrapped(model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    """The modules under DistributedDataParallel, and those under `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    modules = list(model.modules())
    replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return replicated, [module for module in modules if isinstance(module, FSDPModule)]
