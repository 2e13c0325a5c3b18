"""A recording and a policy in, what that policy would have done out.

    StepRecord -> norms of its tensors -> rules, guard, detectors -> Outcome

The same pure functions decide as in training, on the norms that were recorded. Later gradients are
those of the run as it went: had the policy changed a step, what followed would have differed.

For the policy that ran, what was recorded is what happened; it is computed again all the same, and
where that differs, the step is listed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwatch.errors import PolicyError
from gradwatch.policy import Policy, check_against, parse_policy
from gradwatch.records import Anomaly, RunInfo, StepRecord
from gradwatch.rules.arrays import NUMPY
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import Decision, Limit, Norms, Rule, decide
from gradwatch.rules.detection import Detection
from gradwatch.rules.guard import OVERFLOW, SkipHistory, judge
from gradwatch.rules.reading import least
from gradwatch.whatif.evidence import Evidence, missing_for

__all__ = ["NEAR", "Difference", "Outcome", "Replay", "replay"]

NEAR = 1e-6
"""Relative to its limit: norms are recorded in float32, so nearer than that is either side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One step under the policy."""

    step: int
    total_norm: float
    total_norm_clipped: float
    """NaN where the recording does not tell."""

    limits: Mapping[str, float]
    fired: tuple[str, ...]
    clipped: bool
    skipped: str | None
    stop: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A step of the policy that ran that is decided differently when computed again."""

    step: int
    rule: str
    recorded: bool
    """Whether it was over its limit."""

    distance: float
    """Of what was compared from the limit, relative to it."""

    @property
    def is_near(self) -> bool:
        return self.distance <= NEAR


@dataclass(kw_only=True)
class Replay:
    """All that a policy would have done."""

    info: RunInfo
    policy: Policy
    is_the_one_that_ran: bool
    unknown: dict[str, str]
    """By rule why it cannot be answered, e.g. `not recorded: l1`; it takes no part."""

    notes: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)

    @property
    def fired(self) -> Counter[str]:
        """Steps by rule that was over its limit."""
        return Counter(rule for outcome in self.outcomes for rule in outcome.fired)

    @property
    def skipped(self) -> Counter[str]:
        """Steps by reason."""
        return Counter(o.skipped for o in self.outcomes if o.skipped is not None)

    @property
    def clipped(self) -> int:
        return sum(outcome.clipped for outcome in self.outcomes)

    @property
    def stop(self) -> Outcome | None:
        """The first step before whose update the run would have been stopped."""
        return next((outcome for outcome in self.outcomes if outcome.stop), None)


def replay(
    records: Iterable[StepRecord],
    info: RunInfo,
    policy: Policy,
    changes: Sequence[tuple[int, str]] = (),
) -> Replay:
    """What a policy would have done in a recorded run.

    Args:
        changes: policies that took the place of the one in `info`, as YAML, each with its first
            step. Where the policy is one of those, the run is replayed with all of them.

    Raises:
        PolicyError: its selectors match nothing in the model that was recorded.
    """
    check_against(policy, info.layout)
    ran = _policy_that_ran(info)
    later = [(step, parse_policy(text, f"<policy of {info.run}>")) for step, text in changes]
    same = ran is not None and policy.sha256 in {ran.sha256, *(p.sha256 for _, p in later)}
    unknown = missing_for(policy, ran, info)
    known = policy.model_copy(
        update={"clip": tuple(rule for rule in policy.clip if rule.name not in unknown)}
    )
    if same and ran is not None:
        known = ran
    found = Replay(info=info, policy=policy, is_the_one_that_ran=same, unknown=unknown)
    run = _Run(info, known, ran)
    if same and later:
        found.notes.append(
            "the policy was changed at step "
            f"{', '.join(str(step) for step, _ in later)} and is replayed with its changes"
        )
    for record in records:
        while later and later[0][0] <= record.step:
            run.change(later.pop(0)[1], ran_only=not same)
        outcome, differences = run.step(record)
        if same:
            found.differences += differences
            outcome = _as_recorded(record, outcome)
        found.outcomes.append(outcome)
        found.anomalies += run.anomalies(record, found.notes)
    if found.outcomes and found.outcomes[0].step > 0:
        found.notes.append(
            f"the recording begins at step {found.outcomes[0].step}: histories begin anew there"
        )
    return found


class _Run:
    """The state that goes from step to step."""

    def __init__(self, info: RunInfo, policy: Policy, ran: Policy | None) -> None:
        self._policy = policy
        self._chain = Chain(policy, info.layout, NUMPY)
        self._evidence = Evidence(policy, info, ran)
        self._detection = Detection(info.layout, policy.detect, is_shadow=info.is_shadow)
        self._skips = SkipHistory()
        self._planned = 0

    def change(self, policy: Policy, *, ran_only: bool) -> None:
        """The run went on under other numbers.

        Args:
            ran_only: whether the policy that is replayed is another one, and stays.
        """
        self._evidence.change(policy)
        if ran_only:
            return
        self._policy = policy
        self._chain, _ = self._chain.changed(policy)
        self._detection = self._detection.reconfigured(policy.detect)

    def step(self, record: StepRecord) -> tuple[Outcome, list[Difference]]:
        self._note_planned(record.step)
        overflow = record.skipped == OVERFLOW
        limits = self._chain.limits(record.step)
        present = np.ascontiguousarray(record.present_P).astype(np.uint8).tobytes()
        rules = self._evidence.rules(self._chain.rules(present))
        norms = self._evidence.norms(record, rules)
        decision, guessed = self._decided(rules, norms, limits)
        self._chain.learn(decision, math.isfinite(record.total_norm) and not overflow)
        over = [bool(flag) for flag in decision.over]
        verdict, self._skips = judge(
            self._policy.guard, rules, over, record.total_norm, self._skips, record.step,
            overflow=overflow,
        )  # fmt: skip
        clips = not verdict.skip and bool(decision.coefs_P.min(initial=1.0) < 1.0)
        after = float(decision.total_norm_clipped) if clips else record.total_norm
        outcome = Outcome(
            step=record.step,
            total_norm=record.total_norm,
            total_norm_clipped=math.nan if guessed and not verdict.skip else after,
            limits={
                rule.name: float(least(limit)) for rule, limit in zip(rules, limits, strict=True)
            },
            fired=tuple(r.name for r, flag in zip(rules, over, strict=True) if flag),
            clipped=clips or (guessed and not verdict.skip),
            skipped=verdict.skip,
            stop=verdict.stop,
        )
        differences = [] if overflow else list(_differences(record, rules, limits, decision))
        return outcome, differences

    def anomalies(self, record: StepRecord, notes: list[str]) -> tuple[Anomaly, ...]:
        try:
            return self._detection.observe(record)
        except ValueError as error:
            if str(error) not in notes:
                notes.append(str(error))
            return ()

    def _decided(
        self, rules: tuple[Rule, ...], norms: Norms, limits: list[Any]
    ) -> tuple[Decision, bool]:
        """The decision, and whether it touched data of which only norms were recorded."""
        guessed = False

        def touch(rule: Rule, values: Any, over: Any) -> Norms:
            nonlocal guessed
            guessed |= bool(over)
            return norms

        zero = self._policy.guard.nonfinite == "zero"
        decision = decide(rules, norms, limits, NUMPY, zero_nonfinite=zero, touch=touch)
        return decision, guessed

    def _note_planned(self, step: int) -> None:
        planned = self._evidence.planned(step)
        if self._planned and planned and planned != self._planned:
            self._chain.begin_again(math.sqrt(self._planned / planned))
        self._planned = planned


def _differences(
    record: StepRecord, rules: tuple[Rule, ...], limits: list[Any], decision: Decision
) -> Iterable[Difference]:
    for k, rule in enumerate(rules):
        recorded = rule.name in record.fired
        if recorded == bool(decision.over[k]):
            continue
        limit = limits[k].value_U if isinstance(limits[k], Limit) else limits[k]
        with np.errstate(all="ignore"):
            distances = np.abs(np.asarray(decision.compared[k], dtype=np.float64) / limit - 1)
        distance = float(np.nanmin(distances)) if np.isfinite(distances).any() else math.inf
        yield Difference(step=record.step, rule=rule.name, recorded=recorded, distance=distance)


def _as_recorded(record: StepRecord, computed: Outcome) -> Outcome:
    return Outcome(
        step=record.step,
        total_norm=record.total_norm,
        total_norm_clipped=record.total_norm_clipped,
        limits=dict(record.limits),
        fired=record.fired,
        clipped=record.clipped,
        skipped=record.skipped,
        stop=computed.stop,
    )


def _policy_that_ran(info: RunInfo) -> Policy | None:
    if not info.policy:
        return None
    try:
        return parse_policy(info.policy, f"<policy of {info.run}>")
    except PolicyError:  # of a version that could do more
        return None
