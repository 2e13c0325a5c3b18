"""Where gradwatch sits in Keras: on the method of an optimizer that makes its updates, and around
the function of a model that runs them.

Both are entries of the object itself and come off again. Nothing of them is saved with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradwatch.errors import AttachError
from gradwatch.tensorflow.applying import unconverted, unless
from gradwatch.tensorflow.frameworks import hooked_name, is_keras
from gradwatch.tensorflow.notes import NoteOfTrace

__all__ = ["AccumulationHook", "LossOfTrace", "OptimizerHook", "TrainFunctionHook"]

MARK = "gradwatch_hook"

Decide = Callable[[Sequence[Any], Sequence[Any]], None]
"""Gradients and their variables; makes the update, or not."""

Rule = Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], Any]]
"""Gradients and their variables -> what the optimizer is due to see; whether not (0-d or None)."""


class Entries:
    """Methods of one object, replaced and put back."""

    def __init__(self, of: Any) -> None:
        self._of = of
        self._before: dict[str, Any] = {}

    def put(self, name: str, method: Any) -> None:
        held = self._of.__dict__
        if getattr(held.get(name), MARK, False):
            raise AttachError(
                f"this {type(self._of).__name__} is watched already, and two watches would clip "
                "twice. Close the first one (watch.close()) before attaching again."
            )
        self._before[name] = held.get(name)
        setattr(method, MARK, True)
        held[name] = method  # not setattr, by which Keras would track it

    def remove(self) -> None:
        for name, before in self._before.items():
            if before is None:
                self._of.__dict__.pop(name, None)
            else:
                self._of.__dict__[name] = before
        self._before.clear()


class OptimizerHook:
    """Runs `decide` in place of each update of an optimizer."""

    def __init__(self, optimizer: Any, decide: Decide) -> None:
        self._entries = Entries(optimizer)

        def apply(grads: Any, trainable_variables: Any = None) -> None:
            variables = trainable_variables
            if variables is None:
                variables = optimizer._trainable_variables
            decide(list(grads), list(variables))

        def apply_gradients(grads_and_vars: Any, *_: Any, **__: Any) -> Any:
            grads, variables = zip(*grads_and_vars, strict=True)
            decide(list(grads), list(variables))
            return optimizer.iterations

        method = apply if is_keras(optimizer) else apply_gradients
        self._entries.put(hooked_name(optimizer), unconverted(method))

    def remove(self) -> None:
        self._entries.remove()


class AccumulationHook:
    """Where Keras accumulates by itself, inside of its window: on the mean, before the update."""

    def __init__(self, inner: Any, rule: Rule, updated: Callable[[Any], None]) -> None:
        """
        Args:
            inner: an optimizer of Keras 3 with `gradient_accumulation_steps`.
            updated: called behind each update with whether it was not made.
        """
        self._entries = Entries(inner)
        due: list[Any] = []  # the variables of the trace that is going on
        skip: list[Any] = [None]
        apply, clip, decay, step = (
            inner._backend_apply_gradients, inner._clip_gradients, inner._apply_weight_decay,
            inner._backend_update_step,
        )  # fmt: skip

        def apply_gradients(grads: Any, trainable_variables: Any) -> None:
            due[:] = trainable_variables
            apply(grads, trainable_variables)

        def clip_gradients(grads: Any) -> Any:
            values, skip[0] = rule(grads, due)
            return clip(values)

        def apply_weight_decay(variables: Any) -> None:
            unless(skip[0], lambda: decay(variables))

        def update_step(grads: Any, variables: Any, learning_rate: Any) -> None:
            unless(skip[0], lambda: step(grads, variables, learning_rate))
            updated(skip[0])

        self._entries.put("_backend_apply_gradients", apply_gradients)
        self._entries.put("_clip_gradients", clip_gradients)
        self._entries.put("_apply_weight_decay", apply_weight_decay)
        self._entries.put("_backend_update_step", update_step)

    def remove(self) -> None:
        self._entries.remove()


class TrainFunctionHook:
    """Runs `after` behind each call of a model's train function, on the training thread."""

    def __init__(self, model: Any, after: Callable[[], None]) -> None:
        self._model = model
        self._entries = Entries(model)
        make = model.make_train_function

        def make_train_function(force: bool = False) -> Any:
            if model.train_function is not None and not force:
                return model.train_function
            made = make(force=True)
            function = model.train_function

            def train_function(iterator: Any) -> Any:
                logs = function(iterator)
                after()
                return logs

            model.train_function = train_function
            return made if made is None else train_function

        self._entries.put("make_train_function", make_train_function)
        self._made_anew()

    def remove(self) -> None:
        self._entries.remove()
        self._made_anew()

    def _made_anew(self) -> None:
        """A function that was traced before knows nothing of what is attached since."""
        if self._model.train_function is not None:
            self._model.make_train_function(force=True)


class LossOfTrace:
    """The loss that a model of Keras 3 has computed in the trace that is going on."""

    def __init__(self, model: Any) -> None:
        self._entries = Entries(model)
        self._note = NoteOfTrace()
        compute = model.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            if kwargs.get("training", True):
                self._note.put(loss)
            return loss

        self._entries.put("compute_loss", compute_loss)

    def take(self) -> Any:
        """0-d, or None where there is none of this trace."""
        note = self._note.take()
        return None if note is None else note[0]

    def remove(self) -> None:
        self._entries.remove()
