"""What the model was called with since the last step, kept until that is over.

    hooks on the model  ->  SeenPass, SeenPass, ...  ->  take()

Only where a policy asks for it (`detect.culprit: replay` or `always`). The hooks are nothing in a
copy of the model, and nothing where it is compiled around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from gradwatch.rules.culprit_forward import Flag
from gradwatch.torch.layers import COMPILED
from gradwatch.torch.randomness import RandomState
from gradwatch.torch.spans import flags_of, is_opaque, spans_of, tensors_in
from gradwatch.torch.tracing import Trace

__all__ = ["ForwardPasses", "Seen", "SeenPass", "device_of", "inner_model", "module_names"]

MOST_PASSES = 256
"""Of one step; those behind are counted only."""


class _Removable(Protocol):
    def remove(self) -> None: ...


class _Hook:
    """A hook of a module that does nothing in a copy of it, pickled or not."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        # Known while a graph is traced: nothing of this is in it, and it does not break.
        if self._call is not None and not (
            torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        ):
            self._call(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()


@dataclass(slots=True)
class Batch:
    """What one forward pass needs to be run again; by reference, nothing is copied."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState
    autocast: tuple[bool, torch.dtype]
    versions: tuple[int, ...]

    def is_unchanged(self) -> bool:
        """Whether no tensor in it was written to since."""
        return self.versions == _versions(self.args, self.kwargs)


@dataclass(slots=True)
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


@dataclass(slots=True)
class Seen:
    """The passes of one step."""

    passes: list[SeenPass] = field(default_factory=list)
    unseen: int = 0
    begun: int = 0
    unknown: str = ""
    """Why there is none."""


class ForwardPasses:
    """Hooks on the model, and on every module in it where all of them are looked at."""

    def __init__(
        self, model: torch.nn.Module, *, everywhere: bool, on_error: Callable[[str], None]
    ) -> None:
        self._device = device_of(model)
        self._autocast = self._device.type if self._device.type != "meta" else "cpu"
        self._on_error = on_error
        self._names = module_names(model) if everywhere else None
        self._open: SeenPass | None = None
        self._seen = Seen()
        self._failed = ""
        self.off = False
        """While the model is run again."""

        self._handles: list[_Removable] = [
            model.register_forward_pre_hook(_Hook(self._entered), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self._left)),
        ]
        for module in inner_model(model).modules() if everywhere else ():
            if module is not model:
                self._handles += [
                    module.register_forward_pre_hook(_Hook(self._inside), with_kwargs=True),
                    module.register_forward_hook(_Hook(self._behind)),
                ]

    def take(self) -> Seen:
        """The passes since the last call, which is forgotten here."""
        seen, self._seen, self._open = self._seen, Seen(), None
        seen.unseen = max(0, seen.begun - len(seen.passes))
        if not seen.passes:
            seen.unknown = self._failed or (
                "the model itself was not called before the step, or only compiled"
            )
        return seen

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen, self._open = Seen(), None

    def _guarded(self, do: Callable[[], object]) -> None:
        if self.off or self._failed:
            return
        try:
            do()
        except Exception as error:
            self._failed = f"gradwatch failed to keep it ({type(error).__name__}: {error})"
            self._on_error("measure")

    def _entered(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None  # one within another, or one that raised
        if torch.is_grad_enabled():
            self._seen.begun += not self.off
            self._guarded(lambda: self._begin(module, args, kwargs))

    def _left(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        if self._open is not None:
            self._guarded(lambda: self._end(module, outputs))

    def _inside(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (opened := self._open) is not None and (trace := opened.trace) is not None:
            self._guarded(lambda: trace.enter(module, args, kwargs))

    def _behind(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        if (opened := self._open) is not None and (trace := opened.trace) is not None:
            self._guarded(lambda: trace.leave(module, outputs))

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
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
        self._open = SeenPass(inputs, opaque=opaque, batch=batch, trace=trace)

    def _end(self, module: torch.nn.Module, outputs: Any) -> None:
        one, self._open = self._open, None
        if one is None:
            return
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
        if len(seen.passes) < MOST_PASSES:
            seen.passes.append(one)


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model within `torch.compile` and what replicates it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def module_names(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The path of each module, as the names of parameters have it; the whole model is ``."""
    names: dict[torch.nn.Module, str] = {}
    for path, module in model.named_modules():
        names.setdefault(module, f"{path}.".replace(COMPILED, "").rstrip("."))
    names[inner_model(model)] = names[model] = ""
    return names


def device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _versions(*values: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors_in(values) if not tensor.is_inference())
