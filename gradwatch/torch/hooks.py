"""Where gradwatch sits in a torch loop: on the optimizer's step, and on one parameter's backward.

Nothing is left on modules, and torch drops these hooks when an optimizer or a tensor is pickled or
copied, so both stay as picklable and copyable as they were.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gradwatch.errors import AttachError
from gradwatch.torch.containers import is_watchable

__all__ = ["BackwardCounter", "Passes", "StepHooks", "innermost", "refuse_watched"]


MOST_COUNTED = 8
"""Parameters with a hook on their backward, at most."""


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep theirs under `.optimizer`.

    Raises:
        AttachError: there is none, or it is one that cannot be watched.
    """
    inner = optimizer
    while not is_watchable(inner):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise AttachError(
                f"expected a torch.optim.Optimizer. Received: {type(optimizer).__name__}. "
                "Pass the torch optimizer that takes the step."
            )
    return inner  # type: ignore[no-any-return]


def refuse_watched(optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        AttachError: another watch is on this optimizer.
    """
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), StepHooks):
            raise AttachError(
                f"this {type(optimizer).__name__} is watched already, and two watches would clip "
                "twice. Close the first one (watch.close()) before attaching again."
            )


class StepHooks:
    """Runs `before` once per outermost `step` of one optimizer, after its closure if it has one.

    `after` runs behind the step, unless that raised.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._before = before
        self._after = after
        # It goes on evaluating along its line search; the first gradient is that of the step.
        self._first_evaluation_only = isinstance(optimizer, torch.optim.LBFGS)
        self._depth = 0
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not optimizer.state and _is_no_step():
            return None
        if self._depth and not _step_is_running(optimizer):
            self._depth = 0  # the post hook does not run when step raises
        self._depth += 1
        if self._depth > 1:  # a subclass called super().step()
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._before()
            return None
        with_hook = self._after_closure(closure)
        if kwargs.get("closure"):
            return args, {**kwargs, "closure": with_hook}
        return (args[0], with_hook, *args[2:]), kwargs

    def _after_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure runs forward and backward inside `step`: only after it is there a gradient."""
        evaluated = False

        def evaluate_then_watch() -> Any:
            nonlocal evaluated
            loss = closure()
            if not (evaluated and self._first_evaluation_only):
                self._before()
            evaluated = True
            return loss

        return evaluate_then_watch

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._after()


def _step_is_running(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a `step` of this optimizer is on the stack below the one that is starting."""
    running = 0
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and "profile_name" in frame.f_code.co_varnames:
            running += bool(frame.f_locals.get("args", (None,))[0] is optimizer)
        frame = frame.f_back  # type: ignore[assignment]
    return running > 1


def _is_no_step() -> bool:
    """Whether torch only wants an optimizer's state to be there, to load a checkpoint into it: it
    then calls `step` with gradients of 0 at a learning rate of 0."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@dataclass(frozen=True, slots=True)
class Passes:
    """The backward passes since the last step."""

    count: int
    """0 where none was seen."""

    earlier: int
    """Updates of the loss scaler that had passes of their own before those: steps that it may have
    dropped."""


class BackwardCounter:
    """Counts backward passes, the micro-batches of a window, on a few of the parameters.

    Not each one has a part in every pass: it may be frozen, or belong to a branch not taken.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        update: Callable[[], int] = int,
        after_first: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            update: a number that changes with each update of the loss scaler.
            after_first: called when the first pass since the last step has ended.
        """
        self._update = update
        self._after_first = after_first
        self._parameters = list(parameters)
        self._counts: dict[int, dict[int, int]] = {}
        self._handles: list[RemovableHandle] = []
        able = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._watch(able[i] for i in {0, len(able) // 2, len(able) - 1} if able)

    @property
    def count(self) -> int:
        """The passes since the last `take`, dropped ones included."""
        return sum(max(of_one.values()) for of_one in self._counts.values())

    def extend(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """More parameters behind the ones of before."""
        known = {id(parameter) for parameter in self._parameters}
        new = [parameter for parameter in parameters if id(parameter) not in known]
        self._parameters += new
        self._watch(itertools.islice((p for p in new if p.requires_grad), 1))

    def _watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for i, parameter in enumerate(parameters, start=len(self._handles)):
            bump = functools.partial(self._bump, i)
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(bump)  # type: ignore[no-untyped-call]
            )

    def _bump(self, index: int, _: torch.Tensor) -> None:
        if self._after_first is not None and not self._counts:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._after_first)
        of_one = self._counts.setdefault(self._update(), {})
        of_one[index] = of_one.get(index, 0) + 1

    def take(self) -> Passes:
        """The passes since the last call.

        Where none of the parameters had a part in them, one that had is counted from now on.
        """
        counts, self._counts = self._counts, {}
        if not counts:
            if len(self._handles) < MOST_COUNTED:
                has_part = (p for p in self._parameters if p.requires_grad and p.grad is not None)
                self._watch(itertools.islice(has_part, 1))
            return Passes(0, 0)
        *earlier, last = counts.values()
        return Passes(max(last.values()), len(earlier))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
