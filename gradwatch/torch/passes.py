"""What the model was called with since the last step, kept until that is over.

    hooks on the model  ->  SeenPass  ->  a backward pass has come to it  ->  take()

Only where a policy asks for it (`detect.culprit: replay` or `always`). The hooks are nothing in a
copy of the model, and nothing where it is compiled around them. A pass is one of the step only once
a backward pass has come to it, and until the gradients of that are thrown away.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.utils.hooks import RemovableHandle

from gradwatch.rules.culprit_forward import Flag
from gradwatch.torch.layers import COMPILED, inner_model
from gradwatch.torch.randomness import RandomState
from gradwatch.torch.spans import flags_of, is_opaque, spans_of, tensors_in
from gradwatch.torch.tracing import Trace

__all__ = ["ForwardPasses", "Seen", "SeenPass", "device_of", "module_names"]

MOST_PASSES = 256
"""Of one step; those behind are counted only."""

MOST_FAILURES = 10
"""Steps whose passes could not be kept, until nobody tries any more."""


class _Hook:
    """A hook of a module that does nothing in a copy of it, pickled or not."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        # Known while a graph is traced: nothing of this is in it, and it does not break.
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
            self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything and does nothing, and a pickle of it needs the standard library only.
        return getattr, (contextlib.nullcontext(), "__exit__")


@dataclass(slots=True)
class Batch:
    """What one forward pass needs to be run again; by reference, nothing is copied."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState
    autocast: tuple[bool, torch.dtype]
    versions: tuple[tuple[int, int], ...]

    def is_unchanged(self) -> bool:
        """Whether no tensor in it was written to since."""
        return self.versions == _versions(self.args, self.kwargs)


@dataclass(slots=True, eq=False)
class SeenPass:
    inputs: list[torch.Tensor]
    """Spans, on the device."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    opaque: tuple[bool, bool] = (False, False)
    """Whether inputs and outputs hold what is not looked into."""

    batch: Batch | None = None
    """None where another one was kept instead."""

    trace: Trace | None = None
    is_bad: bool = False
    """Known at once where reading does not wait for a device."""

    is_reached: bool | None = None
    """Whether a backward pass has come to its outputs; None where they do not show it."""

    task: int = -1
    """The backward pass that came first."""

    handed: list[list[torch.Tensor]] = field(default_factory=list)
    """Spans of the gradient of each output that it came to."""


@dataclass(slots=True)
class Seen:
    """The passes of one step."""

    passes: list[SeenPass] = field(default_factory=list)
    unseen: int = 0
    begun: int = 0
    ungraded: int = 0
    """Passes without gradients, of which nothing is kept."""

    unknown: str = ""
    """Why there is none."""

    def keep(self, which: Callable[[SeenPass], bool]) -> None:
        """Forgets all others, as if they had not been."""
        kept = [one for one in self.passes if which(one)]
        self.begun -= len(self.passes) - len(kept)
        self.passes = kept

    def keep_all_but_first(self, of: Callable[[SeenPass], bool]) -> None:
        first = next((one for one in self.passes if of(one)), None)
        self.keep(lambda one: one is not first)


class _Within(threading.local):
    """The pass that is running in this thread."""

    one: SeenPass | None = None


class ForwardPasses:
    """Hooks on the model, and on every module in it where all of them are looked at."""

    off: ClassVar[bool] = False
    """While a model is run again, by whichever watch."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        everywhere: bool,
        holds_gradients: Callable[[], bool],
        on_error: Callable[[str], None],
    ) -> None:
        """
        Args:
            holds_gradients: whether those of earlier backward passes of the step are still there.
        """
        self._device = device_of(model)
        self._autocast = self._device.type if self._device.type != "meta" else "cpu"
        self._holds_gradients = holds_gradients
        self._on_error = on_error
        self._names = module_names(model) if everywhere else None
        self._within = _Within()
        self._seen = Seen()
        self._failed = ""
        self._failures = 0
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_Hook(self._entered), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self._left)),
        ]
        for module in inner_model(model).modules() if everywhere else ():
            if module is not model and not isinstance(module, torch.jit.ScriptModule):
                self._handles += [
                    module.register_forward_pre_hook(_Hook(self._inside), with_kwargs=True),
                    module.register_forward_hook(_Hook(self._behind)),
                ]

    def take(self) -> Seen:
        """The passes since the last call, which is forgotten here."""
        seen, self._seen = self._seen, Seen()
        was_called = bool(seen.passes)
        seen.keep(lambda one: one.is_reached is not False)
        seen.unseen = max(0, seen.begun - len(seen.passes))
        if not seen.passes:
            seen.unknown = self._failed or (
                "no backward pass has come to what the model put out"
                if was_called
                else "the model itself was not called before the step, or only compiled"
            )
        if self._failures < MOST_FAILURES:
            self._failed = ""
        return seen

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen = Seen()

    def _guarded(self, do: Callable[[], object]) -> None:
        if self.off or self._failed:
            return
        try:
            do()
        except Exception as error:
            self._failed = f"gradwatch failed to keep it ({type(error).__name__}: {error})"
            self._failures += 1
            self._on_error("measure")

    def _entered(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._within.one = None  # one within another, or one that raised
        if self.off or torch._C._current_graph_task_id() != -1:  # of a checkpoint, run again
            return
        if torch.is_grad_enabled():
            self._seen.begun += 1
            self._guarded(lambda: self._begin(module, args, kwargs))
        else:
            self._seen.ungraded += 1

    def _left(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        one, self._within.one = self._within.one, None
        if one is not None:
            self._guarded(lambda: self._end(one, module, outputs))

    def _inside(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (one := self._within.one) is not None and (trace := one.trace) is not None:
            self._guarded(lambda: trace.enter(module, args, kwargs))

    def _behind(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        if (one := self._within.one) is not None and (trace := one.trace) is not None:
            self._guarded(lambda: trace.leave(module, outputs))

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if torch._C._functorch.maybe_current_level() is not None:  # values of vmap cannot be read
            return
        trace = None
        if self._names is not None:
            trace = Trace(self._names.get)
            inputs = trace.enter(module, args, kwargs)
        else:
            inputs = spans_of((args, kwargs))
        kind = self._autocast
        batch = Batch(
            args,
            kwargs,
            RandomState.now(self._device),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            _versions(args, kwargs),
        )
        opaque = is_opaque((args, kwargs)), False
        self._within.one = SeenPass(inputs, opaque=opaque, batch=batch, trace=trace)

    def _end(self, one: SeenPass, module: torch.nn.Module, outputs: Any) -> None:
        if one.trace is not None:
            one.trace.leave(module, outputs)
            one.outputs = one.trace.done[-1].outputs
        else:
            one.outputs = spans_of(outputs)
        one.opaque = one.opaque[0], is_opaque(outputs)
        seen = self._seen
        if self._device.type == "cpu":
            one.is_bad = Flag.BAD in flags_of([one.inputs, one.outputs])
        # The first bad one is kept, else the last one.
        if any(earlier.is_bad for earlier in seen.passes):
            one.batch = None
        elif seen.passes:
            seen.passes[-1].batch = None
        if len(seen.passes) >= MOST_PASSES:
            seen.keep_all_but_first(lambda one: one.is_reached is False)
        if len(seen.passes) < MOST_PASSES:
            seen.passes.append(one)
            self._await_backward(one, outputs)

    def _await_backward(self, one: SeenPass, outputs: Any) -> None:
        # A hook of a leaf, such as a weight that is put out, would stay for ever.
        ways = [t for t in tensors_in(outputs) if t.requires_grad and not t.is_leaf]
        one.is_reached = False if ways else None
        reached = functools.partial(self._reached, one)
        for tensor in ways:
            tensor.register_hook(reached)  # type: ignore[no-untyped-call]

    def _reached(self, one: SeenPass, gradient: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if not one.is_reached:
            self._guarded(lambda: self._forget_thrown_away(task))
            one.is_reached, one.task = True, task
        self._guarded(lambda: one.handed.append(spans_of(gradient)))

    def _forget_thrown_away(self, task: int) -> None:
        """Passes whose gradients are not there any more; those of this backward pass come yet."""
        earlier = [one for one in self._seen.passes if one.is_reached and one.task != task]
        if earlier and not self._holds_gradients():
            self._seen.keep(lambda one: one not in earlier)
            self._seen.begun = len(self._seen.passes)


def module_names(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The path of each module, as the names of parameters have it; the whole model is ``."""
    names: dict[torch.nn.Module, str] = {}
    inner = inner_model(model)
    for path, module in inner.named_modules():
        names.setdefault(module, f"{path}.".replace(COMPILED, "").rstrip("."))
    names[inner] = names[model] = ""
    return names


def device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _versions(*values: Any) -> tuple[tuple[int, int], ...]:
    """Which tensors there are, and how often each was written to."""
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors_in(values))
