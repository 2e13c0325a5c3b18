"""A watch on a model of Keras 3 that computes with torch: the torch side, in Keras' own update.

    optimizer.apply(gradients)  ->  parameter.grad  ->  TorchWatch.process  ->  update, or not

Keras keeps all parameters of a model in one torch module under their paths; here they are named
`dense.kernel` again, as with TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradwatch.contradictions import refuse_second_clipper
from gradwatch.errors import AttachError, PolicyError
from gradwatch.policy import Policy
from gradwatch.torch.watch import TorchWatch

__all__ = ["KerasTorchWatch"]

CLIPPERS = ("clipnorm", "global_clipnorm", "clipvalue")


class KerasTorchWatch(TorchWatch):
    """Hooked to the update of a Keras optimizer; everything else is torch."""

    def __init__(self, model: Any, optimizer: Any, policy: Policy, **arguments: Any) -> None:
        """
        Raises:
            AttachError: it is not compiled, accumulates by itself, or is watched already.
            PolicyError: the policy does not fit, or asks for what is not known here.
        """
        keras_optimizer = model.optimizer if optimizer is None else optimizer
        inner = getattr(keras_optimizer, "inner_optimizer", keras_optimizer)
        _refuse(policy, inner)
        self._named = _by_paths(model)
        self._inner = inner
        super().__init__(self._named, None, policy, **arguments)
        self._apply = inner.apply
        inner.__dict__["apply"] = self._applied

    def _applied(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        variables = trainable_variables
        if variables is None:
            variables = self._inner._trainable_variables
        for variable, grad in zip(variables, grads, strict=True):
            variable.value.grad = grad  # a loss scale is divided out into new tensors
        self.process()
        if self.skipped is None:
            self._apply([variable.value.grad for variable in variables], trainable_variables)
        self._disarm()

    def _detach(self) -> None:
        if self._inner.__dict__.get("apply") == self._applied:
            del self._inner.__dict__["apply"]
        super()._detach()


def _refuse(policy: Policy, optimizer: Any) -> None:
    if optimizer is None:
        raise AttachError("expected a model that is compiled. Call model.compile(...) first")
    if "apply" in optimizer.__dict__:
        raise AttachError(
            f"this {type(optimizer).__name__} is watched already, and two watches would clip "
            "twice. Close the first one (watch.close()) before attaching again."
        )
    if getattr(optimizer, "gradient_accumulation_steps", None):
        raise AttachError(
            "gradient_accumulation_steps is not supported with Keras on torch: its windows end "
            "inside of the optimizer. Leave it out, or train with the TensorFlow backend"
        )
    if policy.accumulate is not None:
        raise PolicyError(f"{policy.source}: accumulate is not supported with Keras on torch")
    units = [rule.name for rule in policy.clip if rule.per == "unit"]
    if units:
        raise PolicyError(
            f"{policy.source}: {units[0]} is per: unit, which is not supported with Keras on "
            "torch, whose kernels lie the other way round. Use per: tensor"
        )
    for name in CLIPPERS:
        value = getattr(optimizer, name, None)
        if value is not None:
            setting = f"{type(optimizer).__name__}({name}={value:g})"
            refuse_second_clipper(policy, setting, f"{name}=None")


def _by_paths(model: Any) -> torch.nn.Module:
    """A module that holds the parameters of a model under their paths in Keras."""
    variables = list(model.trainable_variables)
    if not variables:
        raise AttachError(
            f"{type(model).__name__} holds no trainable variables. Where its layers are built on "
            "their first call, run one batch through it or give it an Input before attaching"
        )
    owners = {id(v): layer for layer in model._flatten_layers() for v in layer._trainable_variables}
    root: torch.nn.Module = type(model.name, (torch.nn.Module,), {})()
    paths = [variable.path.split("/") for variable in variables]
    begins = all(path[0] == model.name and len(path) > 2 for path in paths)
    for variable, path in zip(variables, paths, strict=True):
        *above, name = path[1:] if begins else path
        module = root
        for depth, part in enumerate(above, start=1):
            if part not in module._modules:
                owner = owners.get(id(variable)) if depth == len(above) else None
                kind = "Module" if owner is None else type(owner).__name__
                module.add_module(part, type(kind, (torch.nn.Module,), {})())
            module = module.get_submodule(part)
        module.register_parameter(name, variable.value)
    return root
