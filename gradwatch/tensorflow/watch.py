"""A watch on Keras with TensorFlow: hooked to the optimizer, deciding in the graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, cast

import tensorflow as tf

from gradwatch.backend import Backend
from gradwatch.errors import AttachError, GradwatchError, TrainingStopped
from gradwatch.policy import Policy, check_against
from gradwatch.records import Layout, StepRecord
from gradwatch.rule_notes import say_anew
from gradwatch.run_info import run_info
from gradwatch.tensorflow.accumulate import Accumulator
from gradwatch.tensorflow.applying import Update, replicas, summed, unconverted
from gradwatch.tensorflow.decisions import Decisions, Facts
from gradwatch.tensorflow.frameworks import (
    build,
    inner_of,
    is_keras,
    learning_rate_of,
    loss_scale_of,
    own_update,
    scales_loss,
    strategy_of,
)
from gradwatch.tensorflow.hooks import (
    AccumulationHook,
    LossOfTrace,
    OptimizerHook,
    TrainFunctionHook,
)
from gradwatch.tensorflow.layers import described, device_of, trainable_of
from gradwatch.tensorflow.notes import NoteOfTrace
from gradwatch.tensorflow.places import Places
from gradwatch.tensorflow.reader import REST_SECONDS, GraphSteps, ReadingThread
from gradwatch.tensorflow.refusals import (
    refuse_clipping_optimizer,
    refuse_for_torch,
    refuse_in_graph,
    refuse_to_skip,
    told_apart,
    windows_of_keras,
    windows_of_loop,
)
from gradwatch.watch import Watch

__all__ = ["TFWatch"]


class TFWatch(Watch):
    """Watches the trainable variables of a model, in every graph that its optimizer is traced in.

    A step is decided in the graph and read by a thread some 0.5 s later.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
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
            PolicyError: the policy does not fit the model, or asks for what a graph cannot give.
        """
        refuse_for_torch(scaler=scaler, distributed=distributed, shard_keys=shard_keys)
        model, optimizer = told_apart(model, optimizer)
        refuse_in_graph(policy)
        variables = trainable_of(model, optimizer)
        layout = Layout.of(described(model, variables), policy.grouping)
        check_against(policy, layout)
        self._strategy = strategy_of(model, optimizer)
        windows = None
        if optimizer is not None:
            refuse_clipping_optimizer(policy, optimizer)
            count = self._strategy.num_replicas_in_sync
            windows = windows_of_keras(policy, optimizer, replicas=count)
            build(optimizer, variables, self._strategy)
        info = run_info(
            optimizer if model is None else model, policy, layout,
            framework=f"tensorflow {tf.__version__}", device=device_of(variables[0]),
            run=run, version=version, started=started, pid=pid,
        )  # fmt: skip
        self._policy = policy
        self._windows = windows
        self._places = Places(variables)
        self._variables = variables
        self._optimizer = optimizer
        self._decisions = Decisions(
            policy, layout, self._strategy, variables, updates_seen=optimizer is not None
        )
        self._steps = steps = GraphSteps(self._decisions)
        # The engine reads here, and never takes a step itself.
        super().__init__(info, policy, cast(Backend, steps), recording)
        self.follows_its_policy = False  # its numbers are in the graph
        steps.recorder = self.pipeline.recorder
        steps.take_sample = self._engine.samples.record
        self._thread: ReadingThread | None = None
        self._hooks: list[Any] = []
        self._loss: LossOfTrace | None = None
        self._accumulated = NoteOfTrace()
        """Micro-batches and weight of the window that was taken last."""

        try:
            self._hook(model, optimizer)
        except BaseException:
            self.close()
            raise
        self.pipeline.consumer.rest_seconds = 2 * REST_SECONDS  # it is woken when steps were read
        self._thread = ReadingThread(self._read, steps.rest_seconds)

    def _hook(self, model: Any, optimizer: Any) -> None:
        if optimizer is not None and self._windows is not None:
            self._hooks.append(
                AccumulationHook(inner_of(optimizer), self._rule_of_window, self._decisions.updated)
            )
        elif optimizer is not None:
            update = own_update(optimizer)
            self._hooks.append(
                OptimizerHook(optimizer, lambda g, v: self._decide(optimizer, update, g, v))
            )
        if optimizer is None or getattr(model, "optimizer", None) is not optimizer:
            return
        if self._windows is None and is_keras(optimizer):
            self._loss = LossOfTrace(model)
            self._hooks.append(self._loss)
        self._hooks.append(TrainFunctionHook(model, self._ran))

    # In a graph, or eagerly

    @unconverted
    def process(
        self,
        grads: Sequence[Any] | None = None,
        variables: Sequence[Any] | None = None,
        loss_scale: Any = None,
    ) -> Any:
        """Measures and clips the gradients of a GradientTape loop, in a `tf.function` or eagerly.

        Args:
            grads: as `tape.gradient` gives them; None for variables without one.
            variables: whose they are; by default all that are watched, in order.
            loss_scale: what they are multiplied by, where they are.

        Returns:
            The gradients to give to an optimizer that is not attached.

        Raises:
            PolicyError: the policy drops steps, which is the business of `apply_gradients`.
            AttachError: this is one of several replicas, whose gradient is not the whole.
        """
        if grads is None:
            raise TypeError(
                "watch.process needs gradients in TensorFlow: process(grads, variables)"
            )
        if self._optimizer is not None:
            raise AttachError(
                f"this watch acts when its {type(self._optimizer).__name__} makes its update, and "
                "watch.process would clip twice. Leave it out, or attach the model without the "
                "optimizer"
            )
        if replicas() > 1:
            raise AttachError(
                "watch.process is called by one of several replicas, before their gradients are "
                "summed: the norm of a part is not that of the whole. Use "
                "watch.apply_gradients(optimizer, zip(gradients, variables))"
            )
        refuse_to_skip(self._policy)
        variables = self._variables if variables is None else variables
        micro_batches, weight = self._accumulated.take() or (1.0, 1.0)
        facts = Facts(micro_batches=micro_batches, weight=weight)
        return self._ruled(list(grads), list(variables), facts, loss_scale)[0]()

    @unconverted
    def apply_gradients(self, optimizer: Any, grads_and_vars: Iterable[tuple[Any, Any]]) -> None:
        """Lets an optimizer make its update as the policy says, in any replica context.

        Gradients are summed over the replicas first. A step that is skipped leaves weights and the
        state of the optimizer as they are.

        Args:
            optimizer: attached or not; of Keras 3 or tf_keras.
        """
        grads, variables = (list(column) for column in zip(*grads_and_vars, strict=True))
        if optimizer is self._optimizer:
            optimizer.apply_gradients(list(zip(grads, variables, strict=True)))
            return
        build(optimizer, variables, self._strategy)
        self._decide(optimizer, own_update(optimizer), grads, variables)

    def accumulator(self, every: int | None = None) -> Accumulator:
        """Adds up the gradients of several micro-batches of a GradientTape loop.

            acc = watch.accumulator(every=4)

            @tf.function
            def micro(x, y, boundary: bool):
                with tf.GradientTape() as tape:
                    loss = mean_loss(x, y)
                acc.add(tape.gradient(loss, variables), weight=tf.shape(x)[0])
                if boundary:
                    watch.apply_gradients(optimizer, zip(acc.take(), variables))

            for x, y in batches:
                micro(x, y, acc.boundary())

        Args:
            every: micro-batches in a step; by default those of the policy's `accumulate`.

        Raises:
            PolicyError: neither says how many.
        """
        every, weigh, partial = windows_of_loop(self._policy, every)
        return Accumulator(
            every, self._variables, self._strategy, weigh, partial, self._accumulated.put
        )

    def _decide(
        self, optimizer: Any, update: Update, grads: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        loss = None if self._loss is None else self._loss.take()
        *values, loss = summed([*grads, loss])
        micro_batches, weight = self._accumulated.take() or (1.0, 1.0)
        facts = Facts(
            learning_rate=learning_rate_of(optimizer), loss=loss,
            micro_batches=micro_batches, weight=weight,
        )  # fmt: skip
        scale, scaler = loss_scale_of(optimizer), scales_loss(optimizer)
        ruled, skip = self._ruled(values, list(variables), facts, scale, loss_scaler=scaler)
        update.unless(skip, ruled, variables)
        self._decisions.updated(skip)

    def _rule_of_window(
        self, grads: Sequence[Any], variables: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        """The mean of a window that Keras has accumulated, unscaled."""
        assert self._windows is not None
        facts = Facts(
            learning_rate=learning_rate_of(self._optimizer),
            micro_batches=float(self._windows),
            weight=float(self._windows),
        )
        ruled, skip = self._ruled(list(grads), list(variables), facts, None)
        return ruled(), skip

    def _ruled(
        self, grads: list[Any], variables: list[Any], facts: Facts, scale: Any, **how: bool
    ) -> tuple[Callable[[], list[Any]], Any]:
        """Gives what the optimizer is due to see, and says whether it is not.

        Raises:
            AttachError: a variable is not watched.
            TrainingStopped: the rules could not be traced, and the policy is to be enforced.
        """
        places, gradients = self._places.gathered(grads, variables, scale)
        try:
            ruling = self._decisions.rule(gradients, facts, **how)
        except GradwatchError:
            raise
        except Exception as error:
            self._broke(error)
            return lambda: grads, None

        def ruled() -> list[Any]:
            seen = list(grads)
            for place, value in zip(places, ruling.scaled(), strict=True):
                seen[place] = value
            return seen

        return ruled, ruling.skip

    def _broke(self, error: Exception) -> None:
        """A graph that could not be traced; there is none without a word."""
        self.pipeline.report("measure")
        if self._engine.enforcing and self._policy.guard.on_error == "stop":
            raise TrainingStopped(
                f"gradwatch failed to trace its rules ({type(error).__name__}: {error}), "
                "guard.on_error is stop",
                step=self._engine.num_steps,
                reason="on_error",
            ) from error
        self._engine.enforcing = False
        self.pipeline.tally.set_enforcing(False)

    # On the host

    def history(self, count: int) -> list[StepRecord]:
        self._engine.catch_up(wait=True)
        return super().history(count)

    def log(self, **scalars: SupportsFloat) -> None:
        """Puts numbers beside the step just done: `watch.log(loss=loss)`."""
        with self._engine.reading:
            self._engine.num_steps = max(self._engine.num_steps, self._decisions.num_steps())
            super().log(**scalars)

    def check(self) -> None:
        """For loops of your own, between two steps: has the policy ended the run?

        From the step on that ended it no update is made, whether this is called or not. Under
        `fit` it is called behind each call of the train function.

        Raises:
            TrainingStopped: it has.
        """
        if self._decisions.has_stopped():
            self._engine.catch_up(wait=True)
        try:
            self._engine.check()
        except TrainingStopped:
            self._decisions.stop()
            self.pipeline.stopped = True
            self.pipeline.tally.set_state("stopped")
            raise

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["engine"]["rules"] = self._decisions.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        engine = state["engine"]
        say_anew(self._decisions.load_state_dict(engine["rules"], int(engine["num_steps"])))

    def _ran(self) -> None:
        if self._policy.enforcing:
            self.check()

    def _read(self) -> float:
        """On the thread that reads; returns for how many seconds it may rest."""
        self._engine.catch_up(wait=True)
        if (
            self._engine.is_stopping
            and self._policy.enforcing
            and not self._decisions.has_stopped()
        ):
            self._decisions.stop()
        self.pipeline.consumer.wake()
        return self._steps.rest_seconds

    def _number(self, value: SupportsFloat) -> float:
        return float(value.numpy() if hasattr(value, "numpy") else value)

    def _how(self) -> str:
        return "; decides in the graph"

    def _detach(self) -> None:
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks.clear()
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
