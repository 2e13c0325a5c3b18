"""What norms do not tell, from a sample in every so many steps of a graph.

    before(gradients)  ->  the optimizer's update  ->  after(): a row [S * P] in a ring of its own

At most `WIDTH` elements of each variable, the same ones of its gradient and of its weights before
and after, behind a branch that is taken in a sampled step only. The numbers are those of
`records.SAMPLES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gradwatch.records import SAMPLES
from gradwatch.tensorflow.gradients import Gradients
from gradwatch.tensorflow.ring import GraphRing, variable

__all__ = ["GraphSampler"]

WIDTH = 1024
"""Elements of one variable."""

BUDGET = 2**18
"""Elements of all of them; a model of very many variables gets fewer of each, at least `LEAST`."""

LEAST = 64
FLUSHED = 2.0**-24
"""The least number above 0 of float16."""


class GraphSampler:
    """Over the P watched variables, in each graph that their update is traced in."""

    def __init__(self, variables: Sequence[Any], every: int, strategy: Any) -> None:
        """
        Args:
            every: steps between two samples.
        """
        self._variables, self._every = list(variables), every
        sizes = [int(np.prod(v.shape, dtype=np.int64)) for v in variables]
        width = max(LEAST, min(WIDTH, BUDGET // len(sizes)))
        # An odd stride passes through every column of a matrix whose rows are of even length.
        self._strides = [math.ceil(size / width) | 1 if size > width else 1 for size in sizes]
        self._counts = [math.ceil(n / k) for n, k in zip(sizes, self._strides, strict=True)]
        self._widest = max([1, *self._counts])
        shape = (len(sizes), self._widest)
        self._gradient, self._before = (
            variable(np.zeros(shape), tf.float32, strategy) for _ in range(2)
        )
        self._known = variable(np.zeros(len(sizes), dtype=bool), tf.bool, strategy)
        self._scale = variable(math.nan, tf.float32, strategy)
        count = np.maximum(np.array(self._counts, dtype=np.float32), 1.0)
        self._count_P, self._times_P = count, np.sqrt(np.array(sizes, np.float32) / count)
        self.ring = GraphRing(len(SAMPLES) * len(sizes), strategy)

    def before(self, step: Any, gradients: Gradients) -> None:
        """In a graph, of a step that is due."""
        present = np.frombuffer(gradients.present, dtype=np.bool_)
        values = dict(zip(np.flatnonzero(present), gradients.values, strict=True))
        # Rows of an embedding have other elements than its weights.
        values = {i: v for i, v in values.items() if not isinstance(v, tf.IndexedSlices)}
        known = np.isin(np.arange(len(present)), list(values))
        scale = math.nan if gradients.loss_scale is None else gradients.loss_scale
        empty = tf.zeros(self._widest)

        def take() -> None:
            rows = [self._row(values[i], i) if known[i] else empty for i in range(len(present))]
            self._gradient.assign(tf.stack(rows))
            self._before.assign(self._weights())
            self._known.assign(known)
            self._scale.assign(tf.cast(scale, tf.float32))

        tf.cond(self._is_due(step), take, lambda: None)

    def after(self, step: Any, skip: Any) -> None:
        """In a graph, behind the update of that step, or where it was skipped (0-d or None)."""
        due = self._is_due(step)
        due = due if skip is None else tf.logical_and(due, tf.logical_not(skip))
        number = step // self._every  # one sampled step after the other has a slot
        tf.cond(due, lambda: self.ring.write(number, self._found()), lambda: None)

    def read(self) -> list[tuple[int, Any]]:
        """Steps and their samples, oldest first."""
        return [(number * self._every, row) for number, row in self.ring.read()]

    def begin_at(self, step: int) -> None:
        self.ring.begin_at(-(-step // self._every))

    def _is_due(self, step: Any) -> Any:
        return tf.equal(step % self._every, 0)

    def _found(self) -> Any:
        """[S * P] by `records.SAMPLES`, NaN where there is nothing to say."""
        gradient, before = self._gradient.read_value(), self._before.read_value()
        after = self._weights()
        there = tf.not_equal(gradient, 0.0)
        alive_P = _counted(there)
        unchanged_P = _counted(there & tf.equal(before, after)) / alive_P
        scale = self._scale.read_value()
        kept_P = _counted(tf.abs(gradient) * scale >= FLUSHED)
        flushed_P = tf.where(tf.math.is_nan(scale), math.nan, 1.0 - kept_P / self._count_P)
        found = [
            1.0 - alive_P / self._count_P,
            flushed_P,
            unchanged_P,
            tf.norm(after - before, axis=1) * self._times_P,
            tf.norm(before, axis=1) * self._times_P,
        ]
        known = self._known.read_value()
        return tf.concat([tf.where(known, values, math.nan) for values in found], 0)

    def _weights(self) -> Any:
        rows = [self._row(tf.convert_to_tensor(v), i) for i, v in enumerate(self._variables)]
        return tf.stack(rows)

    def _row(self, tensor: Any, i: int) -> Any:
        chosen = tf.reshape(tensor, [-1])[:: self._strides[i]]
        return tf.pad(tf.cast(chosen, tf.float32), [[0, self._widest - self._counts[i]]])


def _counted(truths_PW: Any) -> Any:
    """[P] how many are true."""
    return tf.reduce_sum(tf.cast(truths_PW, tf.float32), 1)
