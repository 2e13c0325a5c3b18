"""The policy in a graph: what becomes of the gradients of one step, and the row that tells of it.

    gradients, facts  ->  gradients that the optimizer is due to see, skip  (and a row in the ring)

The rules are those of `gradwatch.rules`, traced. Their histories are variables of the watch, not
of the optimizer, so that a saved model knows nothing of them. Nothing is read and no callback to
the host is made, so that all of it compiles with XLA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from gradwatch.backend import measure_and_decide, skips
from gradwatch.policy import Policy, Schedule
from gradwatch.records import Layout
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import Decision, Limit, Norms, Rule
from gradwatch.rules.detect_sampled import samples_every
from gradwatch.rules.reading import PLAIN, compared, pack
from gradwatch.rules.statistics import State
from gradwatch.tensorflow.gradients import Gradients, scaled
from gradwatch.tensorflow.measures import Measures
from gradwatch.tensorflow.ring import GraphRing, local, variable
from gradwatch.tensorflow.sampling import GraphSampler
from gradwatch.tensorflow.vectors import Vector, tensor_of

__all__ = ["Decisions", "Facts", "Ruling", "Trace"]

HEADER = 6
"""Numbers of a row before what was packed: whether the run had been stopped, trace, micro-batches,
weight, learning rate, loss."""

TOUCHING = ("unit", "element")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the graph knows of a step beside its gradients; numbers or 0-d tensors."""

    micro_batches: Any = 1.0
    weight: Any = 1.0
    learning_rate: Any = math.nan
    loss: Any = None
    """None where it is not known in the graph."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What all rows have in common that one trace of a graph writes."""

    present: bytes
    has_loss: bool


@dataclass(frozen=True, slots=True)
class Ruling:
    scaled: Callable[[], list[Any]]
    """Multiplies; [Q] what the optimizer is due to see. To be called where it sees it: a branch
    that is handed what was multiplied before takes half a pass over the gradients more."""

    skip: Any
    """0-d, whether the step is dropped; None where it never is."""


class Decisions:
    """One watch's, over all graphs that are traced with it."""

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        strategy: Any,
        variables: Sequence[Any],
        *,
        updates_seen: bool,
    ) -> None:
        """
        Args:
            updates_seen: whether `updated` is called behind each step.
        """
        self._policy = policy
        self._strategy = strategy
        self._measures = Measures()
        self.chain = Chain(policy, layout, Measures.xp)
        self._step = variable(0, tf.int64, strategy)
        self._stopped = variable(False, tf.bool, strategy)
        self._held = {
            k: {
                name: variable(np.asarray(values), tf.float64, strategy)
                for name, values in history.arrays().items()
            }
            for k, history in self.chain.histories.items()
        }
        count = len(layout.parameters)
        width = HEADER + PLAIN + 2 * len(policy.clip) + (2 + len(self.chain.measures)) * count
        self.ring = GraphRing(width, strategy)
        self.traces: list[Trace] = []
        every = samples_every(policy.detect) if updates_seen else 0
        self._sampler = GraphSampler(variables, every, strategy) if every else None
        scaling = [r for r in policy.clip if r.then in ("scale", "zero") and r.per not in TOUCHING]
        self._zeroes = policy.guard.nonfinite == "zero" or any(r.then == "zero" for r in scaling)
        self._multiplies = policy.enforcing and (bool(scaling) or self._zeroes)

    def rule(self, gradients: Gradients, facts: Facts, *, loss_scaler: bool = False) -> Ruling:
        """
        Args:
            gradients: of all replicas together.
            loss_scaler: whether a step that is not finite is left to a loss scaler, which drops it.
        """
        policy, chain, xp = self._policy, self.chain, Measures.xp
        step = self._step.read_value()
        if self._sampler is not None:
            self._sampler.before(step, gradients)
        chain.histories = {k: _read(held) for k, held in self._held.items()}
        rules = chain.rules(gradients.present)
        limits = self._limits(step)
        agreed, decision = measure_and_decide(
            self._measures, gradients, chain, rules, limits, policy.guard, apply=policy.enforcing
        )
        finite = xp.isfinite(decision.total_norm)
        chain.learn(decision, finite)
        self._hold(chain.histories)
        skip = skips(policy.guard, rules, decision, xp) if policy.enforcing else None
        if loss_scaler:
            gradients.found_inf = Vector(tf.cast((~finite).tensor, tf.float32))
            skip = None if skip is None else skip & finite
        self._write(step, gradients, agreed.norms, decision, rules, limits, facts)
        self._step.assign_add(tf.ones((), tf.int64))
        if policy.enforcing:
            stopped = Vector(self._stopped.read_value())
            skip = stopped if skip is None else skip | stopped
            if policy.who("stop"):
                self._stop_if(rules, decision, finite)
        behind = None if self._sampler is None else self._sampler.behind(step)
        coefs_Q = self._coefs(decision, finite, loss_scaler) if gradients.values else None
        zeroes = self._zeroes and not loss_scaler

        def scaled_values() -> list[Any]:
            values = gradients.values
            if coefs_Q is not None:
                pairs = zip(values, tf.unstack(coefs_Q), strict=True)
                values = [scaled(value, coef, zeroes=zeroes) for value, coef in pairs]
            return values if behind is None else [behind(value) for value in values]

        return Ruling(scaled_values, tensor_of(skip))

    def updated(self, skip: Any) -> None:
        """In a graph, behind the update that was made unless `skip`."""
        if self._sampler is not None:
            self._sampler.after(self._step.read_value() - 1, skip)

    # What the host may ask

    def num_steps(self) -> int:
        return int(local(self._step, self._strategy).numpy())

    def has_stopped(self) -> bool:
        return bool(local(self._stopped, self._strategy).numpy())

    def stop(self) -> None:
        """No update from now on."""
        self._stopped.assign(True)

    def read(self) -> list[tuple[int, Trace, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """The new rows: step, trace, the other numbers in front, and what was packed."""
        num_rules, num_measures = len(self._policy.clip), len(self.chain.measures)
        found = []
        for step, row in self.ring.read():
            if row[0]:
                continue  # what came when the run was at its end was no step
            trace = self.traces[int(row[1])]
            length = PLAIN + 2 * num_rules + (2 + num_measures) * sum(trace.present)
            found.append((step, trace, row[2:HEADER], row[HEADER : HEADER + length]))
        return found

    def sampled(self) -> list[tuple[int, npt.NDArray[np.float64]]]:
        """New samples [S * P], each with its step."""
        return [] if self._sampler is None else self._sampler.read(self.ring.next - 1)

    def state_dict(self) -> dict[str, Any]:
        self.chain.histories = {
            k: _read({name: local(held, self._strategy) for name, held in history.items()})
            for k, history in self._held.items()
        }
        return self.chain.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], num_steps: int) -> list[str]:
        """Returns the names of the rules that begin anew."""
        anew = self.chain.load_state_dict(state)
        self._hold(self.chain.histories)
        self._step.assign(num_steps)
        self.ring.begin_at(num_steps)
        if self._sampler is not None:
            self._sampler.begin_at(num_steps)
        return anew

    # In the graph

    def _limits(self, step: Any) -> list[Any]:
        limits: list[Any] = self.chain.limits(0)
        for k, rule in enumerate(self._policy.clip):
            if isinstance(rule.limit, Schedule) and len(rule.limit.points) > 1:
                limits[k] = _scheduled(rule.limit.points, step)
        return limits

    def _hold(self, histories: Mapping[int, State]) -> None:
        for k, history in histories.items():
            for name, values in history.arrays().items():
                self._held[k][name].assign(tensor_of(values))

    def _write(
        self,
        step: Any,
        gradients: Gradients,
        norms: Norms,
        decision: Decision,
        rules: tuple[Rule, ...],
        limits: list[float | Limit],
        facts: Facts,
    ) -> None:
        xp = Measures.xp
        trace = Trace(gradients.present, facts.loss is not None)
        if trace not in self.traces:
            self.traces.append(trace)
        measures = compared(self.chain.measures, rules, norms, decision, xp)
        packed = pack(
            decision, limits, norms[2.0], gradients.loss_scale, gradients.found_inf, xp, measures
        )
        loss = math.nan if facts.loss is None else facts.loss
        number = float(self.traces.index(trace))
        header = [self._stopped.read_value(), number, facts.micro_batches, facts.weight,
                  facts.learning_rate, loss]  # fmt: skip
        numbers = [tf.cast(tensor_of(number), tf.float64) for number in header]
        self.ring.write(step, tf.concat([tf.stack(numbers), packed.tensor], 0))

    def _stop_if(self, rules: tuple[Rule, ...], decision: Decision, finite: Vector) -> None:
        stop = ~finite if self._policy.guard.nonfinite == "stop" else ~finite & False
        for rule, over in zip(rules, decision.over, strict=True):
            stop = stop | over if rule.then == "stop" else stop
        self._stopped.assign(tf.logical_or(self._stopped.read_value(), stop.tensor))

    def _coefs(self, decision: Decision, finite: Vector, loss_scaler: bool) -> Any:
        """[Q] what gradients are multiplied by; None where they never are."""
        if not self._multiplies:
            return None
        coefs_Q = tf.cast(tensor_of(decision.coefs_P), tf.float32)
        # Zeroed or not, a loss scaler has to find it, and so where only the norm overflows.
        return tf.where(finite.tensor, coefs_Q, math.nan) if loss_scaler else coefs_Q


def _read(held: Mapping[str, Any]) -> State:
    return State.of({name: Vector(values.read_value()) for name, values in held.items()})


def _scheduled(points: tuple[tuple[int, float], ...], step: Any) -> Vector:
    """0-d: `rules.limits.limit_at` in a graph."""
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    along = (tf.cast(step, tf.float64) - steps[:-1]) / np.diff(steps)
    rises = tf.clip_by_value(along, 0.0, 1.0) * np.diff(values)
    return Vector(values[0] + tf.reduce_sum(rises))
