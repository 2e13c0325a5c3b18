"""From the gradients of a loop to the update: sum over replicas, then update or not.

    values  ->  summed (over replicas)  ->  Decisions.rule  ->  updateunless(skip)

Gradients are summed over the replicas before anything is measured, and the optimizer is kept from
summing them again: what is clipped is the gradient of the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from gradwatch.errors import AttachError

__all__ = [
    "Update",
    "is_all_on_cpu",
    "is_compiled_here",
    "plain",
    "replicas",
    "summed",
    "unconverted",
    "unless",
]


Function = TypeVar("Function", bound=Callable[..., Any])


def unconverted(function: Function) -> Function:
    """Left as it is in a `tf.function` of the user's: AutoGraph would rewrite all of gradwatch that
    is called from there, and warns of what it cannot."""
    return cast(Function, tf.autograph.experimental.do_not_convert(function))


def replicas() -> int:
    """How many train together here.

    Raises:
        AttachError: this is no place where one of them runs.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise AttachError(
            "gradients are applied within strategy.run(...): outside of it there is no replica "
            "whose gradient could be summed with those of the others"
        )
    return int(context.num_replicas_in_sync)


def summed(values: Sequence[Any]) -> list[Any]:
    """Over the replicas that train together; None stays None."""
    if replicas() == 1:
        return list(values)
    given = [value for value in values if value is not None]
    context = tf.distribute.get_replica_context()
    found = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, given) if given else ())
    return [None if value is None else next(found) for value in values]


@dataclass(frozen=True, slots=True)
class Update:
    """What an optimizer does with gradients that are summed already."""

    apply: Callable[[Sequence[Any], Sequence[Any]], Any]
    optimizer: Any
    summing: Any = None
    """The optimizer of Keras 3 that would sum them over the replicas; None where none would."""

    def unless(
        self, skip: Any, ruled: Callable[[], Sequence[Any]], variables: Sequence[Any]
    ) -> None:
        """Makes the update with the gradients that `ruled` gives, where `skip` (0-d, or None for
        never) is false.

        With several replicas the condition stands outside of them: an update within one of them
        meets the others, which no branch of a replica may.
        """
        if replicas() == 1:
            if skip is not None and is_compiled_here():
                self._taken_back(skip, ruled(), variables)
            else:
                unless(skip, lambda: self.apply(ruled(), variables))
            return

        def across(strategy: Any, skip: Any, gradients: list[Any]) -> None:
            # The variables are no arguments, of which a replica would be given its own part.
            def apply(gradients: list[Any]) -> None:
                self.apply(gradients, variables)

            def update() -> None:
                with _not_summing(self.summing):
                    strategy.extended.call_for_each_replica(apply, args=(gradients,))

            unless(None if skip is None else strategy.experimental_local_results(skip)[0], update)

        context = tf.distribute.get_replica_context()
        context.merge_call(across, args=(skip, list(ruled())))

    def _taken_back(self, skip: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Makes the update, and the values from before where it is skipped: XLA fuses the choice
        into the update, while a branch would copy all that it may change."""
        own = self.optimizer.variables
        held = [plain(v) for v in (*variables, *(own() if callable(own) else own))]
        before = [variable.read_value() for variable in held]
        self.apply(gradients, variables)
        for variable, value in zip(held, before, strict=True):
            variable.assign(tf.where(skip, value, variable.read_value()))


def is_compiled_here() -> bool:
    """Whether what is traced is a function that XLA compiles."""
    try:
        return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
    except AttributeError:  # of a later TensorFlow: slower, and as right
        return False


@functools.cache
def is_all_on_cpu() -> bool:
    """Whether there is no accelerator, which reduces in ways of its own and is waited for at each
    branch."""
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def plain(variable: Any) -> Any:
    """The tf.Variable of one of Keras."""
    value = getattr(variable, "value", None)
    return variable if value is None or callable(value) else value


def unless(skip: Any, update: Callable[[], Any]) -> None:
    """Calls where `skip` (0-d, or None for never) is false."""

    def updated() -> None:
        update()

    if skip is None:
        updated()
    else:
        tf.cond(skip, lambda: None, updated)


@contextmanager
def _not_summing(optimizer: Any) -> Iterator[None]:
    """While an update is traced, of one that would sum gradients that are summed."""
    if optimizer is None:
        yield
        return
    name = "_all_reduce_sum_gradients"
    optimizer.__dict__[name] = list
    try:
        yield
    finally:
        del optimizer.__dict__[name]
