"""One optimizer step as a story: gather, measure, decide, act, record.

    backend.gather -> backend.measure -> decide -> judge -> backend.scale | drop -> recorder

Framework-free: a backend knows the gradients, the rules are pure, and the recorder takes the row
from here to detection, recording and metrics on another thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gradwatch.errors import TrainingStopped
from gradwatch.policy import Policy
from gradwatch.recorder import Recorder
from gradwatch.recording.ring import Row
from gradwatch.records import Bools, Float32s, RunInfo
from gradwatch.rules.arrays import Arrays, Vector
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import Decision, Rule, decide
from gradwatch.rules.guard import SkipHistory, Verdict, judge

__all__ = ["Backend", "Engine", "StepContext"]

logger = logging.getLogger("gradwatch")

TOLERATED_FAILURES = 3
"""Failures of our own in a row after which `guard.on_error` applies."""


class Backend(Protocol):
    """What a framework does with gradients. The value of `gather` is opaque but for `.present`."""

    xp: Arrays

    def gather(self) -> Any:
        """The gradients that are due now; `.present` says which ([P], one byte each)."""

    def measure(self, gradients: Any, norm_type: float) -> Vector:
        """[Q] p-norm of each present tensor, right also where float32 overflows."""

    def host(self, vector: Vector) -> Float32s:
        """A vector, on the host."""

    def scale(self, gradients: Any, coefs_Q: Vector, on_host_Q: Float32s) -> None:
        """Multiplies each gradient by its coef, in place; the coefs come twice."""

    def drop(self) -> None:
        """Makes the step that is due one without gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What the loop knows about the step that is due."""

    micro_batches: int = 1
    learning_rate: float = math.nan
    loss_scale: float = math.nan


@dataclass(frozen=True, slots=True)
class _Step:
    """One step, measured and decided."""

    gradients: Any
    norms: dict[float, Vector]
    """By norm_type, the norm of each present tensor [Q]."""

    rules: tuple[Rule, ...]
    limits: list[float]
    decision: Decision
    coefs_Q: Float32s
    """The multipliers on the host; 1 where nothing is done."""

    over: list[bool]
    total_norm: float
    verdict: Verdict


class Engine:
    """Runs the policy step by step; holds what must outlive a step."""

    def __init__(
        self,
        info: RunInfo,
        policy: Policy,
        backend: Backend,
        recorder: Recorder,
        on_error: Callable[[str], None],
    ) -> None:
        self.num_steps = 0
        self.skipped: str | None = None
        """Why the last step was skipped, or None."""

        self.enforcing = policy.enforcing
        self._guard = policy.guard
        self._backend = backend
        self._recorder = recorder
        self._on_error = on_error
        self._chain = Chain(policy, info.layout, backend.xp)
        self._reason_code = {reason: i for i, reason in enumerate(info.reasons, start=1)}
        self._num_parameters = len(info.layout.parameters)
        self._skips = SkipHistory()
        self._failures_in_a_row = 0
        self._warning: set[str] = set()
        self._last_time = math.nan

    def step(self, context: StepContext) -> None:
        """All that gradwatch does for one optimizer step, just before the update.

        Raises:
            TrainingStopped: the policy says stop. Nothing else of ours leaves this method.
        """
        started = time.perf_counter()
        doing = "measure"
        self.skipped = None
        step = None
        try:
            step = self._decided()
            doing = "apply"
            self._act(step)
            self._failures_in_a_row = 0
        except Exception:
            self._failed(doing)
        if step is not None:
            try:
                self._record(step, context, started)
            except Exception:
                self._report("readback")
        self.num_steps += 1
        if step is not None and step.verdict.stop and self.enforcing:
            raise _stopped(self.num_steps - 1, step.verdict.stop, step.verdict.skip or "")

    def _decided(self) -> _Step:
        gradients = self._backend.gather()
        norms = {p: self._backend.measure(gradients, p) for p in self._chain.norm_types}
        rules = self._chain.rules(gradients.present)
        limits = self._chain.limits(self.num_steps)
        decision = decide(rules, norms, limits, self._backend.xp)
        over = [bool(flag) for flag in decision.over]
        total_norm = float(decision.total_norm)
        verdict, self._skips = judge(
            self._guard, rules, over, total_norm, self._skips, self.num_steps
        )
        coefs_Q = self._backend.host(decision.coefs_P)
        return _Step(gradients, norms, rules, limits, decision, coefs_Q, over, total_norm, verdict)

    def _act(self, step: _Step) -> None:
        self._warn(step)
        if not self.enforcing or step.verdict.stop:
            return
        self.skipped = step.verdict.skip
        if step.verdict.skip:
            self._backend.drop()
        elif step.coefs_Q.min(initial=1.0) < 1.0:
            self._backend.scale(step.gradients, step.decision.coefs_P, step.coefs_Q)

    def _warn(self, step: _Step) -> None:
        """One line when a `then: warn` rule goes over its limit, not one for each step."""
        for rule, limit, is_over in zip(step.rules, step.limits, step.over, strict=True):
            if rule.then == "warn" and is_over and rule.name not in self._warning:
                logger.warning(
                    "step %d: rule %s is over its limit %g (total norm %.4g)",
                    self.num_steps, rule.name, limit, step.total_norm,
                )  # fmt: skip
            (self._warning.add if is_over else self._warning.discard)(rule.name)

    def _record(self, step: _Step, context: StepContext, started: float) -> None:
        now = time.time()
        clips = not step.verdict.skip and bool(step.coefs_Q.min(initial=1.0) < 1.0)
        clipped = float(step.decision.total_norm_clipped) if clips else step.total_norm
        norms_P, coefs_P, present_P = self._per_tensor(step, step.coefs_Q if clips else None)
        self._recorder.append(
            Row(
                step=self.num_steps,
                time=now,
                duration_seconds=now - self._last_time,
                overhead_seconds=time.perf_counter() - started,
                total_norm=step.total_norm,
                total_norm_clipped=clipped,
                clip_coef=clipped / step.total_norm if clips else 1.0,
                fired=sum(1 << k for k, is_over in enumerate(step.over) if is_over),
                skipped=self._reason_code.get(step.verdict.skip or "", 0),
                micro_batches=context.micro_batches,
                weight=float(context.micro_batches),
                loss_scale=context.loss_scale,
                learning_rate=context.learning_rate,
                limits=step.limits,
                tensor_norms_P=norms_P,
                tensor_coefs_P=coefs_P,
                present_P=present_P,
            )
        )
        self._last_time = now

    def _per_tensor(
        self, step: _Step, coefs_Q: Float32s | None
    ) -> tuple[Float32s, Float32s | None, Bools | None]:
        """Norms, coefs and presence [P]; None stands for coefs that are all 1, and for all."""
        norms_Q = self._backend.host(step.norms[2.0])
        if len(norms_Q) == self._num_parameters:
            return norms_Q, coefs_Q, None
        present_P = np.frombuffer(step.gradients.present, dtype=np.bool_)
        coefs_P = None if coefs_Q is None else _spread(coefs_Q, present_P, 1.0)
        return _spread(norms_Q, present_P, 0.0), coefs_P, present_P

    def _failed(self, component: str) -> None:
        """Counts a failure to decide or to apply, and does what `guard.on_error` says."""
        self._report(component)
        self._failures_in_a_row += 1
        if not self.enforcing or self._failures_in_a_row < TOLERATED_FAILURES:
            return
        if self._guard.on_error == "stop":
            message = f"gradwatch failed {self._failures_in_a_row} times in a row to {component}"
            raise _stopped(self.num_steps, f"{message}, guard.on_error is stop", "on_error")
        self.enforcing = False
        logger.critical(
            "gradwatch failed %d times in a row to %s: the policy is no longer enforced "
            "(guard.on_error is observe)", self._failures_in_a_row, component,
        )  # fmt: skip

    def _report(self, component: str) -> None:
        self._on_error(component)


def _stopped(step: int, why: str, reason: str) -> TrainingStopped:
    message = f"stopped before the update of step {step}: {why}"
    return TrainingStopped(message, step=step, reason=reason)


def _spread(values_Q: Float32s, present_P: Bools, fill: float) -> Float32s:
    values_P = np.full(len(present_P), fill, dtype=np.float32)
    values_P[present_P] = values_Q
    return values_P
