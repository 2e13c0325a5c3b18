"""One table from each process, and from all of them the norms of the whole: one collective a step.

    norms of local tensors, presence, weight, loss, flags  ->  all-gather  ->  of all processes

A row for each kind of norm and one for presence, a column for each parameter of all, and a few
numbers more. Replicas are counted once, by their owner, so that the whole is what one process would
have measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gradwatch.backend import RanksMissing, Word
from gradwatch.torch.shares import Share, missing_ranks

__all__ = ["Exchange", "Whole", "device_for"]

EXTRAS = ("failed", "stopping", "weight", "planned", "loss")
"""What a process adds to its norms, by the names of `Word`."""


# The same under its newer name; the old one warns of it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Whole:
    """What all processes have together."""

    norms: Mapping[float | str, torch.Tensor]
    """By key: [P] norms, float64."""

    present_WP: torch.Tensor
    """[W, P] 1 where the process has a gradient."""

    failed_W: torch.Tensor
    stopping_W: torch.Tensor
    weight_W: torch.Tensor
    planned_W: torch.Tensor
    loss_W: torch.Tensor


class Exchange:
    """The collective of one watch."""

    def __init__(self, share: Share, device: torch.device) -> None:
        """
        Args:
            device: of the tables: what the process group can exchange.
        """
        self._share = share
        self.device = device
        self._num = len(share.parameters)
        self._owned = torch.tensor(share.owned, dtype=torch.float64, device=device)
        self._places = torch.tensor(share.places, dtype=torch.int64, device=device)
        self._steps = 0
        self.joined = False
        """Whether this process has taken part in the collective of the step that is due."""

        self.broken = ""
        """Why no further collective is tried."""

    def __call__(
        self,
        norms: Mapping[float | str, torch.Tensor],
        positions: Sequence[int],
        word: Word,
    ) -> Whole:
        """Joins the collective of this step.

        Args:
            norms: by key (p, or what L2 norms are of) those of the local tensors that are present.
            positions: which of the local tensors those are.

        Raises:
            RanksMissing: it failed, now or before.
        """
        order = list(norms)
        table = self._table(norms, order, positions, word)
        tables = self._gathered(table)
        num = self._num
        rows = tables[:, : (len(order) + 1) * num].view(-1, len(order) + 1, num)
        norms_WKP, present_WP = rows[:, :-1], rows[:, -1]
        whole = {
            key: _combined(norms_WKP[:, k], key if isinstance(key, float) else 2.0)
            for k, key in enumerate(order)
        }
        return Whole(whole, present_WP, *tables[:, -len(EXTRAS) :].unbind(1))

    def numbers(self, value: float) -> list[float]:
        """[W] one number of each process, outside a step.

        Raises:
            RanksMissing: as in a step.
        """
        table = torch.tensor([value], dtype=torch.float64, device=self.device)
        numbers: list[float] = self._gathered(table).view(-1).tolist()
        return numbers

    def join(self, keys: int) -> None:
        """Joins with nothing but the word that this process has failed.

        Args:
            keys: how many kinds of norms the others send.
        """
        if self.broken or self.joined:
            return
        size = (keys + 1) * self._num + len(EXTRAS)
        table = torch.zeros(size, dtype=torch.float64, device=self.device)
        table[-len(EXTRAS)] = 1.0  # failed
        self._gathered(table)

    def _table(
        self,
        norms: Mapping[float | str, torch.Tensor],
        order: Sequence[float | str],
        positions: Sequence[int],
        word: Word,
    ) -> torch.Tensor:
        num, device = self._num, self.device
        rows = torch.zeros(len(order) + 1, num, dtype=torch.float64, device=device)
        everything = len(positions) == len(self._places)
        places, owned = self._places, self._owned
        if not everything:
            chosen = torch.tensor(list(positions), dtype=torch.int64, device=device)
            places, owned = places[chosen], owned[chosen]
        for k, key in enumerate(order):
            values = norms[key].to(device, torch.float64)
            # A replica that is not finite on one process alone is not to go unseen.
            counts = (owned > 0) | ~torch.isfinite(values)
            rows[k, places] = torch.where(counts, values, torch.zeros_like(values))
        rows[-1, places] = 1.0
        numbers = [float(getattr(word, name)) for name in EXTRAS]
        tail = torch.tensor(numbers, dtype=torch.float64)
        return torch.cat([rows.view(-1), tail.to(device, non_blocking=True)])

    def _gathered(self, table: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise RanksMissing(self.broken)
        self._steps += 1
        self.joined = True
        size = self._share.size
        out = torch.empty(size * len(table), dtype=table.dtype, device=table.device)
        try:
            _all_gather(out, table, group=self._share.group)
        except Exception as error:
            missing = missing_ranks(self._share.group, str(self._steps))
            who = f"rank {', '.join(map(str, missing))}" if missing else "a rank"
            self.broken = (
                f"{who} of {self._share.size} did not take part in the exchange of norms: it died, "
                f"came later than the process group waits, or has left ({error})"
            )
            raise RanksMissing(self.broken) from error
        return out.view(size, -1)


def _combined(norms_WP: torch.Tensor, p: float) -> torch.Tensor:
    """[P] the p-norm of the norms of W pieces; scaled, so that no power overflows."""
    largest = norms_WP.amax(0)
    if p == math.inf:
        return largest
    usable = torch.isfinite(largest) & (largest > 0)
    scale = torch.where(usable, largest, torch.ones_like(largest))
    combined: torch.Tensor = scale * torch.linalg.vector_norm(norms_WP / scale, p, dim=0)
    return combined


def device_for(group: Any, device: torch.device) -> torch.device:
    """Where a process group exchanges tensors: on the accelerator, or with gloo on the host."""
    config = dist.distributed_c10d.get_backend_config(group or dist.group.WORLD)
    return device if device.type in str(config) else torch.device("cpu")
