"""One optimizer step as a story: gather, measure, decide, act, record.

    backend.gather -> backend.measure -> decide -> judge -> backend.scale | drop -> recorder

Where a decision may stay on an accelerator it is applied there and read later:

    backend.gather -> backend.measure -> decide -> backend.apply -> ... -> judge -> recorder

Framework-free: a backend knows the gradients, the rules are pure, and the recorder takes the row
from here to detection, recording and metrics on another thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from gradwatch.backend import (
    Agreed,
    Backend,
    RanksMissing,
    StepContext,
    Word,
    act,
    measure_and_decide,
    skips,
)  # fmt: skip
from gradwatch.due_step import DueStep, row_of
from gradwatch.errors import TrainingStopped, stopped_before
from gradwatch.investigation import Investigation
from gradwatch.policy import Policy
from gradwatch.recorder import Recorder
from gradwatch.recording.ring import Row
from gradwatch.records import Anomaly, Layout, RunInfo
from gradwatch.rule_notes import RuleNotes, say_anew
from gradwatch.rules.arrays import NUMPY
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import Decision, Norms
from gradwatch.rules.guard import OVERFLOW, SkipHistory, Verdict, judge
from gradwatch.rules.noise import NoiseScale
from gradwatch.rules.reading import Reading, compared, least, overflowed, pack, unapplied, unpack
from gradwatch.samples import Samples
from gradwatch.saying import say

__all__ = ["Engine"]

OTHERS = "a finding of another rank ends the run"
TOLERATED_FAILURES = 3
"""Failures of our own in a row after which `guard.on_error` applies."""


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
        """Steps that were due so far."""

        self.enforcing = policy.enforcing
        self._policy = policy
        self._guard = policy.guard
        self._backend = backend
        self._recorder = recorder
        self._on_error = on_error
        self._chain = self._new_chain(info.layout)
        self._reason_code = {reason: i for i, reason in enumerate(info.reasons, start=1)}
        self._num_parameters = len(info.layout.parameters)
        self.samples = Samples(recorder, self._num_parameters, on_error)
        self._investigation = Investigation(info, policy.detect, recorder, on_error)
        self._skips = SkipHistory()
        self._skipped: str | None = None
        self._stopping: TrainingStopped | None = None
        self._is_agreed = False  # several processes are known to stop together
        self._failures_in_a_row = 0
        self._could_not_apply = False
        self._notes = RuleNotes()
        self._noise = NoiseScale()
        self._planned = 0
        self._last_started = math.nan
        self.reading = threading.RLock()  # a thread may end the steps that a graph decides

    def extend(self, backend: Backend, layout: Layout) -> None:
        """Goes on with more parameters, behind the ones of before; records keep their shape."""
        self.catch_up(wait=True)
        self._backend = backend
        histories = self._chain.state_dict()
        self._chain = self._new_chain(layout)
        self._chain.load_state_dict(histories)

    def check(self) -> None:
        """Raises `TrainingStopped` where a step that was read, or a detector, ends the run."""
        if self._stopping is not None:
            raise self._stopping

    def stop_soon(self, anomaly: Anomaly) -> None:
        """Stops the run before its next update, as `detect` says; called on another thread."""
        if self._policy.mode != "enforce":
            say(logging.WARNING, "the policy would stop the run here (%s)", anomaly.kind)
        elif self._stopping is None:
            why = f"detect.{anomaly.kind} at step {anomaly.step}: {anomaly.message}"
            self._stopping = stopped_before(self.num_steps, why, anomaly.kind)

    def change(self, policy: Policy) -> None:
        """Goes on under a policy of the same rules with other numbers, from the next step on."""
        self.catch_up(wait=True)
        self._policy, self._guard = policy, policy.guard
        self._investigation.change(policy)
        self._chain, anew = self._chain.changed(policy)
        say_anew(anew)

    @property
    def is_stopping(self) -> bool:
        """Whether a skip too many was learnt of that stops the run at its next step."""
        return self._stopping is not None

    def state_dict(self) -> dict[str, Any]:
        """What must outlive the process: steps, skips that still count, histories by rule."""
        self.catch_up(wait=True)
        return {
            "num_steps": self.num_steps,
            "skips": self._skips.state_dict(),
            "rules": self._chain.state_dict(),
            "noise": self._noise.state_dict(),
            "planned": self._planned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; rules that it does not know begin anew, and are named."""
        self.catch_up(wait=True)
        anew = self._chain.load_state_dict(state["rules"])
        self.num_steps = int(state["num_steps"])
        self._skips = SkipHistory.of(state["skips"])
        self._noise = NoiseScale.of(state["noise"])
        self._planned = int(state["planned"])
        say_anew(anew)

    def _new_chain(self, layout: Layout) -> Chain:
        xp = self._backend.xp
        return Chain(self._policy, layout, xp, NUMPY if self._backend.reads_host else xp)

    @property
    def skipped(self) -> str | None:
        """Why the last step was skipped, or None. Waits for the device where only that knows."""
        self.catch_up(wait=True)
        return self._skipped

    def step(self, context: StepContext) -> None:
        """All that gradwatch does for one optimizer step, just before the update.

        Raises:
            TrainingStopped: the policy says stop. Nothing else of ours leaves this method.
        """
        self.catch_up(wait=context.overflows > 0)
        if self._is_agreed or not self._backend.agrees:
            self.check()
        self._note_planned(context.planned)
        for _ in range(context.overflows):
            due = self._due(context)
            dropped = overflowed(due.limits)
            self._end(due, dropped, self._judged(due, dropped))
        step = self._due(context)
        self._take_loss(step)
        doing, reading, verdict = "measure", None, Verdict()
        try:
            step.seen = self._backend.seen()
            gradients = self._backend.gather(context.factor)
            step.present = gradients.decided
            step.rules = self._chain.rules(step.present)
            agreed, decision = measure_and_decide(
                self._backend, gradients, self._chain, step.rules, step.limits, self._guard,
                apply=self.enforcing, word=self._word(step),
            )  # fmt: skip
            if self._backend.reads_host and agreed.stopping:
                self._stopping = self._stopping or stopped_before(step.number, OTHERS, "rank")
                raise self._stopping  # noqa: TRY301
            gradients, norms = agreed.gradients, agreed.norms
            if self._backend.reads_host:
                reading = self._read(gradients, norms, decision, step)
                verdict = self._judged(step, reading)
                self._investigation.look(self._backend, step, reading, verdict, is_over=False)
            self.samples.before(self._backend, step, gradients)
            doing = "apply"
            self._could_not_apply = False
            if self._backend.reads_host:
                self._act(gradients, decision, verdict)
            else:
                self._act_unread(agreed, decision, step)
            self._failures_in_a_row = 0
        except TrainingStopped:
            raise
        except RanksMissing as error:
            self._parted(step, error)
        except Exception:
            if doing == "measure":
                self._abandon()
            self._could_not_apply = doing == "apply"
            self._failed(doing, step)
            if reading is not None:
                reading, verdict = unapplied(reading), Verdict()
        step.overhead_seconds = time.perf_counter() - step.started
        if reading is not None:
            if verdict.skip or verdict.stop:
                self.samples.forget(self._backend)
            self._end(step, reading, verdict)

    def _word(self, step: DueStep) -> Word:
        """What the other processes are told with the norms."""
        context = step.context
        return Word(
            failed=self._could_not_apply,
            stopping=self._stopping is not None,
            weight=context.weight,
            planned=context.factor * context.weight,
            loss=self._notes.loss(self._chain, step),
        )

    def _abandon(self) -> None:
        """Nobody is to wait for norms that do not come."""
        try:
            self._backend.abandon(self._chain.num_keys)
        except Exception:
            self._on_error("measure")

    def _parted(self, step: DueStep, error: Exception) -> None:
        """The processes cannot agree any more; stops the run where the policy is to be enforced."""
        self._on_error("measure")
        if self.enforcing and self._guard.on_error == "stop":
            raise stopped_before(
                step.number, f"{error}, guard.on_error is stop", "on_error"
            ) from error
        self.enforcing = False

    def stepped(self) -> None:
        """The optimizer has made its update."""
        self.samples.stepped(self._backend)

    def _note_planned(self, planned: int) -> None:
        """More or fewer micro-batches in a step move the norm: its noise goes with 1/sqrt(B)."""
        if planned and self._planned and planned != self._planned:
            self._chain.begin_again(math.sqrt(self._planned / planned))
        self._planned = planned or self._planned

    def catch_up(self, *, wait: bool) -> None:
        """Ends the steps whose decisions have come from the device meanwhile.

        One skip too many among them stops the run at the next step.
        """
        if not self._backend.reads_host:
            with self.reading:
                self._catch_up(wait=wait)

    def _catch_up(self, *, wait: bool) -> None:
        try:
            arrived = list(self._backend.arrived(wait=wait))
        except Exception:
            self._on_error("readback")
            return
        for vector, step in arrived:
            if callable(step):
                step(vector)
                continue
            self.num_steps = max(self.num_steps, step.number + 1)  # of a graph: counted there
            try:
                self._finish(step, unpack(vector, len(step.rules), len(self._chain.measures)))
            except TrainingStopped as stopped:
                self._stopping = self._stopping or stopped

    def _due(self, context: StepContext) -> DueStep:
        step = DueStep(
            number=self.num_steps,
            started=time.perf_counter(),
            time=time.time(),
            context=context,
            limits=self._chain.limits(self.num_steps),
            present=bytes(self._num_parameters),
            rules=(),
            is_lapsed=self._policy.mode == "enforce" and not self.enforcing,
        )
        self.num_steps += 1
        self._skipped = None
        return step

    def _read(self, gradients: Any, norms: Norms, decision: Decision, step: DueStep) -> Reading:
        scale, found_inf = gradients.loss_scale, gradients.found_inf
        first_norm = step.context.first_norm
        measures = compared(self._chain.measures, step.rules, norms, decision, self._backend.xp)
        reading = Reading(
            first_norm=math.nan if first_norm is None else float(first_norm),
            limits=tuple(float(least(limit)) for limit in step.limits),
            total_norm=float(decision.total_norm),
            total_norm_clipped=float(decision.total_norm_clipped),
            over=tuple(bool(over) for over in decision.over),
            loss_scale=math.nan if scale is None else float(scale),
            overflow=found_inf is not None and bool(found_inf != 0),
            norms_Q=self._backend.host(norms[2.0]),
            kept_Q=self._backend.host(decision.kept_P),
            measures=tuple(map(self._backend.host, measures)),
        )
        usable = math.isfinite(reading.total_norm) and not reading.overflow
        self._chain.learn(decision, usable)
        return reading

    def _act(self, gradients: Any, decision: Decision, verdict: Verdict) -> None:
        if self.enforcing and not verdict.stop and verdict.skip != OVERFLOW:
            act(self._backend, gradients, decision, verdict)

    def _act_unread(self, agreed: Agreed, decision: Decision, step: DueStep) -> None:
        gradients, norms, xp = agreed.gradients, agreed.norms, self._backend.xp
        if self.enforcing:
            skip = skips(self._guard, step.rules, decision, xp)
            self._backend.apply(gradients, decision.coefs_P, skip)
        self._chain.learn(decision, xp.isfinite(decision.total_norm))
        scale, found_inf = gradients.loss_scale, gradients.found_inf
        measures = compared(self._chain.measures, step.rules, norms, decision, xp)
        packed = pack(
            decision, step.limits, norms[2.0], scale, found_inf, xp, measures,
            step.context.first_norm, agreed.stopping,
        )  # fmt: skip
        self._backend.send(packed, step)

    def _finish(self, step: DueStep, reading: Reading) -> None:
        """Judges and ends a step of which the host learns when it is over."""
        self._take_loss(step)
        verdict = self._judged(step, reading)
        if reading.stopping and self._backend.agrees:  # known to all behind the same step
            self._stopping = self._stopping or stopped_before(self.num_steps, OTHERS, "rank")
            self._is_agreed = True
        # Its weights are those of now where nothing was updated since.
        is_over = not (self.enforcing and verdict.skip) or self.num_steps > step.number + 1
        self._investigation.look(self._backend, step, reading, verdict, is_over=is_over)
        self._end(step, reading, verdict)

    def _take_loss(self, step: DueStep) -> None:
        """What was logged before a step; from a device it comes when the step does."""
        step.loss, times = self._recorder.loss_of(step.number)
        step.is_loss_whole = times >= step.context.micro_batches

    def _judged(self, step: DueStep, reading: Reading) -> Verdict:
        verdict, self._skips = judge(
            self._guard, step.rules, reading.over, reading.total_norm, self._skips, step.number,
            overflow=reading.overflow,
        )  # fmt: skip
        self._notes.warn(step, reading)
        return Verdict() if step.is_lapsed and verdict.skip != OVERFLOW else verdict

    def _end(self, step: DueStep, reading: Reading, verdict: Verdict) -> None:
        """Hands a step over to the recorder.

        Raises:
            TrainingStopped: the verdict is to stop.
        """
        if (self.enforcing and not verdict.stop) or verdict.skip == OVERFLOW:
            self._skipped = verdict.skip
        try:
            self._recorder.append(self._row(step, reading, verdict))
        except Exception:
            self._on_error("readback")
        self._investigation.conclude()
        self._last_started = step.started
        if verdict.stop and self.enforcing:
            raise stopped_before(step.number, verdict.stop, verdict.skip or "")

    def _row(self, step: DueStep, reading: Reading, verdict: Verdict) -> Row:
        context, scale = step.context, reading.loss_scale
        scale = scale if math.isfinite(scale) else context.loss_scale
        if not verdict.skip:
            first = reading.first_norm / scale if scale > 0 else reading.first_norm
            self._noise.observe(first, context.first_weight, reading.total_norm, context.weight)
        return row_of(
            step, reading, count=self._num_parameters, clips=not (verdict.skip or step.is_lapsed),
            skipped=self._reason_code.get(verdict.skip or "", 0), loss_scale=scale,
            noise_scale=self._noise.value, duration_seconds=step.started - self._last_started,
        )  # fmt: skip

    def _failed(self, component: str, step: DueStep) -> None:
        """Counts a failure to decide or to apply, and does what `guard.on_error` says."""
        self._on_error(component)
        self._failures_in_a_row += 1
        if not self.enforcing or self._failures_in_a_row < TOLERATED_FAILURES:
            return
        if self._guard.on_error == "stop":
            message = f"gradwatch failed {self._failures_in_a_row} times in a row to {component}"
            raise stopped_before(step.number, f"{message}, guard.on_error is stop", "on_error")
        self.enforcing = False
        say(
            logging.CRITICAL,
            "gradwatch failed %d times in a row to %s: the policy is no longer enforced "
            "(guard.on_error is observe)", self._failures_in_a_row, component,
        )  # fmt: skip
