"""What a recording tells about the rules of a policy: which norms it holds, and which it lacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradwatch.accumulation import Window
from gradwatch.policy import ClipRule, Policy, StatisticLimit
from gradwatch.records import RunInfo, StepRecord
from gradwatch.rules.chain import measures_of
from gradwatch.rules.clipping import LOSS, NO_LOSS, UPDATE, WEIGHT, Norms, Rule

__all__ = ["Evidence", "missing_for"]

SAME_UNITS = ("params", "exclude", "types", "groups", "ndim", "measure", "floor")
"""Keys in which two rules per unit must agree to have measured the same."""


def missing_for(policy: Policy, ran: Policy | None, info: RunInfo) -> dict[str, str]:
    """By rule what it needs and the recording does not hold, as a sentence."""
    return {
        rule.name: f"not recorded: {missing}"
        for rule in policy.clip
        if (missing := _missing(rule, ran, info))
    }


def _missing(rule: ClipRule, ran: Policy | None, info: RunInfo) -> str:
    if rule.per == "unit":
        same = [] if ran is None else [other for other in ran.clip if _same_units(rule, other)]
        if not same or isinstance(rule.limit, StatisticLimit):
            return f"{rule.measure} of each unit"
        return ""
    needed = measures_of(Policy(version=1, clip=(rule,)))
    return ", ".join(name for name in needed if name not in info.measures)


def _same_units(rule: ClipRule, other: ClipRule) -> bool:
    return other.per == "unit" and all(
        getattr(rule, key) == getattr(other, key) for key in SAME_UNITS
    )


class Evidence:
    """The norms of recorded steps, in the form that rules take them."""

    def __init__(self, policy: Policy, info: RunInfo, ran: Policy | None) -> None:
        self._recorded_units = {
            rule.name: f"unit:{other.name}"
            for rule in policy.clip
            for other in (() if ran is None else ran.clip)
            if rule.per == "unit" and _same_units(rule, other)
        }
        self._window = None
        if ran is not None and ran.mode == "enforce" and ran.accumulate is not None:
            self._window = Window(ran.accumulate)
        self._info = info

    def change(self, ran: Policy) -> None:
        """The run went on under a policy with other numbers."""
        if self._window is not None:
            self._window.change(ran.accumulate)

    def planned(self, step: int) -> int:
        """Micro-batches that the policy that ran planned for a step; 0 where it did not."""
        if self._window is None or self._window.target is not None:
            return 0
        self._window.step = step
        return self._window.num_steps

    def rules(self, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        """Rules that need no data: of units the largest of each tensor was recorded."""
        return tuple(self._on_record(rule) if rule.slices is not None else rule for rule in rules)

    def _on_record(self, rule: Rule) -> Rule:
        assert rule.slices is not None
        chosen = [part.position for part in rule.slices]
        return replace(
            rule,
            key=self._recorded_units[rule.name],
            norm_type=np.inf,
            per_element=True,
            slices=None,
            root_size_U=None,
            floor=0.0,
            tensors=np.array(chosen, dtype=np.intp),
            positions=tuple(chosen),
            unit_of=np.arange(len(chosen)),
            num_units=len(chosen),
        )

    def norms(self, record: StepRecord, rules: tuple[Rule, ...]) -> Norms:
        """What the rules compare in one step, of the tensors that had a gradient."""
        present_P = record.present_P
        found: dict[float | str, object] = {2.0: record.tensor_norms_P[present_P]}
        for rule in rules:
            for key in (rule.key, rule.weight_key) if rule.floor else (rule.key,):
                if key not in found:
                    found[key] = self._measure(record, key)
        return found

    @staticmethod
    def _measure(record: StepRecord, key: float | str) -> object:
        if key == LOSS:
            return np.float64(record.scalars.get(LOSS, NO_LOSS))
        name = key if isinstance(key, str) else _named(key)
        assert name in (UPDATE, WEIGHT) or name.startswith(("unit:", "l"))
        nothing = np.zeros(len(record.present_P), dtype=np.float32)
        return record.measures.get(name, nothing)[record.present_P]


def _named(norm_type: float) -> str:
    """`l1`, `linf`, `l1.5`"""
    return f"l{norm_type:g}"
