"""A model and its optimizer in, named parameters out: whose gradient is this?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradwatch.errors import AttachError
from gradwatch.records import Parameter
from gradwatch.torch.containers import refuse_engine

__all__ = ["COMPILED", "inner_model", "watched_parameters"]

COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of the module it wraps."""


def watched_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[list[torch.nn.Parameter], list[Parameter]]:
    """The tensors to watch, in `named_parameters()` order, each with its description.

    With an optimizer these are the parameters it updates, those of the model first; without one,
    all parameters of the model. A tied parameter is listed once, under its first name. What wraps
    the model, such as DistributedDataParallel, is no part of the names.

    Raises:
        AttachError: nothing is left to watch, or something keeps its gradients elsewhere.
    """
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in inner_model(model).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name.replace(COMPILED, ""))
    _refuse_unwatchable(model, names)
    groups = dict.fromkeys(names, 0) if optimizer is None else dict(_grouped(optimizer))
    owners = _owners(model)
    tensors = [p for p in names if p in groups] + [p for p in groups if p not in names]
    if not tensors:
        raise AttachError(
            f"{type(model).__name__} and its optimizer hold no parameters to watch. "
            "Create the optimizer over model.parameters() before attaching."
        )
    described = []
    for position, tensor in enumerate(tensors):
        first, *aliases = names.get(tensor, [f"param_groups.{groups[tensor]}.{position}"])
        described.append(
            Parameter(
                name=first,
                shape=tuple(tensor.shape),
                module=type(owners[tensor]).__name__ if tensor in owners else "",
                group=groups[tensor],
                aliases=tuple(aliases),
                trainable=tensor.requires_grad,
                unit_axis=_unit_axis(owners.get(tensor)) if tensor.ndim > 1 else 0,
                unit_groups=_unit_groups(owners.get(tensor)) if tensor.ndim > 1 else 1,
            )
        )
    return tensors, described


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model within `torch.compile` and what replicates it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _refuse_unwatchable(model: torch.nn.Module, names: dict[torch.nn.Parameter, list[str]]) -> None:
    refuse_engine(model, "Attach to the plain module with its torch optimizer instead")
    for parameter, (name, *_) in names.items():
        if hasattr(parameter, "_in_backward_optimizers"):
            raise AttachError(
                f"{name} is updated inside the backward pass, so there is no moment at which all "
                "gradients are there. Use an optimizer that steps after backward()."
            )
        if type(parameter).__name__ == "FlatParameter":
            raise AttachError(
                f"{name} is a flat parameter of FullyShardedDataParallel, which holds many layers "
                "in one. Use fully_shard."
            )
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise AttachError(f"{name} has no shape yet. Run one batch through the model first.")
        if parameter.device.type == "meta":
            raise AttachError(
                f"{name} is on the meta device and has no values. Materialise the model first "
                "(model.to_empty(device=...)), then create the optimizer and attach."
            )


def _grouped(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.nn.Parameter, int]]:
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield parameter, index


def _owners(model: torch.nn.Module) -> dict[torch.nn.Parameter, torch.nn.Module]:
    owners: dict[torch.nn.Parameter, torch.nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, module)
    return owners


def _unit_axis(owner: torch.nn.Module | None) -> int:
    """The axis of the output units: the first one, but the second where weights are transposed."""
    transposed = isinstance(owner, torch.nn.modules.conv._ConvTransposeNd)
    # The linear layer of GPT-2 in transformers, whose weight is (in, out).
    is_gpt2s = owner is not None and type(owner).__module__ == "transformers.pytorch_utils"
    return 1 if transposed or (is_gpt2s and type(owner).__name__ == "Conv1D") else 0


def _unit_groups(owner: torch.nn.Module | None) -> int:
    is_transposed = isinstance(owner, torch.nn.modules.conv._ConvTransposeNd)
    return int(owner.groups) if is_transposed else 1  # type: ignore[union-attr,arg-type]
