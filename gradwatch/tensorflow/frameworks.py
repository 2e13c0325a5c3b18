"""Keras 3 on TensorFlow, tf_keras, or none of them: what differs between them in one place.

An optimizer in, how it is asked for an update out. Private names of Keras are used here only, and
looked for when a watch is attached.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from gradwatch.errors import AttachError
from gradwatch.tensorflow.applying import Update

__all__ = [
    "build",
    "hooked_name",
    "inner_of",
    "is_keras",
    "is_model",
    "is_optimizer",
    "learning_rate_of",
    "loss_scale_of",
    "own_update",
    "scales_loss",
    "strategy_of",
]

LOOKED_FOR = ("_all_reduce_sum_gradients", "_backend_update_step", "_apply_weight_decay")


def is_keras(optimizer: Any) -> bool:
    """Whether it is an optimizer of Keras 3."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(optimizer, keras.optimizers.Optimizer)


def is_optimizer(candidate: Any) -> bool:
    tf_keras = sys.modules.get("tf_keras")
    is_legacy = tf_keras is not None and isinstance(candidate, tf_keras.optimizers.Optimizer)
    return is_keras(candidate) or is_legacy


def is_model(candidate: Any) -> bool:
    """Whether its variables can be watched."""
    return isinstance(candidate, tf.Module) or hasattr(candidate, "trainable_variables")


def hooked_name(optimizer: Any) -> str:
    """The method through which all of its updates go.

    Raises:
        AttachError: this optimizer or its version is not known.
    """
    if not is_keras(optimizer):
        if not hasattr(optimizer, "apply_gradients"):
            raise AttachError(
                f"expected an optimizer of Keras. Received: {type(optimizer).__name__}. Attach the "
                "model alone and call watch.process(gradients, variables) before the update"
            )
        return "apply_gradients"
    missing = [name for name in LOOKED_FOR if not hasattr(inner_of(optimizer), name)]
    if missing:
        version = getattr(sys.modules.get("keras"), "__version__", "?")
        raise AttachError(
            f"keras {version} has no {', '.join(missing)}: gradwatch needs keras >= 3.3. Upgrade "
            "it, or call watch.process(gradients, variables) in a loop of your own"
        )
    return "apply"


def inner_of(optimizer: Any) -> Any:
    """The optimizer inside a LossScaleOptimizer; else itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def scales_loss(optimizer: Any) -> bool:
    """Whether it drops steps that are not finite by itself, and looks for a scale."""
    return inner_of(optimizer) is not optimizer


def loss_scale_of(optimizer: Any) -> Any:
    """0-d: what gradients are multiplied by when they come to it; None where they are not."""
    if not is_keras(optimizer):
        return None  # a LossScaleOptimizer of tf_keras is given gradients that are unscaled
    if scales_loss(optimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    factor = optimizer.loss_scale_factor
    return None if factor is None else tf.constant(factor, tf.float32)


def learning_rate_of(optimizer: Any) -> Any:
    """0-d, or NaN where it cannot be told."""
    try:
        return tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float64)
    except (AttributeError, TypeError, ValueError):
        return math.nan


def build(optimizer: Any, variables: Sequence[Any], strategy: Any) -> None:
    """Makes the variables of an optimizer of Keras 3, as its first update would: a loop that has
    several traces must not make them in the second one, and no branch may."""
    if is_keras(optimizer) and not optimizer.built:
        with tf.init_scope(), strategy.scope():
            optimizer.build(list(variables))
            optimizer.built = True


def own_update(optimizer: Any) -> Update:
    """The update as the optimizer makes it, of gradients that are summed over the replicas."""
    apply = getattr(optimizer, hooked_name(optimizer))
    if is_keras(optimizer):
        return Update(apply, optimizer, summing=inner_of(optimizer))

    def apply_pairs(gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        pairs = list(zip(gradients, variables, strict=True))
        return apply(pairs, skip_gradients_aggregation=True)

    return Update(apply_pairs, optimizer)


def strategy_of(model: Any, optimizer: Any) -> Any:
    """The strategy that variables were made under; that of this place where it does not say."""
    for holder, name in ((model, "distribute_strategy"), (optimizer, "_distribution_strategy")):
        strategy = getattr(holder, name, None)
        if strategy is not None:
            return strategy
    return tf.distribute.get_strategy()
