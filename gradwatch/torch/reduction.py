"""When the gradients of micro-batches are reduced over processes.

    model, accumulate.sync  ->  Reduction;  hold() before a forward pass, release() behind backward

A window needs one reduction, of its sum. DistributedDataParallel keeps a local sum in `.grad`
meanwhile; `fully_shard` keeps gradients that are not sharded, and so holds back only when asked.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import distributed as dist

from gradwatch.policy import Accumulate

__all__ = ["Reduction"]


class Reduction:
    """Of what wraps a model, or parts of it."""

    def __init__(self, model: torch.nn.Module, accumulate: Accumulate | None) -> None:
        sync = None if accumulate is None else accumulate.sync
        replicated, sharded = _wrapped(model) if dist.is_available() else ([], [])
        if accumulate is None or sync == "every":
            replicated = sharded = []
        self._replicated = [weakref.ref(module) for module in replicated]
        self._sharded = [weakref.ref(module) for module in sharded if sync == "boundary"]
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

    def release(self) -> None:
        """What follows is reduced as usual."""
        self._held.close()


def _wrapped(model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    """The modules under DistributedDataParallel, and those under `fully_shard`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    modules = list(model.modules())
    replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return replicated, [module for module in modules if isinstance(module, FSDPModule)]
