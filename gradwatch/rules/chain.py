"""A policy and a layout in, rules ready to run out.

    policy.clip, layout  ->  Chain;  Chain.rules(present) -> K rules over the Q present tensors

Parameters come and go (frozen, unused in this step), so the rules are resolved once for each set
of present tensors and kept. Units are numbered over the whole layout and do not move.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch.policy import ClipRule, Policy, Schedule, StatisticLimit, select
from gradwatch.records import Bools, Indices, Layout
from gradwatch.rules.arrays import NUMBERS, NUMPY, Arrays, Vector
from gradwatch.rules.clipping import Decision, Limit, Rule
from gradwatch.rules.limits import limit_at
from gradwatch.rules.statistics import Bounds, State, begun, bounds, goal, learned

__all__ = ["Chain"]

KEPT = 64
"""Sets of present tensors whose rules are kept; a mixture of experts has many."""


@dataclass(slots=True)
class _Learning:
    """A statistic limit, its history, and what it said of the step that is due."""

    statistic: StatisticLimit
    num_units: int
    xp: Any
    state: State
    found: Bounds | None = None

    @classmethod
    def begun(cls, statistic: StatisticLimit, num_units: int, xp: Any) -> _Learning:
        xp = NUMBERS if num_units == 1 and xp is NUMPY else xp
        return cls(statistic, num_units, xp, begun(statistic, num_units, xp))

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """Not a word of what divides by 0 in units without a history."""
        return np.errstate(all="ignore") if self.xp is NUMPY else contextlib.nullcontext()


class Chain:
    """The clip rules of a policy over one layout."""

    def __init__(
        self, policy: Policy, layout: Layout, xp: Arrays, statistics_xp: Arrays | None = None
    ) -> None:
        """
        Args:
            statistics_xp: the library that histories are kept in, NumPy where the host knows the
                norms: on short vectors it is several times faster than a tensor library.
        """
        self._clip = policy.clip
        self._statistics = {
            k: _Learning.begun(rule.limit, num_units, statistics_xp or xp)
            for k, rule in enumerate(policy.clip)
            if isinstance(rule.limit, StatisticLimit)
            for num_units in (_units(rule, layout)[1],)
        }
        self._xp = xp
        self._layout = layout
        self._selected = [select(rule, layout) for rule in policy.clip]
        self.norm_types = tuple({2.0: None, **{_measure(rule)[0]: None for rule in policy.clip}})
        """Every p whose p-norms the rules compare; 2 comes first, since it is always measured."""

        self._points = [_points(rule) for rule in policy.clip]
        self._by_present: OrderedDict[bytes, tuple[Rule, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clip)

    def limits(self, step: int) -> list[float | Limit]:
        """[K] the limits in force at an optimizer step."""
        return [
            self._learnt(k) if points is None else limit_at(points, step)
            for k, points in enumerate(self._points)
        ]

    def _learnt(self, k: int) -> Limit:
        learning, xp = self._statistics[k], self._xp
        with learning.quiet():
            found = bounds(learning.statistic, learning.state, learning.xp)
        learning.found = found
        if learning.statistic.to == "limit" or learning.statistic.quantile is not None:
            return Limit(found.limit_U if learning.xp is NUMBERS else xp.doubles(found.limit_U))
        here = Bounds(*(xp.doubles(v) for v in (found.limit_U, found.mu_U, found.sigma_U)))

        def to(norms_U: Vector) -> Vector:
            return goal(learning.statistic, here, xp.to_doubles(norms_U), xp)

        return Limit(here.limit_U, to)

    def learn(self, decision: Decision, usable: Any) -> None:
        """Takes a step into the histories; their limits before it are those of `limits`.

        Args:
            usable: 0-d, whether its whole gradient is finite.
        """
        for k, learning in self._statistics.items():
            if learning.found is None:
                continue
            xp = learning.xp
            units_U = xp.to_doubles(decision.units[k])
            if learning.num_units == 1 and xp is not NUMBERS:
                units_U = units_U.reshape(1)
            with learning.quiet():
                learning.state = learned(
                    learning.statistic, learning.state, learning.found, units_U, usable, xp
                )
            learning.found = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By rule: the names of its units, and its history as NumPy arrays."""
        return {
            self._clip[k].name: {
                "units": self._unit_names(self._clip[k]),
                **{name: np.array(values) for name, values in self._on_host(learning).items()},
            }
            for k, learning in self._statistics.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Goes on with the histories of a `state_dict`, by the names of rules and units.

        Returns:
            The names of the rules that begin anew: they were not saved, or learn in another way.
        """
        anew = []
        for k, learning in self._statistics.items():
            rule, arrays = self._clip[k], self._on_host(learning)
            saved = state.get(rule.name)
            if saved is None or not _fits(learning.statistic, saved, arrays):
                anew.append(rule.name)
                continue
            rows = {name: i for i, name in enumerate(saved["units"])}
            width = np.asarray(saved["ring"]).shape[-1]
            arrays["ring"] = np.zeros((learning.num_units, width))
            for unit, name in enumerate(self._unit_names(rule)):
                if name in rows:
                    for key, values in arrays.items():
                        values[unit] = np.asarray(saved[key])[rows[name]]
            ring = learning.xp.ring(arrays.pop("ring"))
            vectors = {name: learning.xp.doubles(values) for name, values in arrays.items()}
            learning.state = State.of({**vectors, "ring": ring})
        return anew

    def _on_host(self, learning: _Learning) -> dict[str, Any]:
        arrays = {
            name: np.array(_host(values), dtype=np.float64)
            for name, values in learning.state.arrays().items()
        }
        ring = arrays.pop("ring").reshape(learning.num_units, -1)
        return {name: values.reshape(-1) for name, values in arrays.items()} | {"ring": ring}

    def _unit_names(self, rule: ClipRule) -> list[str]:
        if rule.per == "layer":
            return list(self._layout.layers)
        if rule.per == "tensor":
            return [parameter.name for parameter in self._layout.parameters]
        if rule.per == "group":
            return [str(group) for group in range(_units(rule, self._layout)[1])]
        return [rule.per]

    def rules(self, present: bytes) -> tuple[Rule, ...]:
        """The K rules over the tensors that are present ([P] one byte each)."""
        rules = self._by_present.get(present)
        if rules is None:
            rules = self._resolve(np.frombuffer(present, dtype=np.bool_))
            self._by_present[present] = rules
            if len(self._by_present) > KEPT:
                self._by_present.popitem(last=False)
        return rules

    def _resolve(self, present_P: Bools) -> tuple[Rule, ...]:
        position_P = np.cumsum(present_P) - 1
        rules = []
        for rule, selected in zip(self._clip, self._selected, strict=True):
            chosen = selected[present_P[selected]]
            units, num_units = _units(rule, self._layout)
            everything = len(chosen) == int(present_P.sum())
            norm_type, is_rms = _measure(rule)
            rules.append(
                Rule(
                    name=rule.name,
                    then=rule.then,
                    eps=rule.eps,
                    norm_type=norm_type,
                    per_element=rule.per == "element",
                    root_size_U=self._root_sizes(chosen, units, num_units) if is_rms else None,
                    tensors=None if everything else self._xp.indices(position_P[chosen]),
                    positions=None if everything else tuple(position_P[chosen].tolist()),
                    unit_of=None if units is None else self._xp.indices(units[chosen]),
                    num_units=num_units,
                )
            )
        return tuple(rules)

    def _root_sizes(self, chosen: Indices, units: Indices | None, num_units: int) -> Vector:
        """[U] the square root of the number of elements of each unit, at least 1."""
        sizes = np.array([p.num_elements for p in self._layout.parameters], dtype=np.float64)
        unit_of = np.zeros(len(chosen), dtype=np.intp) if units is None else units[chosen]
        sizes_U = np.bincount(unit_of, sizes[chosen], minlength=num_units)
        return self._xp.floats(np.sqrt(np.maximum(sizes_U, 1.0)))


def _measure(rule: ClipRule) -> tuple[float, bool]:
    """The p of the p-norm that a rule compares, and whether it is divided by the root of a size."""
    if rule.per == "element":
        return math.inf, False  # the norm of one element is its absolute value, whatever p
    if rule.measure == "rms":
        return 2.0, True
    return float(rule.measure.removeprefix("l")), False


def _units(rule: ClipRule, layout: Layout) -> tuple[Indices | None, int]:
    """[P] the unit of each parameter, and how many there are; None for one unit of all."""
    if rule.per in ("all", "element"):
        return None, 1
    if rule.per == "layer":
        return layout.layer_of_P, len(layout.layers)
    if rule.per == "group":
        groups = np.array([parameter.group for parameter in layout.parameters], dtype=np.intp)
        return groups, int(groups.max()) + 1
    return np.arange(len(layout.parameters), dtype=np.intp), len(layout.parameters)


def _points(rule: ClipRule) -> tuple[tuple[int, float], ...] | None:
    """The limit by step; None for one that is learnt."""
    if isinstance(rule.limit, Schedule):
        return rule.limit.points
    return None if isinstance(rule.limit, StatisticLimit) else ((0, rule.limit),)


def _fits(statistic: StatisticLimit, saved: Mapping[str, Any], arrays: Mapping[str, Any]) -> bool:
    """Whether a saved history has the shape of one that this rule keeps."""
    if set(saved) != {"units", *arrays}:
        return False
    width = np.asarray(saved["ring"]).shape[-1]
    return statistic.window == "all" or width == arrays["ring"].shape[-1]


def _host(values: Any) -> Any:
    return values.cpu().numpy() if hasattr(values, "cpu") else values
