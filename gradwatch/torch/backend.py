"""The engine's verbs on torch tensors: gather, measure, touch, scale, drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradwatch.backend import Agreed, Word
from gradwatch.records import Float32s
from gradwatch.rules.arrays import Arrays, Vector
from gradwatch.rules.clipping import Rule
from gradwatch.rules.culprit import Clues
from gradwatch.torch.arrays import HostArrays, TorchArrays
from gradwatch.torch.culprit import ClueFinder, SeenStep
from gradwatch.torch.fused import FusedSwitches
from gradwatch.torch.gradients import Gradients, clamp, drop, gather, scale, zero_above
from gradwatch.torch.measure import Buckets, measure, refined, smallest_trusted
from gradwatch.torch.own_gradient import Own, OwnGradient
from gradwatch.torch.plan import ON_HOST, Plan
from gradwatch.torch.ranks import Ranks
from gradwatch.torch.readback import Readback
from gradwatch.torch.sampling import Sampler
from gradwatch.torch.units import scale_units, unit_norms
from gradwatch.torch.updates import update_norms

__all__ = ["TorchBackend"]

CPU = torch.device("cpu")
KEPT = 64
"""Sets of present gradients whose buckets are kept."""

LARGEST = torch.finfo(torch.float32).max


class TorchBackend:
    """Over a fixed list of parameters, on the host or on their one device as the plan says."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer | None = None,
        plan: Plan = ON_HOST,
        readback: Readback | None = None,
        finder: ClueFinder | None = None,
    ) -> None:
        self.agrees = False
        self.reads_host = plan.reads_host
        self.parameters = list(parameters)
        self._optimizer = optimizer
        self._device = CPU if plan.reads_host else parameters[0].device
        self.switches = None if optimizer is None else FusedSwitches(optimizer)
        self._fused = plan.fused
        self._buckets: dict[tuple[object, ...], Buckets] = {}
        self._one_scale = plan.one_scale
        self._sampler: Sampler | None = None
        self.finder = finder
        """What looks for the culprit of a step that is not finite; nobody does where it is None."""

        self.own: OwnGradient | None = None
        """What looks at gradients as a backward pass leaves them."""

        self._own_step = Own()
        self.ranks: Ranks | None = None
        """This process among others; None where it is alone."""

        self._readback = readback
        if readback is None and not plan.reads_host:
            self._readback = Readback(self._device)
        self.xp: Arrays = HostArrays() if plan.reads_host else TorchArrays(self._device)

    def gather(self, factor: float = 1.0) -> Gradients:
        if self.switches is None:
            return gather(self.parameters, factor)
        self.switches.disarm()  # the post hook does not run when a step raises
        if self._fused and self.switches.found_inf is not None:
            self.switches.seed_momentum()
        return gather(self.parameters, factor, self.switches.loss_scale, self.switches.found_inf)

    def measure(self, gradients: Gradients, norm_type: float) -> Vector:
        """[Q] norms; where the host is read float64 where float32 would over- or underflow."""
        buckets = self._buckets_of(gradients, norm_type)
        norms_Q = self._measured(gradients.values, gradients.unit, norm_type, buckets)
        return norms_Q.numpy() if self.reads_host else norms_Q

    def _buckets_of(self, gradients: Gradients, norm_type: float) -> Buckets | None:
        values = gradients.values
        if gradients.coalesced:
            return None  # sparse ones are of another size in each step
        return self._buckets_for((gradients.present,), values, norm_type)

    def _buckets_for(
        self, of: tuple[object, ...], values: Sequence[torch.Tensor], norm_type: float
    ) -> Buckets | None:
        if not values:
            return None
        # A model that is moved or cast has other gradients in the same places.
        key = (*of, norm_type, values[0].dtype, values[0].device)
        buckets = self._buckets.get(key)
        if buckets is None:
            buckets = self._buckets[key] = Buckets.of(values, norm_type)
            if len(self._buckets) > KEPT:
                del self._buckets[next(iter(self._buckets))]
        return buckets

    def _measured(
        self,
        values: Sequence[torch.Tensor],
        unit: float | torch.Tensor,
        norm_type: float,
        buckets: Buckets | None = None,
    ) -> torch.Tensor:
        if not values:
            return torch.zeros(0, device=self._device)
        norms_Q = measure(values, norm_type, self._device, buckets)
        if self.reads_host:
            norms_Q = self._trusted(values, norms_Q, norm_type)
        if isinstance(unit, torch.Tensor):
            return norms_Q * unit.to(self._device)
        return norms_Q if unit == 1.0 else norms_Q * unit

    def _trusted(
        self, values: Sequence[torch.Tensor], norms_Q: torch.Tensor, norm_type: float
    ) -> torch.Tensor:
        total = float(torch.linalg.vector_norm(norms_Q, norm_type))
        if float(norms_Q.min()) >= smallest_trusted(norm_type) and total < math.inf:
            return norms_Q
        norms_Q = refined(values, norms_Q, norm_type)
        # Each norm may fit where their total does not.
        return norms_Q.double() if total == math.inf and bool(norms_Q.isfinite().all()) else norms_Q

    def measure_units(self, gradients: Gradients, rule: Rule) -> Vector:
        """[U] norms; in float64 where float32 overflows and the host is read."""
        values, rows = gradients.values, gradients.rows
        return self._of_units(rule, values, rows, rule.norm_type, gradients.unit)

    def measure_weights(self, gradients: Gradients, rule: Rule) -> Vector:
        weights = self._present(gradients)
        if rule.slices is not None:
            return self._of_units(rule, weights, {}, 2.0, 1.0)
        buckets = self._buckets_for(("weights", gradients.present), weights, 2.0)
        norms_Q = self._measured(weights, 1.0, 2.0, buckets)
        return norms_Q.numpy() if self.reads_host else norms_Q

    def measure_updates(self, gradients: Gradients) -> Vector:
        assert self._optimizer is not None
        norms_Q = update_norms(self._optimizer, self._present(gradients), gradients, self._device)
        return norms_Q.numpy() if self.reads_host else norms_Q

    def sample(self, gradients: Gradients, loss_scale: float) -> None:
        if self._sampler is None:
            self._sampler = Sampler(self.parameters)
        self._sampler.before(gradients, loss_scale)

    def forget_sample(self) -> None:
        if self._sampler is not None:
            self._sampler.forget()

    def sampled(self) -> Any | None:
        found = None if self._sampler is None else self._sampler.after()
        return found.cpu().numpy() if found is not None and self.reads_host else found

    def seen(self) -> SeenStep:
        order = () if self.finder is None else self.finder.order
        self._own_step = Own() if self.own is None else self.own.take(order)
        return SeenStep() if self.finder is None else self.finder.seen(self._own_step.is_bad)

    def was_finite(self, seen: SeenStep) -> None:
        if self.finder is not None:
            self.finder.was_finite(seen)

    def clues(self, seen: SeenStep, *, is_over: bool) -> Clues:
        return Clues() if self.finder is None else self.finder.clues(seen, is_over=is_over)

    def confer(self, step: int, word: bytes) -> Sequence[bytes | None]:
        return () if self.ranks is None else self.ranks.confer(step, word)

    def sample_ranks(self, step: int, scale: float) -> None:
        """What several processes compare, of a step that was handled."""
        if self.ranks is None:
            return
        self.ranks.sampled(step, self._own_step.norm, scale, self._to_host)
        if self.own is not None and self.ranks.samples(step + 1):
            self.own.sample()

    def order(self) -> Sequence[int]:
        """Parameters in the order of a backward pass; none before the first step."""
        return () if self.finder is None else self.finder.order

    def scalar(self, value: float) -> Vector:
        number = torch.tensor(value, dtype=torch.float64, device=self._device)
        return number.numpy() if self.reads_host else number

    def _present(self, gradients: Gradients) -> list[torch.nn.Parameter]:
        pairs = zip(self.parameters, gradients.present, strict=True)
        return [parameter for parameter, present in pairs if present]

    def _of_units(
        self,
        rule: Rule,
        values: Sequence[torch.Tensor],
        rows: Mapping[int, torch.Tensor],
        norm_type: float,
        unit: float | torch.Tensor,
    ) -> Vector:
        assert rule.slices is not None
        measured = []
        for of in rule.slices:
            value, held = values[of.position], rows.get(of.position)
            norms = unit_norms(value, of, norm_type, held)
            if self.reads_host and not bool(norms.isfinite().all()):
                norms = unit_norms(value.double(), of, norm_type, held)
            measured.append(norms.to(self._device))
        norms_U = _in_place(measured, [of.first for of in rule.slices], rule.num_units,
                            self._device)  # fmt: skip
        if not (isinstance(unit, float) and unit == 1.0):
            norms_U = norms_U * (unit.to(self._device) if isinstance(unit, torch.Tensor) else unit)
        return norms_U.numpy() if self.reads_host else norms_U

    def agree(self, gradients: Gradients, norms: dict[float | str, Vector], word: Word) -> Agreed:
        return Agreed(gradients, norms)

    def abandon(self, num_keys: int) -> None:
        pass

    def touch(
        self, gradients: Gradients, rule: Rule, values: Vector, over: Vector, apply: bool
    ) -> Gradients | None:
        if self.reads_host and not bool(over):
            return None
        if apply:
            gradients.about_to_change()
        changed = list(gradients.values)
        chosen = range(len(changed)) if rule.positions is None else rule.positions
        if not apply:
            for i in chosen:
                changed[i] = changed[i].clone()
        given = torch.as_tensor(values)
        if rule.slices is not None:
            self._scale_units(rule, changed, gradients.rows, given)
        else:
            unit = gradients.unit
            unit = unit.to(self._device) if isinstance(unit, torch.Tensor) else unit
            bounds = (given.expand(len(chosen)) / unit).unbind()
            bound = clamp if rule.then == "scale" else zero_above
            bound([changed[i] for i in chosen], bounds)
        return replace(gradients, values=changed)

    def _scale_units(
        self,
        rule: Rule,
        values: Sequence[torch.Tensor],
        rows: Mapping[int, torch.Tensor],
        by_U: torch.Tensor,
    ) -> None:
        assert rule.slices is not None
        for of in rule.slices:
            factors = by_U[of.first : of.first + of.count]
            if not self.reads_host or bool((factors < 1.0).any()):
                scale_units(values[of.position], of, factors, rows.get(of.position))

    @np.errstate(over="ignore")
    def host(self, vector: Vector) -> Float32s:
        host: Float32s = np.asarray(vector, dtype=np.float32)
        return host

    def scale(self, gradients: Gradients, coefs_Q: Vector) -> None:
        coefs_Q = torch.as_tensor(coefs_Q)
        gradients.about_to_change()
        if self._fused and self.switches is not None and self._fits_kernel(gradients, coefs_Q):
            self.switches.arm(divisor=self._divisor(coefs_Q, gradients.factor))
        else:
            coefs_Q = coefs_Q if gradients.factor == 1.0 else coefs_Q * gradients.factor
            scale(gradients.values, coefs_Q, coefs_Q.tolist())

    def _fits_kernel(self, gradients: Gradients, coefs_Q: torch.Tensor) -> bool:
        """Whether one divisor in float32 says it all."""
        low, high = (float(x) for x in torch.aminmax(coefs_Q))
        if not low == high > 0:
            return False
        loss_scale = 1.0 if gradients.loss_scale is None else float(gradients.loss_scale)
        return loss_scale / (low * gradients.factor) < LARGEST

    def drop(self, gradients: Gradients) -> None:
        switches = self.switches
        if self._fused and switches is not None and switches.drops_cleanly():
            switches.arm(skip=torch.ones((), device=gradients.values[0].device))
        else:
            drop(self.parameters)

    def apply(self, gradients: Gradients, coefs_Q: torch.Tensor, skip: torch.Tensor | None) -> None:
        if not gradients.values:
            return
        gradients.about_to_change()
        divisor = None
        if self._fused and self._one_scale:
            divisor = self._divisor(coefs_Q, gradients.factor)
        else:
            scale(gradients.values, coefs_Q * gradients.factor, None)
        if self._fused and self.switches is not None:
            self.switches.arm(divisor=divisor, skip=skip)

    def disarm(self) -> None:
        """Behind the step: the optimizer's attributes as they were."""
        if self.switches is not None:
            self.switches.disarm()

    def _to_host(self, vector: torch.Tensor, then: Callable[[Any], None]) -> None:
        if vector.device.type == "cpu":
            then(vector.numpy())
        elif self._readback is None:
            then(vector.cpu().numpy())
        else:
            self.send(vector, then)

    def send(self, packed: torch.Tensor, what: Any) -> None:
        assert self._readback is not None
        self._readback.send(packed, what)

    def sends(self, value: Any, come: Callable[[Any], None]) -> bool:
        """Whether a number is on an accelerator that is not read; it comes to the host later."""
        if self.reads_host or not isinstance(value, torch.Tensor) or value.device == CPU:
            return False
        self.send(value.detach().reshape(1).float(), come)
        return True

    def arrived(self, *, wait: bool) -> Iterable[tuple[Any, Any]]:
        return () if self._readback is None else self._readback.arrived(wait=wait)

    def _divisor(self, coefs_Q: torch.Tensor, factor: float) -> torch.Tensor:
        device = self.parameters[0].device
        return (1.0 / (coefs_Q[0] * factor)).to(device, torch.float32)


def _in_place(
    parts: Sequence[torch.Tensor], firsts: Sequence[int], count: int, device: torch.device
) -> torch.Tensor:
    """[count] the parts at their places, 0 between them."""
    wide = any(part.dtype == torch.float64 for part in parts)
    dtype = torch.float64 if wide else torch.float32
    if sum(len(part) for part in parts) == count and list(firsts) == sorted(firsts) and parts:
        return torch.cat([part.to(dtype) for part in parts])
    out = torch.zeros(count, dtype=dtype, device=device)
    for part, first in zip(parts, firsts, strict=True):
        out[first : first + len(part)] = part.to(dtype)
    return out
