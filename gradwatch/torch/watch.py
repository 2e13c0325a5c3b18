"""A watch on a torch model: hooked to the optimizer's step."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, SupportsFloat

import torch

from gradwatch.accumulation import Closed, MicroBatch
from gradwatch.backend import StepContext
from gradwatch.errors import PolicyError, TrainingStopped
from gradwatch.policy import Policy, check_against
from gradwatch.records import Layout
from gradwatch.rules.detect_sampled import samples_every
from gradwatch.run_info import run_info
from gradwatch.saying import say
from gradwatch.torch.accumulate import MarkedLoop, UnchangedLoop
from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.containers import learning_rate
from gradwatch.torch.culprit import ClueFinder
from gradwatch.torch.gradients import drop
from gradwatch.torch.hooks import BackwardCounter, StepHooks, innermost, refuse_watched
from gradwatch.torch.layers import watched_parameters
from gradwatch.torch.noise import FirstMicroBatch
from gradwatch.torch.own_gradient import OwnGradient
from gradwatch.torch.plan import plan_for
from gradwatch.torch.ranks import ranks_of
from gradwatch.torch.reduction import Reduction
from gradwatch.torch.refusals import (
    accumulates_for_the_loop,
    is_captured,
    refuse_to_enforce,
    refuse_unknown_updates,
)
from gradwatch.torch.scaling import follower
from gradwatch.torch.shared import SharedBackend
from gradwatch.torch.state import as_arrays, as_tensors
from gradwatch.torch.together import culprits_for, refuse_scaler, together
from gradwatch.watch import Watch

__all__ = ["TorchWatch"]


class TorchWatch(Watch):
    """Watches the parameters that an optimizer updates; without one, all of the model's."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        policy: Policy,
        *,
        run: str,
        recording: str | None,
        version: str,
        started: float,
        pid: int,
        scaler: Any = None,
        distributed: bool | None = None,
        shard_keys: Mapping[str, Hashable] | None = None,
    ) -> None:
        """
        Raises:
            AttachError: this model or optimizer cannot be watched.
            PolicyError: the policy does not fit the model.
        """
        self._optimizer = None if optimizer is None else innermost(optimizer)
        if self._optimizer is not None:
            refuse_watched(self._optimizer)
            refuse_to_enforce(policy, self._optimizer)
        tensors, parameters = watched_parameters(model, self._optimizer)
        share = together(model, tensors, parameters, policy, distributed, shard_keys)
        known = parameters if share is None or not share.agrees else share.parameters
        layout = Layout.of(known, policy.grouping)
        check_against(policy, layout)
        refuse_unknown_updates(policy, self._optimizer)
        info = run_info(
            model, policy, layout, framework=f"torch {torch.__version__}", run=run,
            rank=0 if share is None else share.rank, device=str(tensors[0].device),
            version=version, started=started, pid=pid,
        )  # fmt: skip
        for_the_loop = accumulates_for_the_loop(policy)
        self._policy = policy
        self._compares_loss = any(rule.measure == "loss" for rule in policy.clip)
        self._described = parameters
        self._model = weakref.ref(model)
        self._num_known = 0 if self._optimizer is None else _count(self._optimizer)
        self._scaler = follower(scaler, optimizer)
        refuse_scaler(share, self._scaler)
        self.plan = plan_for(policy, layout, self._optimizer, tensors)
        if share is not None and share.agrees:
            self._backend: TorchBackend = SharedBackend(tensors, self._optimizer, self.plan, share)
        else:
            self._backend = TorchBackend(tensors, self._optimizer, self.plan)
        super().__init__(info, policy, self._backend, recording)
        how = culprits_for(policy, model, share) if policy.detect.nonfinite else "none"
        window = self.window  # the hooks of the model must not hold the watch
        finder = ClueFinder(model, tensors, how, self.pipeline.report, lambda: window.count > 0)
        self._backend.finder = finder
        order = weakref.WeakMethod(self._backend.order)
        self.pipeline.consumer.order = lambda: () if (of := order()) is None else of()
        self._is_one_of_several = share is not None
        if share is not None:
            self._backend.ranks = ranks_of(share, tensors, layout, policy.detect, self.pipeline)
        # Where parameters are split their gradients are never those of one process.
        is_split = share is not None and share.is_split
        if not is_split and (share is not None or how in ("replay", "always")):
            self._backend.own = OwnGradient(tensors, self.pipeline.report)
        self.follows_its_policy = share is None  # ranks would take it over at different steps
        if self.plan.reason:
            say(logging.WARNING, "gradwatch %s", self.plan)
        update = int if self._scaler is None else self._scaler.update
        self._first = FirstMicroBatch(self._backend.parameters)
        ask = self._backend.numbers if isinstance(self._backend, SharedBackend) else None
        reduction = Reduction(model, self._accumulate, ask)
        self._marked_loop = MarkedLoop(
            self._backend.parameters, self.window, self._first, reduction
        )
        divides = self._accumulate is not None and self._accumulate.drive == "loop"
        self._counter = BackwardCounter(tensors, update, self._first_of_loop if divides else None)
        self._passes, self._overflows, self._loss_scale = 1, 0, math.nan
        self._is_ahead = False
        self._hooks: StepHooks | None = None
        if self._optimizer is not None:
            self._hooks = StepHooks(self._optimizer, self._at_step, self._disarm)
            self._engine.samples.every = samples_every(policy.detect)

        self._unchanged: UnchangedLoop | None = None
        if for_the_loop and self._optimizer is not None:
            self._unchanged = UnchangedLoop(tensors, self.window, self._first, reduction)

    @torch.no_grad()
    def process(self) -> None:
        if self._optimizer is not None and _count(self._optimizer) != self._num_known:
            try:
                self._extend()
            except Exception as error:
                self._broke("watch the parameters that were added", error,
                            "they are neither watched nor clipped")  # fmt: skip
        if self._is_due():
            super().process()
            self._sample_ranks()

    def _sample_ranks(self) -> None:
        scale = self._loss_scale if math.isfinite(self._loss_scale) else 1.0
        try:
            self._backend.sample_ranks(self._engine.num_steps - 1, scale)
        except Exception:
            self.pipeline.report("measure")

    def process_ahead(self) -> None:
        """`process` of a step that is due, before something else touches its gradients.

        For trainers that clip: the call of `step()` that follows does nothing more.
        """
        self.process()
        self._is_ahead = True

    def _at_step(self) -> None:
        is_ahead, self._is_ahead = self._is_ahead, False
        device = self._backend.parameters[0].device
        if not is_ahead and not is_captured(device, enforcing=self._engine.enforcing):
            self.process()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = as_tensors(super().state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(as_arrays(state))

    def _extend(self) -> None:
        """Takes parameters in that were added to the optimizer."""
        assert self._optimizer is not None
        self._num_known = _count(self._optimizer)
        model = self._model()
        tensors, described = watched_parameters(model or torch.nn.Module(), self._optimizer)
        known = {id(tensor) for tensor in self._backend.parameters}
        new = [i for i, tensor in enumerate(tensors) if id(tensor) not in known]
        if not new:
            return
        tensors = self._backend.parameters + [tensors[i] for i in new]
        self._described += [described[i] for i in new]
        layout = Layout.of(self._described, self._policy.grouping)
        self.plan = plan_for(self._policy, layout, self._optimizer, tensors)
        self._backend.disarm()
        before = self._backend
        self._backend = TorchBackend(tensors, self._optimizer, self.plan, finder=before.finder)
        self._backend.ranks, self._backend.own = before.ranks, before.own
        self._counter.extend(tensors)
        self._engine.extend(self._backend, layout)
        loops = (self._first, self._marked_loop, self._unchanged)
        for loop in loops:
            if loop is not None:
                loop.extend(tensors)
        say(
            logging.WARNING,
            "%d parameters were added to the optimizer, %s first: the policy holds for them too, "
            "but they have no layer in the metrics and the recording of this run. Attach again to "
            "have one", len(new), described[new[0]].name,
        )  # fmt: skip

    def _is_due(self) -> bool:
        """Whether this call of `step()` ends a window; the gradients are put by where not.

        Raises:
            PolicyError: the loop accumulates by itself, which the policy denies.
            TrainingStopped: a micro-batch was lost, and the policy says stop.
        """
        passes = self._counter.take()
        self._passes = passes.count
        self._loss_scale, backoffs = self._scaled()
        # The scaler of several optimizers backs off for any of them.
        self._overflows = min(backoffs, passes.earlier)
        if self._unchanged is None or self._marked:
            return True
        switches = self._backend.switches
        scaled = (None, None) if switches is None else (switches.loss_scale, switches.found_inf)
        self.window.step = self._engine.num_steps
        self._overflows = 0  # what was dropped was a micro-batch
        try:
            return self._unchanged.is_due(self._passes, *scaled)
        except PolicyError:
            raise
        except Exception as error:
            self._lost(error)
            return True

    def _lost(self, error: Exception) -> None:
        """Accumulation broke, and with it at least one micro-batch is gone."""
        self._unchanged = None
        self.window.close()
        self._broke("accumulate", error, "each call of step() is a step from now on")

    def _broke(self, what: str, error: Exception, after: str) -> None:
        """Something failed that does not come again: no use in waiting for three in a row.

        Raises:
            TrainingStopped: the policy says stop.
        """
        self.pipeline.report("apply")
        step, said = self._engine.num_steps, f"{type(error).__name__}: {error}"
        if self._engine.enforcing and self._policy.guard.on_error == "stop":
            raise TrainingStopped(
                f"stopped before the update of step {step}: gradwatch failed to {what} ({said}), "
                "guard.on_error is stop",
                step=step,
                reason="on_error",
            ) from error
        say(logging.CRITICAL, "gradwatch failed to %s (%s): %s", what, said, after)

    def _scaled(self) -> tuple[float, int]:
        """The loss scale, and the steps that its scaler has dropped unseen since the last one."""
        switches = self._backend.switches
        if self._scaler is None:
            return math.nan, 0
        # A fused optimizer is called for those too, and told.
        told = switches is not None and switches.found_inf is not None
        if told and not self._backend.reads_host:
            return math.nan, 0
        try:
            scale, dropped = self._scaler.step()
        except Exception:
            self.pipeline.report("measure")
            return math.nan, 0
        return scale, 0 if told else dropped

    def _change(self, policy: Policy) -> None:
        super()._change(policy)
        self._policy = policy

    def _begin_epoch(self, loader: object, partial: str) -> None:
        self._marked_loop.begin(loader, partial)

    def _micro_began(self, micro: MicroBatch[Any]) -> None:
        try:
            self._marked_loop.began(micro)
        except Exception as error:
            self._broke("hold back the reduction of gradients", error, "each micro-batch reduces")

    def _micro_ended(self, micro: MicroBatch[Any]) -> None:
        try:
            self._marked_loop.ended(micro)
        except Exception as error:
            self._broke("add up half-precision gradients", error, "micro-batches were lost")

    def _first_of_loop(self) -> None:
        """The first pass of a loop that divides has ended."""
        try:
            self.window.step = self._engine.num_steps
            if self.window.num_steps > 1:
                self._first.measure(float(self.window.num_steps))
        except Exception:
            self.pipeline.report("measure")

    def _first_norm(self, closed: Closed) -> torch.Tensor | None:
        """Of the first micro-batch, as the step's gradients are scaled."""
        norm = self._first.take()
        if norm is None or self._is_one_of_several:
            return None  # of one process, where the step's gradient is of all
        if self._unchanged is not None and not self._marked:
            switches = self._backend.switches
            scale = None if switches is None else switches.loss_scale
            norm = norm if scale is None else norm * scale
        is_sum = self._accumulate is not None and self._accumulate.weigh == "sum"
        return norm * closed.weight if is_sum else norm

    def _context(self) -> StepContext:
        closed = self._closed_window()
        self.window.step = self._engine.num_steps + self._overflows + 1
        return StepContext(
            planned=closed.planned,
            first_norm=self._first_norm(closed),
            first_weight=self.window.first_weight,
            micro_batches=closed.micro_batches,
            weight=closed.weight,
            factor=closed.factor if self._engine.enforcing else 1.0,
            learning_rate=learning_rate(self._optimizer),
            loss_scale=self._loss_scale,
            overflows=self._overflows,
        )

    def _closed_window(self) -> Closed:
        if self.window.count:
            return self.window.close(divided=self._marked)
        count = max(1, self._passes)
        if self._accumulate is None or self._accumulate.drive == "hook" or self._passes == 0:
            return Closed(count, float(count), 1.0)
        self.window.step = self._engine.num_steps
        return self.window.counted(self._passes)

    def _how(self) -> str:
        return f"; {self.plan}" if self.plan.on_accelerator else ""

    def _discard(self) -> None:
        drop(self._backend.parameters)
        self._backend.seen()
        self._marked_loop.clear()

    def _has_gradients(self) -> bool:
        if self._marked_loop.holds_sums:
            return True
        grads = (parameter.grad for parameter in self._backend.parameters)
        return any(grad is not None and bool(grad.any()) for grad in grads)

    def _abandon(self) -> None:
        if self._unchanged is not None:
            self._unchanged.abandon()

    def _end_window(self) -> None:
        due = self._backward_seen()
        if self._unchanged is not None and not self._marked and self._unchanged.end(due):
            assert self._optimizer is not None
            self._optimizer.step()

    def _disarm(self) -> None:
        self._backend.disarm()
        self._engine.stepped()
        self._backend.seen()
        self._counter.take()  # a line search goes on evaluating within the step

    def _sends(self, name: str, value: SupportsFloat) -> bool:
        if self._compares_loss:
            return False
        recorder = self.pipeline.recorder
        step = recorder.step_of(
            name, num_steps=self._engine.num_steps, backward_seen=self._backward_seen()
        )
        return self._backend.sends(value, lambda host: recorder.put(name, step, float(host[0])))

    def _number(self, value: SupportsFloat) -> float:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)

    def _backward_seen(self) -> bool:
        return self._counter.count > 0

    def _detach(self) -> None:
        self._counter.remove()
        if self._backend.finder is not None:
            self._backend.finder.remove()
        if self._backend.own is not None:
            self._backend.own.remove()
        self._backend.disarm()
        self._abandon()
        if self._hooks is not None:
            self._hooks.remove()


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
