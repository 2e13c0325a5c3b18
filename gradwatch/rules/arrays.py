"""The few vector operations that rules need, and NumPy's version of them.

A rule is written once over `Arrays` and short vectors with one entry per tensor. NumPy is the
reference; each framework brings its own version, so that a decision stays on its device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gradwatch.rules.rings import NumberRings, Rings

__all__ = ["NUMBERS", "NUMPY", "Arrays", "NumPyArrays", "Vector"]

Vector = Any
"""A short float vector or 0-d value of NumPy, torch or TensorFlow."""


class Arrays(Protocol):
    """What differs between array libraries; arithmetic and comparison are operators."""

    def norm(self, x: Vector, norm_type: float = 2.0) -> Vector:
        """(sum x_i^p)^(1/p), or max x_i for p = inf; 0-d, 0 for an empty vector. x_i >= 0."""

    def segment_norm(
        self, x: Vector, segment_of: Any, num_segments: int, norm_type: float = 2.0
    ) -> Vector:
        """[num_segments] the same norm over the entries of each segment."""

    def indices(self, index: Any) -> Any:
        """An index vector as this library takes it; made once per rule, not per step."""

    def floats(self, values: Any) -> Vector:
        """A float32 vector as this library takes it; made once per rule, not per step."""

    @property
    def lib(self) -> Any:
        """The library's functions of one or two vectors: where, exp, log, sqrt, abs, clip, ..."""

    def doubles(self, values: Any) -> Vector:
        """A float64 vector or matrix of NumPy as this library takes it."""

    def to_doubles(self, x: Vector) -> Vector:
        """A vector of this library in float64."""

    def sorted(self, x: Vector) -> Vector:
        """Ascending along the last axis."""

    def may_be_true(self, x: Vector) -> bool:
        """False only where it is known on the host that no entry is true."""

    def ring(self, values: Any) -> Any:
        """See `gradwatch.rules.rings`, as for the next four."""

    def ring_pushed(
        self, ring_UW: Any, count_U: Any, x_U: Any, accept_U: Any, *, grows: bool
    ) -> Any: ...

    def ring_moments(self, ring_UW: Any, count_U: Any) -> tuple[Any, Any]: ...

    def ring_quantile(self, ring_UW: Any, count_U: Any, quantile: float) -> Any: ...

    def ring_median_and_mad(self, ring_UW: Any) -> tuple[Any, Any]: ...

    def ones_like(self, x: Vector) -> Vector: ...

    def full_like(self, x: Vector, value: float) -> Vector: ...

    def concat(self, parts: Sequence[Vector]) -> Vector:
        """0-d values and vectors, truth values too, as one float vector."""

    def quotient(self, a: Any, x: Vector) -> Vector:
        """a / x, inf or NaN where x is 0."""

    def at_most_one(self, x: Vector) -> Vector:
        """min(1, x)."""

    def where(self, condition: Vector, x: Vector, y: float) -> Vector: ...

    def isfinite(self, x: Vector) -> Vector: ...

    def scaled_at(self, x: Vector, index: Any, by: Vector) -> Vector:
        """x with x[index] multiplied by `by`; a new vector."""


class NumPyArrays(Rings):
    lib: Any = np

    def doubles(self, values: Any) -> Vector:
        return np.asarray(values, dtype=np.float64)

    def to_doubles(self, x: Vector) -> Vector:
        return np.asarray(x, dtype=np.float64)

    def sorted(self, x: Vector) -> Vector:
        return np.sort(x, axis=-1)

    def may_be_true(self, x: Vector) -> bool:
        return bool(np.any(x))

    def norm(self, x: Vector, norm_type: float = 2.0) -> Vector:
        return (
            np.linalg.norm(x.astype(np.float64), norm_type).astype(x.dtype) if x.size else x.sum()
        )

    def segment_norm(
        self, x: Vector, segment_of: Any, num_segments: int, norm_type: float = 2.0
    ) -> Vector:
        if norm_type == math.inf:
            out = np.zeros(num_segments, dtype=x.dtype)
            np.maximum.at(out, segment_of, x)
            return out
        powers = np.bincount(segment_of, x.astype(np.float64) ** norm_type, minlength=num_segments)
        return (powers ** (1 / norm_type)).astype(x.dtype)

    def indices(self, index: Any) -> Any:
        return np.asarray(index, dtype=np.intp)

    def floats(self, values: Any) -> Vector:
        return np.asarray(values, dtype=np.float32)

    def ones_like(self, x: Vector) -> Vector:
        return np.ones_like(x)

    def full_like(self, x: Vector, value: float) -> Vector:
        return np.full_like(x, value)

    def concat(self, parts: Sequence[Vector]) -> Vector:
        return np.concatenate([np.atleast_1d(part) for part in parts])

    def quotient(self, a: Any, x: Vector) -> Vector:
        return a / x

    def at_most_one(self, x: Vector) -> Vector:
        return np.minimum(x, 1.0)

    def where(self, condition: Vector, x: Vector, y: float) -> Vector:
        return np.where(condition, x, np.asarray(y, dtype=np.asarray(x).dtype))

    def isfinite(self, x: Vector) -> Vector:
        return np.isfinite(x)

    def scaled_at(self, x: Vector, index: Any, by: Vector) -> Vector:
        out = x.copy()
        out[index] *= by
        return out


class _Floats:
    """NumPy's names on plain floats."""

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y

    @staticmethod
    def exp(x: float) -> float:
        return math.exp(x) if x < 709 else math.inf

    @staticmethod
    def log(x: float) -> float:
        return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)

    @staticmethod
    def sqrt(x: float) -> float:
        return math.sqrt(x) if x >= 0 else math.nan

    @staticmethod
    def divide(x: float, y: float) -> float:
        if y:
            return x / y
        return math.copysign(math.inf, x) if x else math.nan

    @staticmethod
    def clip(x: float, low: float, high: float) -> float:
        return min(max(x, low), high) if x == x else x

    abs = staticmethod(abs)
    isfinite = staticmethod(math.isfinite)


class _Numbers(NumberRings):
    """One unit on the host: a vector is a float. What histories need, not what rules need."""

    lib: Any = _Floats

    def doubles(self, values: Any) -> float:
        return float(np.asarray(values).reshape(-1)[0])

    def to_doubles(self, x: Any) -> float:
        return float(x.item())  # of an array, 0-d or of its one unit

    def may_be_true(self, x: bool) -> bool:
        return x


NUMPY: Arrays = NumPyArrays()
NUMBERS: Any = _Numbers()
"""Histories of one unit on the host."""
