"""The engine's verbs where several processes hold the parameters together.

    local norms  ->  exchange: one collective  ->  norms of all P parameters  ->  decision on each
    process alike  ->  the coefs of the local ones

Each process measures, scales and drops what it holds, and decides over what all hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradwatch.backend import Agreed, RanksFailed, RanksMissing, Word
from gradwatch.rules.arrays import Vector
from gradwatch.rules.clipping import LOSS, Rule
from gradwatch.rules.culprit import Clues
from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.culprit import SeenStep
from gradwatch.torch.exchange import Exchange, device_for
from gradwatch.torch.gradients import Gradients
from gradwatch.torch.plan import Plan
from gradwatch.torch.readback import Readback
from gradwatch.torch.sampling import Sampler
from gradwatch.torch.shares import Share, local

__all__ = ["SharedBackend"]

LAG = 2
"""Steps after which each process reads a decision of an accelerator: the same on all of them."""


class SharedBackend(TorchBackend):
    """One process of several."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        share: Share,
        readback: Readback | None = None,
    ) -> None:
        if readback is None and not plan.reads_host:
            readback = Readback(parameters[0].device, lag=LAG)
        super().__init__(parameters, optimizer, plan, readback)
        self.agrees = True
        self._share = share
        self._exchange = Exchange(share, device_for(share.group, parameters[0].device))
        self._everywhere = bytes([1]) * len(share.parameters)
        self._places = np.array(share.places, dtype=np.intp)

    def seen(self) -> SeenStep:
        self._exchange.joined = False  # the first that is asked in a step
        return super().seen()

    def gather(self, factor: float = 1.0) -> Gradients:
        return replace(super().gather(1.0), everywhere=self._everywhere)

    def agree(self, gradients: Gradients, norms: dict[float | str, Vector], word: Word) -> Agreed:
        sent = {key: torch.as_tensor(values) for key, values in norms.items() if key != LOSS}
        whole = self._exchange(sent, self._here(gradients), word)
        failed = whole.failed_W != 0
        if self._exchange.device.type == "cpu" and bool(failed.any()):
            ranks = ", ".join(str(int(rank)) for rank in failed.nonzero())
            raise RanksFailed(f"rank {ranks} could not measure or apply: nobody decides this step")
        factor: Any = _factor(whole.weight_W, whole.planned_W)
        failed = failed | torch.isnan(factor)
        if self._exchange.device.type == "cpu" and bool(failed.any()):
            raise RanksMissing(
                "ranks divide the losses of a window by different numbers "
                f"({', '.join(f'{planned:g}' for planned in whole.planned_W.tolist())}), so that "
                "their sum is no mean. Load the same state on every rank, at the same step"
            )
        agreed: dict[float | str, Vector] = {
            key: values * factor if isinstance(key, float) else values
            for key, values in whole.norms.items()
        }
        # Unread, a step that a process could not measure is one that is not finite.
        agreed[2.0] = torch.where(failed.any(), torch.nan, agreed[2.0])
        if LOSS in norms:
            agreed[LOSS] = whole.loss_W.mean()
        if not self.reads_host:
            agreed = {key: values.to(self._device) for key, values in agreed.items()}
            stopping = whole.stopping_W.amax().to(self._device)
            return Agreed(replace(gradients, factor=factor.to(self._device)), agreed, stopping)
        agreed = {key: values.cpu().numpy() for key, values in agreed.items()}
        gradients = replace(gradients, factor=float(factor))
        return Agreed(gradients, agreed, bool(whole.stopping_W.any()))

    def numbers(self, value: float) -> list[float]:
        """[W] one number of each process, outside a step.

        Raises:
            RanksMissing: somebody did not come.
        """
        return self._exchange.numbers(value)

    def abandon(self, num_keys: int) -> None:
        self._exchange.join(num_keys)

    def touch(
        self, gradients: Gradients, rule: Rule, values: Vector, over: Vector, apply: bool
    ) -> Gradients | None:
        chosen = range(len(self._everywhere)) if rule.positions is None else rule.positions
        row = {place: i for i, place in enumerate(chosen)}
        here = [(q, row[p]) for q, p in enumerate(self._places_of(gradients)) if int(p) in row]
        bounds = torch.as_tensor(values).expand(len(chosen))[[i for _, i in here]]
        ours = replace(rule, positions=tuple(q for q, _ in here))
        return super().touch(gradients, ours, bounds, over, apply)

    def scale(self, gradients: Gradients, coefs_Q: Vector) -> None:
        if gradients.values:
            super().scale(gradients, self._ours(gradients, coefs_Q))

    def drop(self, gradients: Gradients) -> None:
        if gradients.values:
            super().drop(gradients)

    def apply(self, gradients: Gradients, coefs_Q: torch.Tensor, skip: torch.Tensor | None) -> None:
        super().apply(gradients, self._ours(gradients, coefs_Q), skip)

    def sample(self, gradients: Gradients, loss_scale: float) -> None:
        weights = [local(parameter) for parameter in self.parameters]
        if self._sampler is None:
            self._sampler = Sampler(weights)
        self._sampler.of(weights)
        super().sample(gradients, loss_scale)

    def sampled(self) -> Any | None:
        found = super().sampled()
        if found is None:
            return None
        if isinstance(found, np.ndarray):
            wide = np.full((len(found), len(self._everywhere)), np.nan, dtype=found.dtype)
            wide[:, self._places] = found
            return wide
        spread = found.new_full((len(found), len(self._everywhere)), float("nan"))
        spread[:, torch.from_numpy(self._places).to(found.device)] = found
        return spread

    def clues(self, seen: SeenStep, *, is_over: bool) -> Clues:
        found = super().clues(seen, is_over=is_over)
        return replace(found, order=[int(self._places[i]) for i in found.order])

    def order(self) -> Sequence[int]:
        return [int(self._places[i]) for i in super().order()]

    def _present(self, gradients: Gradients) -> list[Any]:
        return [local(parameter) for parameter in super()._present(gradients)]

    def _here(self, gradients: Gradients) -> list[int]:
        """Which of the local parameters have a gradient."""
        return [i for i, there in enumerate(gradients.present) if there]

    def _places_of(self, gradients: Gradients) -> Any:
        return self._places[self._here(gradients)]

    def _ours(self, gradients: Gradients, coefs_P: Vector) -> torch.Tensor:
        places = torch.from_numpy(self._places_of(gradients))
        coefs = torch.as_tensor(coefs_P)
        return coefs[places.to(coefs.device)]


def _factor(weight_W: torch.Tensor, planned_W: torch.Tensor) -> torch.Tensor:
    """R N* over the sum of the weights: what the average over R processes is multiplied by.

    1 where each process has weighed its own already; NaN where they have not the same N*.
    """
    total, planned = weight_W.sum(), planned_W.max()
    differs = (weight_W > 0) & ((planned_W - planned).abs() > 1e-9 * planned)
    factor = torch.where(differs.any(), torch.nan, planned * len(weight_W) / total)
    is_weighed = (planned_W == weight_W).all()
    return torch.where(is_weighed | (total <= 0), torch.ones_like(factor), factor)
