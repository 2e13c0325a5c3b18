"""Gradients as TensorFlow hands them over: norms, multipliers, bounds, repeated rows.

The gradient of an embedding comes as rows with their ids (`IndexedSlices`), and an id that was
looked up twice comes twice. Its norm is that of the sum: TensorFlow's own functions take the norm
of the rows as they lie there, which is another number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from gradwatch.rules.clipping import UnitSlice
from gradwatch.tensorflow.sums import l2_loss, sum_of, sum_of_rows

__all__ = ["Gradients", "bounded", "merged", "norms_of", "scaled", "scaled_units", "unit_norms"]


@dataclass(slots=True, kw_only=True)
class Gradients:
    """The gradients of one step while it is traced. Q of the P watched variables have one."""

    values: list[Any]
    """[Q] tensors and IndexedSlices; rules that touch the data replace them here."""

    weights: list[Any]
    """[Q] the variables that they are the gradients of."""

    present: bytes
    factor: float = 1.0
    unit: Any = None
    """0-d: what the values are multiplied by to be the gradient; None where they are it."""

    loss_scale: Any = None
    found_inf: Any = None

    @property
    def decided(self) -> bytes:
        return self.present


def merged(rows: Any) -> tuple[Any, Any]:
    """Each id once: [n, ...] sums of the rows that share one, and [n] their ids.

    What is over at the end is zeros with the id 0. Sorting instead of `tf.unique`, since XLA needs
    to know how many there are.
    """
    ids = tf.reshape(rows.indices, [-1])
    order = tf.argsort(ids, stable=True)
    ids, values = tf.gather(ids, order), tf.gather(rows.values, order)
    begins = tf.concat([tf.zeros_like(ids[:1]), tf.cast(ids[1:] != ids[:-1], ids.dtype)], 0)
    place = tf.cumsum(begins)
    count = tf.maximum(tf.shape(ids)[0], 1)
    sums = tf.math.unsorted_segment_sum(values, place, count)
    first = tf.math.unsorted_segment_min(ids, place, count)
    return sums, tf.where(first == ids.dtype.max, tf.zeros_like(first), first)


def norms_of(values: Sequence[Any], norm_type: float) -> Any:
    """[Q] p-norms of gradients: float32, or float64 if one of them is."""
    if not values:
        return tf.zeros(0)
    if norm_type == math.inf:
        return _alike([_largest(_rows_merged(value)) for value in values])
    if norm_type == 2.0:
        return tf.sqrt(2.0 * _alike([l2_loss(_rows_merged(value)) for value in values]))
    powers = [_powers(_rows_merged(value), norm_type) for value in values]
    sums = _alike([sum_of(power) for power in powers])
    return sums if norm_type == 1.0 else tf.pow(sums, 1 / norm_type)


def unit_norms(value: Any, of: UnitSlice, norm_type: float) -> Any:
    """[count] p-norm of each output unit."""
    if of.count == 1:
        return norms_of([value], norm_type)
    if isinstance(value, tf.IndexedSlices) and of.axis == 0:
        sums, ids = merged(value)
        # What is over in `sums` is 0 and adds nothing.
        norms = _norms_along(_wide(sums), 0, norm_type)
        return tf.math.unsorted_segment_sum(norms, ids, of.count)
    return _norms_along(_wide(tf.convert_to_tensor(value)), of.axis, norm_type)


def _rows_merged(value: Any) -> Any:
    return _wide(merged(value)[0] if isinstance(value, tf.IndexedSlices) else value)


def _powers(x: Any, norm_type: float) -> Any:
    return tf.abs(x) if norm_type == 1.0 else tf.pow(tf.abs(x), norm_type)


def _largest(x: Any) -> Any:
    if x.shape.num_elements() == 0:
        return tf.reduce_sum(x)
    return _unless_spoilt(tf.reduce_max(tf.abs(x)), l2_loss(x))


def _norms_along(x: Any, axis: int, norm_type: float) -> Any:
    others = [a for a in range(len(x.shape)) if a != axis]
    if norm_type == math.inf:
        return _unless_spoilt(tf.reduce_max(tf.abs(x), others), tf.reduce_sum(x * x, others))
    powers = x * x if norm_type == 2.0 else _powers(x, norm_type)
    if axis == len(x.shape) - 1:
        sums = sum_of_rows(tf.reshape(powers, [-1, x.shape[axis]]))
    else:
        sums = tf.reduce_sum(powers, others)
    return tf.sqrt(sums) if norm_type == 2.0 else tf.pow(sums, 1 / norm_type)


def scaled(value: Any, coef: Any, *, zeroes: bool = True) -> Any:
    """A gradient times a 0-d coef.

    Args:
        zeroes: whether the coef may be 0, which makes it 0, whatever it holds.
    """
    if isinstance(value, tf.IndexedSlices):
        values = scaled(value.values, coef, zeroes=zeroes)
        return tf.IndexedSlices(values, value.indices, value.dense_shape)
    coef = tf.cast(coef, value.dtype)
    return tf.math.multiply_no_nan(value, coef) if zeroes else value * coef


def scaled_units(value: Any, of: UnitSlice, by_U: Any) -> Any:
    """A gradient with each of its output units multiplied by a number of its own."""
    if of.count == 1:
        return scaled(value, by_U[0])
    if isinstance(value, tf.IndexedSlices) and of.axis == 0:
        by_rows = tf.gather(by_U, tf.reshape(value.indices, [-1]))
        factors = tf.reshape(by_rows, [-1] + [1] * (len(value.values.shape) - 1))
        return tf.IndexedSlices(_times(value.values, factors), value.indices, value.dense_shape)
    dense = tf.convert_to_tensor(value)
    shape = [of.count if axis == of.axis else 1 for axis in range(len(dense.shape))]
    return _times(dense, tf.reshape(by_U, shape))


def bounded(value: Any, bound: Any, *, zeroes: bool) -> Any:
    """A gradient with each element within +-bound, or 0 where it is not.

    Rows that share an id have to be one before they can be compared with anything.
    """
    dense = tf.convert_to_tensor(value)
    bound = tf.cast(bound, dense.dtype)
    if zeroes:
        return tf.where(tf.abs(dense) <= bound, dense, tf.zeros_like(dense))
    low = tf.where(dense < -bound, -bound, dense)
    return tf.where(low > bound, bound, low)


def _unless_spoilt(largest: Any, total: Any) -> Any:
    """A maximum, which may pass NaN over; what is not finite where the sum of squares is not."""
    return tf.where(tf.math.is_finite(total), largest, total)


def _times(values: Any, factors: Any) -> Any:
    factors = tf.broadcast_to(tf.cast(factors, values.dtype), tf.shape(values))
    return tf.math.multiply_no_nan(values, factors)


def _alike(numbers: Sequence[Any]) -> Any:
    """[Q] of 0-d ones, of the widest type among them."""
    wide = any(number.dtype == tf.float64 for number in numbers)
    return tf.stack([tf.cast(number, tf.float64 if wide else tf.float32) for number in numbers])


def _wide(x: Any) -> Any:
    return x if x.dtype in (tf.float32, tf.float64) else tf.cast(x, tf.float32)
