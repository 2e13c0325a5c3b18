"""A forward pass run once more, with flags of every call in it, and everything as it was behind it.

The step that was due is not taken yet, so the weights are those of the pass. The batch, the random
states and autocast are put back as they were; what modules hold beside weights, such as the
statistics of BatchNorm, is restored afterwards. Forward hooks of the model run again too.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gradwatch.rules.culprit_forward import Call
from gradwatch.torch.layers import inner_model
from gradwatch.torch.passes import Batch, device_of, module_names
from gradwatch.torch.tracing import Trace, read

__all__ = ["calls_of"]


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
            stack.callback(_remover(module, trace, is_root=module is inner))
        inner(*batch.args, **batch.kwargs)
    return read([trace])[0]


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
    lists = [v for one in held for v in one.values() if type(v) in (list, dict, deque)]
    copies = [value.copy() for value in lists]
    generators = [v for one in held for v in one.values() if isinstance(v, torch.Generator)]
    states = [generator.get_state() for generator in generators]
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
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
