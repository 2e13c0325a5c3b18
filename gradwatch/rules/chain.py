"""A policy and a layout in, rules ready to run out.

    policy.clip, layout  ->  Chain;  Chain.rules(present) -> K rules over the Q present tensors

Parameters come and go (frozen, unused in this step), so the rules are resolved once for each set
of present tensors and kept. Units are numbered over the whole layout and do not move.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

from gradwatch.policy import ClipRule, Policy, Schedule, select
from gradwatch.records import Bools, Indices, Layout
from gradwatch.rules.arrays import Arrays, Vector
from gradwatch.rules.clipping import Rule
from gradwatch.rules.limits import limit_at

__all__ = ["Chain"]

KEPT = 64
"""Sets of present tensors whose rules are kept; a mixture of experts has many."""


class Chain:
    """The clip rules of a policy over one layout."""

    def __init__(self, policy: Policy, layout: Layout, xp: Arrays) -> None:
        self._clip = policy.clip
        self._xp = xp
        self._layout = layout
        self._selected = [select(rule, layout) for rule in policy.clip]
        self.norm_types = tuple({2.0: None, **{_measure(rule)[0]: None for rule in policy.clip}})
        """Every p whose p-norms the rules compare; 2 comes first, since it is always measured."""

        self._points = [_points(rule) for rule in policy.clip]
        self._by_present: OrderedDict[bytes, tuple[Rule, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clip)

    def limits(self, step: int) -> list[float]:
        """[K] the limits in force at an optimizer step."""
        return [limit_at(points, step) for points in self._points]

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


def _points(rule: ClipRule) -> tuple[tuple[int, float], ...]:
    if isinstance(rule.limit, Schedule):
        return rule.limit.points
    assert isinstance(rule.limit, float), "statistic limits are refused when a policy is loaded"
    return ((0, rule.limit),)
