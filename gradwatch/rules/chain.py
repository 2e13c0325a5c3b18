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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradwatch.policy import ClipRule, Policy, Schedule, StatisticLimit, select
from gradwatch.records import Bools, Indices, Layout
from gradwatch.rules.arrays import NUMBERS, NUMPY, Arrays, Vector
from gradwatch.rules.clipping import LOSS, UPDATE, WEIGHT, Decision, Limit, Rule, UnitSlice
from gradwatch.rules.limits import limit_at
from gradwatch.rules.statistics import (
    Bounds,
    State,
    begun,
    begun_again,
    bounds,
    goal,
    learned,
)

__all__ = ["Chain", "measures_of"]

KEPT = 64
"""Sets of present tensors whose rules are kept; a mixture of experts has many."""


@dataclass(slots=True)
class _Learning:
    """A statistic limit, its history, and what it said of the step that is due."""

    statistic: StatisticLimit
    num_units: int
    xp: Any
    state: State
    signed: bool = False
    """Whether it learns from a loss."""

    found: Bounds | None = None

    @classmethod
    def begun(cls, rule: ClipRule, num_units: int, xp: Any) -> _Learning:
        assert isinstance(rule.limit, StatisticLimit)
        xp = NUMBERS if num_units == 1 and xp is NUMPY else xp
        state = begun(rule.limit, num_units, xp)
        return cls(rule.limit, num_units, xp, state, signed=rule.measure == LOSS)

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
            k: _Learning.begun(rule, num_units, statistics_xp or xp)
            for k, rule in enumerate(policy.clip)
            if isinstance(rule.limit, StatisticLimit)
            for num_units in (_units(rule, layout)[1],)
        }
        self._xp = xp
        self._statistics_xp = statistics_xp
        self._layout = layout
        self._selected = [select(rule, layout) for rule in policy.clip]
        keys = {2.0: None} | dict.fromkeys(_key(rule) for rule in policy.clip)
        self.norm_types = tuple(key for key in keys if isinstance(key, float))
        """Every p whose p-norms the rules compare; 2 comes first, since it is always measured."""

        self.compares_loss = LOSS in keys
        self.compares_updates = UPDATE in keys
        self.measures = measures_of(policy)
        self._points = [_points(rule) for rule in policy.clip]
        self._by_present: OrderedDict[bytes, tuple[Rule, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clip)

    @property
    def num_keys(self) -> int:
        """Kinds of norms of a tensor that processes exchange: of gradients, updates and weights."""
        weighs = any(rule.measure == WEIGHT and rule.per != "unit" for rule in self._clip)
        return len(self.norm_types) + self.compares_updates + weighs

    def limits(self, step: int) -> list[float | Limit]:
        """[K] the limits in force at an optimizer step."""
        return [
            self._learnt(k) if points is None else limit_at(points, step)
            for k, points in enumerate(self._points)
        ]

    def _learnt(self, k: int) -> Limit:
        learning, xp = self._statistics[k], self._xp
        with learning.quiet():
            found = bounds(learning.statistic, learning.state, learning.xp, signed=learning.signed)
        learning.found = found
        if learning.statistic.to == "limit" or learning.statistic.quantile is not None:
            return Limit(found.limit_U if learning.xp is NUMBERS else xp.doubles(found.limit_U))
        limit_U, mu_U, sigma_U = (xp.doubles(v) for v in (found.limit_U, found.mu_U, found.sigma_U))
        known_U = found.known_U
        known_U = np.bool_(known_U) if isinstance(known_U, bool) else known_U
        here = Bounds(limit_U, mu_U, sigma_U, known_U)

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
                    learning.statistic, learning.state, learning.found, units_U, usable, xp,
                    signed=learning.signed,
                )  # fmt: skip
            learning.found = None

    @property
    def histories(self) -> dict[int, State]:
        """By rule. Where decisions are a graph they are variables, set when it is traced."""
        return {k: learning.state for k, learning in self._statistics.items()}

    @histories.setter
    def histories(self, states: Mapping[int, State]) -> None:
        for k, learning in self._statistics.items():
            learning.state, learning.found = states[k], None

    def begin_again(self, growth: float) -> None:
        """Something changes by intention that may move the norms, such as the micro-batches of a
        step: histories begin anew, and the limits from before hold until they are long enough.

        Args:
            growth: by how much the level may grow.
        """
        for learning in self._statistics.values():
            with learning.quiet():
                found = bounds(
                    learning.statistic, learning.state, learning.xp, signed=learning.signed
                )
                growing = 1.0 if learning.signed else growth
                learning.state = begun_again(
                    learning.statistic, learning.state, found, growing, learning.xp
                )

    def changed(self, policy: Policy) -> tuple[Chain, list[str]]:
        """The chain of the same rules with other numbers, which goes on with these histories.

        Returns:
            It, and the names of rules that begin anew: they keep their history in another shape.
        """
        new = Chain(policy, self._layout, self._xp, self._statistics_xp)
        anew = new.load_state_dict(self.state_dict())
        for k, learning in new._statistics.items():
            if learning.statistic.until != self._statistics[k].statistic.until:
                fresh = begun(learning.statistic, learning.num_units, learning.xp)
                learning.state = replace(learning.state, until_U=fresh.until_U)
        return new, anew

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
        if rule.per == "unit":
            return [
                f"{parameter.name}[{unit}]"
                for parameter in self._layout.parameters
                for unit in range(parameter.num_units)
            ]
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
            slices, tensor_of_U = None, None
            if rule.per == "unit":
                slices, tensor_of_U = self._slices(chosen, position_P, num_units)
            elif units is not None:
                tensor_of_U = units[chosen]
            rules.append(
                Rule(
                    name=rule.name,
                    then=rule.then,
                    eps=rule.eps,
                    key=_key(rule),
                    norm_type=_norm_type(rule),
                    per_element=rule.per == "element",
                    slices=slices,
                    root_size_U=self._root_sizes(rule, chosen, units, num_units),
                    floor=rule.floor or 0.0,
                    tensors=None if everything else self._xp.indices(position_P[chosen]),
                    positions=None if everything else tuple(position_P[chosen].tolist()),
                    unit_of=None if tensor_of_U is None else self._xp.indices(tensor_of_U),
                    num_units=num_units,
                )
            )
        return tuple(rules)

    def _slices(
        self, chosen: Indices, position_P: Indices, num_units: int
    ) -> tuple[tuple[UnitSlice, ...], Indices]:
        """The output units of the chosen tensors among those of all, and [U] whose each one is."""
        parameters = self._layout.parameters
        ends = np.cumsum([parameter.num_units for parameter in parameters])
        tensor_of_U = np.zeros(num_units, dtype=np.intp)
        slices = []
        for index in chosen:
            parameter, position = parameters[index], int(position_P[index])
            first = int(ends[index]) - parameter.num_units
            tensor_of_U[first : first + parameter.num_units] = position
            slices.append(
                UnitSlice(position, first, parameter.num_units, parameter.unit_axis,
                          parameter.unit_groups)
            )  # fmt: skip
        return tuple(slices), tensor_of_U

    def _root_sizes(
        self, rule: ClipRule, chosen: Indices, units: Indices | None, num_units: int
    ) -> Vector | None:
        """[U] the square root of the number of elements of each unit, at least 1."""
        if rule.per == "element" or rule.measure not in ("rms", UPDATE):
            return None
        parameters = self._layout.parameters
        if rule.per == "unit":
            sizes_U = np.repeat(
                [p.num_elements / max(1, p.num_units) for p in parameters],
                [p.num_units for p in parameters],
            )
        else:
            sizes = np.array([p.num_elements for p in parameters], dtype=np.float64)
            unit_of = np.zeros(len(chosen), dtype=np.intp) if units is None else units[chosen]
            sizes_U = np.bincount(unit_of, sizes[chosen], minlength=num_units)
        return self._xp.floats(np.sqrt(np.maximum(sizes_U, 1.0)))


def measures_of(policy: Policy) -> tuple[str, ...]:
    """What is recorded of each tensor beside its L2 norm: what the rules compare."""
    found = []
    for rule in policy.clip:
        if rule.per == "unit":
            found.append(f"unit:{rule.name}")
        elif rule.per == "element":
            found.append("linf")
        elif rule.measure in (WEIGHT, UPDATE):
            found.append(rule.measure)
        elif _norm_type(rule) != 2.0:
            found.append(f"l{_norm_type(rule):g}")
    return tuple(dict.fromkeys(found))


def _key(rule: ClipRule) -> float | str:
    """Which norms a rule compares."""
    if rule.per == "unit":
        return f"units of {rule.name}"
    return rule.measure if rule.measure in (UPDATE, LOSS) else _norm_type(rule)


def _norm_type(rule: ClipRule) -> float:
    """The p of the p-norm that a rule compares."""
    if rule.per == "element":
        return math.inf  # the norm of one element is its absolute value, whatever p
    is_norm = rule.measure not in ("rms", WEIGHT, UPDATE, LOSS)
    return float(rule.measure.removeprefix("l")) if is_norm else 2.0


def _units(rule: ClipRule, layout: Layout) -> tuple[Indices | None, int]:
    """[P] the unit of each parameter, and how many there are; None for one unit of all."""
    if rule.per in ("all", "element"):
        return None, 1
    if rule.per == "layer":
        return layout.layer_of_P, len(layout.layers)
    if rule.per == "unit":
        return None, sum(parameter.num_units for parameter in layout.parameters)
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
