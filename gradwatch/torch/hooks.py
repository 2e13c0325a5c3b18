"""Where gradwatch sits in a torch loop: on the optimizer's step, and on one parameter's backward.

Nothing is left on modules, and torch drops these hooks when an optimizer or a tensor is pickled or
copied, so both stay as picklable and copyable as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from gradwatch.errors import AttachError

__all__ = ["BackwardCounter", "StepHooks", "innermost", "refuse_watched"]


class _Removable(Protocol):
    def remove(self) -> None: ...


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep theirs under `.optimizer`.

    Raises:
        AttachError: there is none, or it is one that cannot be watched.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise AttachError(
                f"expected a torch.optim.Optimizer. Received: {type(optimizer).__name__}. "
                "Pass the torch optimizer that takes the step."
            )
    if isinstance(inner, torch.optim.LBFGS):
        raise AttachError(
            "LBFGS evaluates its closure several times within one step, so there is no one "
            "gradient per step to clip or record. Attach to another optimizer, or call "
            "gradwatch.attach(model) without it and watch.process() where you own the gradient."
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
        self._depth = 0
        self._handles: list[_Removable] = [
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

        def evaluate_then_watch() -> Any:
            loss = closure()
            self._before()
            return loss

        return evaluate_then_watch

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


class BackwardCounter:
    """Counts the backward passes that reach one parameter: the micro-batches of a window."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.count = 0
        self._parameters = list(parameters)
        self._handle: _Removable | None = None
        self._watch(next((p for p in self._parameters if p.requires_grad), None))

    def _watch(self, parameter: torch.nn.Parameter | None) -> None:
        self.remove()
        if parameter is not None:
            self._handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._bump
            )

    def _bump(self, _: torch.Tensor) -> None:
        self.count += 1

    def take(self) -> int:
        """The passes since the last call, at least 1.

        Where the parameter had no part in them, another one that had is counted from now on: the
        first may have been frozen.
        """
        count, self.count = self.count, 0
        if count == 0:
            has_part = (p for p in self._parameters if p.requires_grad and p.grad is not None)
            if (other := next(has_part, None)) is not None:
                self._watch(other)
        return max(1, count)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
