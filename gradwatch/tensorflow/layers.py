"""A model or an optimizer in, its variables with their names out: whose gradient is this?

Names are paths of Keras with dots, `encoder.dense.kernel`, without the name of the model that
Sequential puts in front; of a plain `tf.Module` they are the attributes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from gradwatch.errors import AttachError
from gradwatch.records import Parameter

__all__ = ["described", "device_of", "key_of", "trainable_of"]

BY_ROW = ("embeddings",)
TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")


def key_of(variable: Any) -> Any:
    """What is the same for a variable of Keras, the tf.Variable in it, and its replicas."""
    value = getattr(variable, "value", variable)
    value = variable if callable(value) else value
    if isinstance(value, tf.distribute.DistributedValues):
        return value._unique_id
    if hasattr(value, "_distributed_container"):
        value = value._distributed_container()
    return value._unique_id


def trainable_of(model: Any, optimizer: Any) -> list[Any]:
    """The variables to watch: those of the model that it trains, else those of the optimizer.

    Raises:
        AttachError: there are none yet, or none that can be watched.
    """
    found = list(getattr(model, "trainable_variables", ()) if model is not None else ())
    if model is None:
        # Keras has no public name for them.
        found = list(getattr(optimizer, "_trainable_variables", ()))
    if not found:
        raise AttachError(_nothing(model, optimizer))
    for variable in found:
        if tf.as_dtype(variable.dtype).is_complex:
            raise AttachError(
                f"{variable.name} is complex, and clipping of complex gradients is not supported "
                "in TensorFlow. Hold its real and imaginary parts as two variables"
            )
    return found


def _nothing(model: Any, optimizer: Any) -> str:
    if model is None:
        return (
            f"{type(optimizer).__name__} does not know its variables yet. Attach the model, or "
            "call optimizer.build(variables) first"
        )
    return (
        f"{type(model).__name__} holds no trainable variables. Where its layers are built on their "
        "first call, run one batch through it or give it an Input before attaching"
    )


def device_of(variable: Any) -> str:
    """Such as `cpu:0`; of several replicas the first one's."""
    name = getattr(getattr(variable, "value", variable), "device", "") or ""
    return str(name).rpartition("device:")[2].lower()


def described(model: Any, variables: Sequence[Any]) -> list[Parameter]:
    """One description for each variable, in order."""
    names = _names(model, variables)
    owners = {key: layer for layer in _layers(model) for key in _own(layer)}
    found = []
    for name, variable in zip(names, variables, strict=True):
        shape = tuple(int(size) for size in variable.shape)
        owner = type(owners[key]).__name__ if (key := key_of(variable)) in owners else ""
        found.append(
            Parameter(
                name=name,
                shape=shape,
                module=owner,
                unit_axis=_unit_axis(name, owner, len(shape)),
            )
        )
    return found


def _unit_axis(name: str, owner: str, ndim: int) -> int:
    """The axis of the output units: the last one of a kernel, the rows of an embedding."""
    if ndim < 2 or name.rpartition(".")[2] in BY_ROW:
        return 0
    return ndim - 2 if owner in TRANSPOSED else ndim - 1


def _names(model: Any, variables: Sequence[Any]) -> list[str]:
    paths = _attributes(model) if _is_plain_module(model) else {}
    names = [paths.get(key_of(v)) or _path(v) for v in variables]
    root = f"{getattr(model, 'name', '')}."
    if all(name.startswith(root) and name != root for name in names):
        names = [name.removeprefix(root) for name in names]
    return list(_unique(names))


def _path(variable: Any) -> str:
    path = getattr(variable, "path", None) or variable.name.partition(":")[0]
    return str(path).replace("/", ".")


def _unique(names: Iterable[str]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def _is_plain_module(model: Any) -> bool:
    return isinstance(model, tf.Module) and not hasattr(model, "layers")


def _attributes(model: Any) -> dict[Any, str]:
    """By variable its path of attributes."""
    flat = model._flatten(predicate=lambda v: isinstance(v, tf.Variable), with_path=True)
    return {key_of(variable): ".".join(str(part) for part in path) for path, variable in flat}


def _layers(model: Any) -> list[Any]:
    flatten = getattr(model, "_flatten_layers", None)
    return [] if flatten is None else list(flatten())


def _own(layer: Any) -> list[Any]:
    """Keys of the variables that are of a layer itself."""
    held = getattr(layer, "_trainable_variables", None) or getattr(layer, "_trainable_weights", ())
    return [key_of(variable) for variable in held or ()]
