"""The vector operations of `gradwatch.rules.arrays` on TensorFlow tensors, in a graph or eagerly.

    rules, written for NumPy's manners  ->  Vector  ->  the same arithmetic as graph operations

A tensor has neither `any()` nor promotion of types nor an index of several places; `Vector` gives
it these, so that the rules are the same lines as on NumPy and torch. It exists while a graph is
traced and costs nothing when it runs. Everything here compiles with XLA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gradwatch.rules.rings import Rings

__all__ = ["TFArrays", "Vector", "tensor_of"]


class Vector:
    """A short tensor with NumPy's operators."""

    __slots__ = ("tensor",)
    __array_ufunc__ = None  # an array on the left leaves arithmetic to us
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.tensor.numpy(), dtype=dtype)

    def __float__(self) -> float:
        return float(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __getitem__(self, index: Any) -> Vector:
        if isinstance(index, np.ndarray):
            return Vector(tf.gather(self.tensor, index))
        return Vector(self.tensor[index])

    def any(self) -> Vector:
        return Vector(tf.reduce_any(self.tensor))

    def min(self) -> Vector:
        return Vector(tf.reduce_min(self.tensor))

    def sum(self, axis: int | None = None) -> Vector:
        return Vector(tf.reduce_sum(self.tensor, axis))

    def reshape(self, *shape: int) -> Vector:
        return Vector(tf.reshape(self.tensor, shape))

    def __invert__(self) -> Vector:
        return Vector(tf.logical_not(self.tensor))

    def __neg__(self) -> Vector:
        return Vector(-self.tensor)

    def __add__(self, other: Any) -> Vector:
        return _both(tf.add, self, other)

    def __sub__(self, other: Any) -> Vector:
        return _both(tf.subtract, self, other)

    def __rsub__(self, other: Any) -> Vector:
        return _both(tf.subtract, other, self)

    def __mul__(self, other: Any) -> Vector:
        return _both(tf.multiply, self, other)

    def __truediv__(self, other: Any) -> Vector:
        return _both(tf.divide, self, other)

    def __rtruediv__(self, other: Any) -> Vector:
        return _both(tf.divide, other, self)

    def __mod__(self, other: Any) -> Vector:
        return _both(tf.math.floormod, self, other)

    def __pow__(self, other: Any) -> Vector:
        return _both(tf.pow, self, other)

    def __and__(self, other: Any) -> Vector:
        return _both(tf.logical_and, self, other)

    def __or__(self, other: Any) -> Vector:
        return _both(tf.logical_or, self, other)

    def __lt__(self, other: Any) -> Vector:
        return _both(tf.less, self, other)

    def __le__(self, other: Any) -> Vector:
        return _both(tf.less_equal, self, other)

    def __gt__(self, other: Any) -> Vector:
        return _both(tf.greater, self, other)

    def __ge__(self, other: Any) -> Vector:
        return _both(tf.greater_equal, self, other)

    def __eq__(self, other: object) -> Vector:  # type: ignore[override]
        return _both(tf.equal, self, other)

    def __ne__(self, other: object) -> Vector:  # type: ignore[override]
        return _both(tf.not_equal, self, other)

    __radd__, __rmul__, __rand__, __ror__ = __add__, __mul__, __and__, __or__


def tensor_of(value: Any) -> Any:
    """The tensor of a vector; whatever else is left as it is."""
    return value.tensor if isinstance(value, Vector) else value


def _unless_spoilt(largest: Any, total: Any) -> Any:
    """A maximum, which may pass NaN over; what is not finite where the sum is not."""
    return tf.where(tf.math.is_finite(total), largest, total)


def _both(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Vector:
    return Vector(operation(*_promoted(tensor_of(a), tensor_of(b))))


def _promoted(*values: Any) -> list[Any]:
    """The same type for all: numbers of Python take that of their company, truth values count as
    0 and 1, and float64 wins over float32."""
    typed = [np.asarray(v) if isinstance(v, np.generic) else v for v in values]
    dtypes = [tf.as_dtype(v.dtype) for v in typed if not isinstance(v, (bool, int, float))]
    floats = [dtype for dtype in dtypes if dtype.is_floating]
    numbers = any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in typed)
    if floats:
        dtype = tf.float64 if tf.float64 in floats else floats[0]
    elif dtypes and not (numbers and dtypes[0] == tf.bool):
        dtype = next((d for d in dtypes if d != tf.bool), tf.bool)
    else:
        dtype = tf.float32
    return [tf.cast(v, dtype) for v in typed]


class _Functions:
    """NumPy's names of functions."""

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Vector:
        return Vector(tf.where(tensor_of(condition), *_promoted(tensor_of(x), tensor_of(y))))

    @staticmethod
    def clip(x: Any, low: float, high: float) -> Vector:
        # Not clip_by_value, of which NaN may come out as a bound.
        x = _Functions.where(x < low, low, x)
        return _Functions.where(x > high, high, x)

    @staticmethod
    def concatenate(parts: Sequence[Any], axis: int) -> Vector:
        return Vector(tf.concat([tensor_of(part) for part in parts], axis))

    @staticmethod
    def divide(x: Any, y: Any) -> Vector:
        return _both(tf.divide, x, y)

    @staticmethod
    def exp(x: Any) -> Vector:
        return Vector(tf.exp(tensor_of(x)))

    @staticmethod
    def log(x: Any) -> Vector:
        return Vector(tf.math.log(tensor_of(x)))

    @staticmethod
    def sqrt(x: Any) -> Vector:
        return Vector(tf.sqrt(tensor_of(x)))

    @staticmethod
    def abs(x: Any) -> Vector:
        return Vector(tf.abs(tensor_of(x)))

    @staticmethod
    def floor(x: Any) -> Vector:
        return Vector(tf.floor(tensor_of(x)))

    @staticmethod
    def isfinite(x: Any) -> Vector:
        return Vector(tf.math.is_finite(tensor_of(x)))


class TFArrays(Rings):
    """Whatever a rule keeps from one trace to the next is NumPy's, and a constant in each graph."""

    lib: Any = _Functions

    def doubles(self, values: Any) -> Vector:
        return Vector(tf.cast(tensor_of(values), tf.float64))

    def to_doubles(self, x: Any) -> Vector:
        return self.doubles(x)

    def sorted(self, x: Vector) -> Vector:
        return Vector(tf.sort(x.tensor, axis=-1))

    def may_be_true(self, x: Any) -> bool:
        return True

    def norm(self, x: Vector, norm_type: float = 2.0) -> Vector:
        wide = tf.cast(x.tensor, tf.float64)
        if norm_type == math.inf:
            largest = tf.reduce_max(tf.concat([wide, tf.zeros(1, tf.float64)], 0))
            found = _unless_spoilt(largest, tf.reduce_sum(wide))
        elif norm_type == 2.0:
            found = tf.sqrt(tf.reduce_sum(wide * wide))
        else:
            found = tf.pow(tf.reduce_sum(tf.pow(wide, norm_type)), 1 / norm_type)
        return Vector(tf.cast(found, x.tensor.dtype))

    def segment_norm(
        self, x: Vector, segment_of: Any, num_segments: int, norm_type: float = 2.0
    ) -> Vector:
        wide = tf.cast(x.tensor, tf.float64)
        if norm_type == math.inf:
            largest = tf.math.unsorted_segment_max(wide, segment_of, num_segments)
            largest = tf.maximum(largest, tf.zeros((), tf.float64))
            sums = tf.math.unsorted_segment_sum(wide, segment_of, num_segments)
            found = _unless_spoilt(largest, sums)
        else:
            powers = wide * wide if norm_type == 2.0 else tf.pow(wide, norm_type)
            sums = tf.math.unsorted_segment_sum(powers, segment_of, num_segments)
            found = tf.sqrt(sums) if norm_type == 2.0 else tf.pow(sums, 1 / norm_type)
        return Vector(tf.cast(found, x.tensor.dtype))

    def indices(self, index: Any) -> Any:
        return np.asarray(index, dtype=np.int64)

    def floats(self, values: Any) -> Any:
        return np.asarray(values, dtype=np.float32)

    def ones_like(self, x: Vector) -> Vector:
        return Vector(tf.ones_like(x.tensor))

    def full_like(self, x: Vector, value: Any) -> Vector:
        return Vector(tf.ones_like(x.tensor) * tf.cast(tensor_of(value), x.tensor.dtype))

    def concat(self, parts: Sequence[Any]) -> Vector:
        # Numbers by the dozen: an operation for each of them would cost more than what it does.
        tensors = [tf.convert_to_tensor(tensor_of(part)) for part in parts]
        runs = [
            tf.stack(list(run)) if is_number else tf.concat([tf.reshape(t, [-1]) for t in run], 0)
            for (_, is_number), run in itertools.groupby(
                tensors, key=lambda tensor: (tensor.dtype, not tensor.shape.rank)
            )
        ]
        return Vector(tf.concat([tf.cast(run, tf.float64) for run in runs], 0))

    def quotient(self, a: Any, x: Vector) -> Vector:
        return _both(tf.divide, a, x)

    def at_most_one(self, x: Vector) -> Vector:
        return Vector(tf.minimum(x.tensor, tf.ones((), x.tensor.dtype)))

    def where(self, condition: Any, x: Vector, y: float) -> Vector:
        return _Functions.where(condition, x, y)

    def isfinite(self, x: Vector) -> Vector:
        return _Functions.isfinite(x)

    def scaled_at(self, x: Vector, index: Any, by: Vector) -> Vector:
        scaled = x[index] * by
        return Vector(
            tf.tensor_scatter_nd_update(
                x.tensor, np.asarray(index)[:, None], tf.cast(scaled.tensor, x.tensor.dtype)
            )
        )
