"""What the rules need of the gradients of a step, as operations of the graph that is traced.

    Gradients  ->  norms [Q], norms of units [U]; rules per unit and element act on the values

The deciding half of `gradwatch.backend.Backend`: nothing here reads anything.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gradwatch.backend import Agreed, Word
from gradwatch.rules.arrays import Arrays
from gradwatch.rules.arrays import Vector as AnyVector
from gradwatch.rules.clipping import Rule
from gradwatch.tensorflow.gradients import (
    Gradients,
    bounded,
    norms_of,
    scaled_units,
    unit_norms,
)
from gradwatch.tensorflow.vectors import TFArrays, Vector, tensor_of

__all__ = ["Measures"]


class Measures:
    """Over whatever gradients it is given; holds nothing."""

    xp: Arrays = TFArrays()

    def measure(self, gradients: Gradients, norm_type: float) -> Vector:
        norms_Q = norms_of(gradients.values, norm_type)
        return Vector(norms_Q if gradients.unit is None else norms_Q * tensor_of(gradients.unit))

    def measure_units(self, gradients: Gradients, rule: Rule) -> Vector:
        found = self._of_units(rule, gradients.values, rule.norm_type)
        return found if gradients.unit is None else found * Vector(gradients.unit)

    def measure_weights(self, gradients: Gradients, rule: Rule) -> Vector:
        weights = [tf.convert_to_tensor(weight) for weight in gradients.weights]
        if rule.slices is not None:
            return self._of_units(rule, weights, 2.0)
        return Vector(norms_of(weights, 2.0))

    def measure_updates(self, gradients: Gradients) -> Vector:
        raise NotImplementedError("measure: update is refused when a watch is attached")

    def scalar(self, value: float) -> Vector:
        return Vector(tf.constant(value, tf.float64))

    def agree(
        self, gradients: Gradients, norms: dict[float | str, AnyVector], word: Word
    ) -> Agreed:
        return Agreed(gradients, norms)  # gradients are summed over replicas before

    def touch(
        self, gradients: Gradients, rule: Rule, values: Vector, over: Vector, apply: bool
    ) -> Gradients | None:
        changed = gradients.values if apply else list(gradients.values)
        if rule.slices is not None:
            for of in rule.slices:
                by_U = values.tensor[of.first : of.first + of.count]
                changed[of.position] = scaled_units(changed[of.position], of, by_U)
        else:
            chosen = range(len(changed)) if rule.positions is None else rule.positions
            bounds_S = values if gradients.unit is None else values / Vector(gradients.unit)
            for row, i in enumerate(chosen):
                bound = bounds_S.tensor[row] if bounds_S.shape else bounds_S.tensor
                changed[i] = bounded(changed[i], bound, zeroes=rule.then == "zero")
        return Gradients(
            values=changed, weights=gradients.weights, present=gradients.present,
            factor=gradients.factor, unit=gradients.unit, loss_scale=gradients.loss_scale,
        )  # fmt: skip

    def _of_units(self, rule: Rule, values: list[Any], norm_type: float) -> Vector:
        """[U] norms at the places of the units, 0 between them."""
        assert rule.slices is not None
        parts, end = [], 0
        for of in sorted(rule.slices, key=lambda of: of.first):
            parts += [tf.zeros(of.first - end)] if of.first > end else []
            parts.append(unit_norms(values[of.position], of, norm_type))
            end = of.first + of.count
        parts += [tf.zeros(rule.num_units - end)] if rule.num_units > end else []
        return Vector(tf.concat(_alike(parts), 0))


def _alike(tensors: list[Any]) -> list[Any]:
    wide = any(tensor.dtype == tf.float64 for tensor in tensors)
    return [tf.cast(tensor, tf.float64 if wide else tf.float32) for tensor in tensors]
