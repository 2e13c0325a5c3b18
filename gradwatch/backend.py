"""What a framework does for the engine, as protocols: gather, measure, touch, scale, drop.

And the two sentences that are made of these verbs wherever a policy is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradwatch.policy import Guard
from gradwatch.records import Float32s
from gradwatch.rules.arrays import Arrays, Vector
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import (
    LOSS,
    NO_LOSS,
    UPDATE,
    Decision,
    Limit,
    Norms,
    Rule,
    decide,
)
from gradwatch.rules.culprit import Clues
from gradwatch.rules.guard import Verdict

__all__ = [
    "Agreed",
    "Backend",
    "Gradients",
    "RanksFailed",
    "RanksMissing",
    "StepContext",
    "Word",
    "act",
    "measure_and_decide",
]


class Gradients(Protocol):
    """The gradients of one step, as a backend hands them round."""

    decided: bytes
    """[P] 1 where the decision is over the parameter; every one where several processes decide."""

    factor: float
    """What the optimizer is due to see is so many times the gradient."""

    loss_scale: Any
    """What the gradients are still multiplied by: 0-d, or None where they are not."""

    found_inf: Any
    """Whether a loss scaler will drop the step: 0-d, not 0 where it will; None without one."""


class RanksFailed(Exception):
    """Another process could not decide, so that none does."""


class RanksMissing(Exception):
    """The processes cannot agree any more: one has died, or came too late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a process tells the others in a step, beside its norms."""

    failed: bool = False
    """It could not apply the last decision."""

    stopping: bool = False
    """A finding of its own is to stop the run."""

    weight: float = 1.0
    """Of its micro-batches together."""

    planned: float = 1.0
    """The weight that their losses were divided by."""

    loss: float = NO_LOSS


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all processes know of a step."""

    gradients: Any
    norms: dict[float | str, Vector]
    stopping: Any = None
    """Whether a finding of any of them is to stop the run; a vector (0-d) where the host does not
    read, None of one process alone."""


SILENT = Word()


class Backend(Protocol):
    """What a framework does with gradients. Q of the P watched parameters have one."""

    xp: Arrays

    agrees: bool
    """Whether several processes decide together."""

    reads_host: bool
    """Whether decisions are read before they are applied."""

    def gather(self, factor: float) -> Any:
        """The gradients that are due now; what the optimizer is due to see is `factor` of them."""

    def measure(self, gradients: Any, norm_type: float) -> Vector:
        """[Q] p-norm of each present tensor, times the factor; where the host may be read right
        also where float32 overflows."""

    def measure_units(self, gradients: Any, rule: Rule) -> Vector:
        """[U] p-norm of each unit of a rule per unit; 0 for those of tensors not present."""

    def measure_weights(self, gradients: Any, rule: Rule) -> Vector:
        """[Q] L2 norm of each present parameter, [U] of its units for a rule per unit."""

    def measure_updates(self, gradients: Any) -> Vector:
        """[Q] L2 norm of each update that the optimizer is about to make, per learning rate."""

    def agree(self, gradients: Any, norms: dict[float | str, Vector], word: Word) -> Agreed:
        """The norms of all processes that train together; of one process alone what was given.

        Raises:
            RanksFailed: another process has failed.
            RanksMissing: there is no agreement.
        """

    def abandon(self, num_keys: int) -> None:
        """The step is not decided here, for which the others must not wait.

        Args:
            num_keys: kinds of norms that they send.
        """

    def touch(
        self, gradients: Any, rule: Rule, values: Vector, over: Vector, apply: bool
    ) -> Any | None:
        """Applies a rule per unit or element to the data.

        Args:
            values: what each unit is multiplied by [U], or for each tensor that the rule selects
                the bound of its elements [S].
            over: 0-d, whether any exceeds its limit.
            apply: whether in place; else a copy is made.

        Returns:
            The gradients as they would be then, or None where nothing changes.
        """

    def scalar(self, value: float) -> Vector:
        """A number of the host, 0-d."""

    def host(self, vector: Vector) -> Float32s:
        """A vector, on the host."""

    def scale(self, gradients: Any, coefs_Q: Vector) -> None:
        """Multiplies each gradient by its coef and the factor."""

    def drop(self, gradients: Any) -> None:
        """Makes the step that is due one without gradients."""

    def apply(self, gradients: Any, coefs_Q: Vector, skip: Vector | None) -> None:
        """Scales, and drops where `skip` (0-d) says so, without reading the device."""

    def send(self, packed: Vector, what: Any) -> None:
        """Begins to copy a vector to the host; `what` comes back with it."""

    def sample(self, gradients: Any, loss_scale: float) -> None:
        """Takes a sample of the gradients and the weights before a step."""

    def forget_sample(self) -> None:
        """The step is not taken."""

    def sampled(self) -> Any | None:
        """[S, P] by `records.SAMPLES` once the step was taken, a vector of the device or of the
        host; None where no sample was taken."""

    def confer(self, step: int, word: bytes) -> Sequence[bytes | None]:
        """What each of several processes says of a step, this one's word among it, None of who does
        not answer; nothing where there is one process alone."""

    def seen(self) -> Any:
        """What was kept of the forward passes of the step that is due; it is forgotten here."""

    def was_finite(self, seen: Any) -> None:
        """The step of which that was kept was finite: what was odd in it is no fault."""

    def clues(self, seen: Any, *, is_over: bool) -> Clues:
        """What is known of a step that is not finite.

        Args:
            seen: of that step.
            is_over: whether its update was made meanwhile.
        """

    def arrived(self, *, wait: bool) -> Iterable[tuple[Any, Any]]:
        """The vectors that have come to the host since, in order, each with what was sent along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What the loop knows about the step that is due."""

    micro_batches: int = 1
    weight: float = 1.0
    factor: float = 1.0
    """What the gradients are multiplied by to be what the optimizer is due to see."""

    learning_rate: float = math.nan
    loss_scale: float = math.nan
    """NaN without a loss scaler."""

    planned: int = 0
    """Micro-batches that the policy plans for the step; 0 where it does not."""

    first_norm: Any = None
    """0-d: the L2 norm of the first micro-batch's own gradient, multiplied by the loss scale as the
    gradients are; None where it was not measured."""

    first_weight: float = 1.0
    """Of that micro-batch, in the unit of `weight`."""

    overflows: int = 0
    """Steps that a loss scaler has dropped since the last one."""


def measure_and_decide(
    backend: Backend,
    gradients: Any,
    chain: Chain,
    rules: Sequence[Rule],
    limits: Sequence[float | Limit],
    guard: Guard,
    *,
    apply: bool,
    word: Word = SILENT,
) -> tuple[Agreed, Decision]:
    """The raw norms, and what the chain says of them.

    Args:
        apply: whether rules per unit and element act on the data.
        word: what goes with the norms, the loss of the step among it.
    """
    norms = _gradient_norms(backend, gradients, chain, rules)
    if chain.compares_updates:
        norms[UPDATE] = backend.measure_updates(gradients)
    for rule in rules:
        if rule.floor and rule.weight_key not in norms:
            norms[rule.weight_key] = backend.measure_weights(gradients, rule)
    if chain.compares_loss:
        norms[LOSS] = backend.scalar(word.loss)
    agreed = backend.agree(gradients, norms, word)
    norms = now = agreed.norms
    current = agreed.gradients

    def touch(rule: Rule, values: Vector, over: Vector) -> Norms:
        nonlocal now, current
        touched = backend.touch(current, rule, values, over, apply)
        if touched is not None:
            current = touched
            anew = _gradient_norms(backend, current, chain, rules)
            now = norms | backend.agree(current, anew, SILENT).norms
        return now

    zero = guard.nonfinite == "zero"
    decision = decide(rules, norms, limits, backend.xp, zero_nonfinite=zero, touch=touch)
    return agreed, decision


def _gradient_norms(
    backend: Backend, gradients: Any, chain: Chain, rules: Sequence[Rule]
) -> dict[float | str, Vector]:
    norms: dict[float | str, Vector] = {p: backend.measure(gradients, p) for p in chain.norm_types}
    for rule in rules:
        if rule.slices is not None:
            norms[rule.key] = backend.measure_units(gradients, rule)
    return norms


def act(backend: Backend, gradients: Any, decision: Decision, verdict: Verdict) -> None:
    """Drops the gradients, scales them, or leaves them alone."""
    if verdict.skip:
        backend.drop(gradients)
    elif gradients.factor != 1.0 or backend.host(decision.coefs_P).min(initial=1.0) < 1.0:
        backend.scale(gradients, decision.coefs_P)
