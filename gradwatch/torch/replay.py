"""A forward pass run once more, with flags of every call in it, and everything as it was behind it.

The step that was due is not taken yet, so the weights are those of the pass. The batch, the random
states and autocast are put back as they were; what modules hold beside weights, such as the
statistics of BatchNorm, is restored afterwards. Forward hooks of the model run again too. What
would write to weights or reach other processes is not run to its end.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.rules.culprit_forward import Call, Flag
from gradwatch.torch.layers import inner_model
from gradwatch.torch.passes import Batch, device_of, module_names
from gradwatch.torch.spans import flags_of, spans_of, tensors_in
from gradwatch.torch.tracing import Trace, read

__all__ = ["calls_of"]

LIFT = torch.ops.aten.lift_fresh.default
GENERATORS = (torch.Generator, random.Random, np.random.Generator)


def calls_of(model: torch.nn.Module, batch: Batch) -> Sequence[Call]:
    """The calls of the pass with this batch, as they are now.

    Raises:
        Exception: whatever the model raises.
    """
    inner, device = inner_model(model), device_of(model)
    trace = Trace(module_names(model).get)
    enabled, dtype = batch.autocast
    kind = "cpu" if device.type == "meta" else device.type
    with ExitStack() as stack:
        stack.enter_context(_state_kept(inner))
        stack.enter_context(batch.random.in_force(device))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
        stack.enter_context(_every_module_by_itself())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what it warns of was said the first time
        for module in dict.fromkeys(inner.modules()):
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(_remover(module, trace, is_root=module is inner))
        stack.enter_context(_Isolated(inner, batch))
        inner(*batch.args, **batch.kwargs)
    return read([trace])[0]


class _Isolated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would reach beyond the pass: other processes, weights, whatever the model keeps
    in tensors of its own."""

    def __init__(self, model: torch.nn.Module, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_place(t) for t in tensors_in((batch.args, batch.kwargs))}
        self._known |= {_place(t) for t in (*model.parameters(), *model.buffers())}
        self._own = {_place(buffer) for buffer in model.buffers()}  # copies
        self._looking = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._looking:
            return func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise RuntimeError("it takes part in a collective, for which others would have to wait")
        given = {_place(tensor): tensor for tensor in tensors_in((args, kwargs))}
        for place, tensor in given.items():
            if place not in self._known and place not in self._own:
                if func is LIFT or tensor.ndim == 0:  # made from numbers in this very pass
                    self._own.add(place)
                else:
                    self._refuse_bad(tensor)
                    self._known.add(place)
        for tensor in _written(func, args, kwargs):
            if _place(tensor) not in self._own:
                raise RuntimeError("it writes to weights or to tensors that are not its own")
        out = func(*args, **kwargs)
        self._own |= {_place(t) for t in tensors_in(out) if _place(t) not in given}
        return out

    def _refuse_bad(self, tensor: torch.Tensor) -> None:
        """
        Raises:
            RuntimeError: it holds NaN, perhaps of this very pass, and is kept outside of buffers.
        """
        self._looking = True
        try:
            if flags_of([spans_of(tensor)])[0] is Flag.BAD:
                raise RuntimeError(
                    "it uses a tensor kept outside of buffers, which holds NaN by now"
                )
        finally:
            self._looking = False


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operator changes."""
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from tensors_in(value)


def _place(tensor: torch.Tensor) -> int:
    """What a tensor shares with its views."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other layouts
        return id(tensor)


def _remover(module: torch.nn.Module, trace: Trace, *, is_root: bool) -> Callable[[], None]:
    """Hooks a module; what takes the hooks off again."""

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        trace.enter(module, args, kwargs)

    def leave(module: torch.nn.Module, args: Any, outputs: Any) -> None:
        trace.leave(module, outputs)

    # Each sees what hooks have made of a value, but the model what it was called with.
    handles = (
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=is_root),
        module.register_forward_hook(leave),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def _every_module_by_itself() -> Iterator[None]:
    """Nothing compiled, and no kernel that does the work of several modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _state_kept(model: torch.nn.Module) -> Iterator[None]:
    """Everything that modules hold beside weights, as it was: what is written to is a copy.

    Buffers themselves are not touched, since a graph may have saved them for its backward pass.
    """
    modules = list(dict.fromkeys(model.modules()))
    held = [dict(module.__dict__) for module in modules]
    kept = list(_within([v for one in held for v in one.values()], set()))
    lists = [value for value in kept if type(value) in (list, dict, deque)]
    copies = [value.copy() for value in lists]
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    draws = [_state_of(value) for value in kept if isinstance(value, GENERATORS)]
    buffers: dict[int, torch.Tensor] = {}
    for module in modules:
        module._buffers = {
            name: None if b is None else buffers.setdefault(id(b), b.detach().clone())
            for name, b in module._buffers.items()
        }
    try:
        yield
    finally:
        for module, before in zip(modules, held, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
        for value, copied in zip(lists, copies, strict=True):
            value.clear()
            (value.update if isinstance(value, dict) else value.extend)(copied)
        for parameter, values in data:
            if parameter.data_ptr() != values.data_ptr():
                parameter.data = values
        for restore in draws:
            restore()


def _within(values: Iterable[Any], entered: set[int]) -> Iterator[Any]:
    """Values, and what is in lists and dicts of them."""
    for value in values:
        yield value
        if type(value) in (list, dict, deque, tuple) and id(value) not in entered:
            entered.add(id(value))
            yield from _within(value.values() if isinstance(value, dict) else value, entered)


def _state_of(generator: Any) -> Callable[[], object]:
    """What puts a generator of random numbers back to where it is now."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))
