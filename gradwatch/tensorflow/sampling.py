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
from gradwatch.tensorflow.applying import is_compiled_here
from gradwatch.tensorflow.gradients import Gradients
from gradwatch.tensorflow.notes import NoteOfTrace
from gradwatch.tensorflow.ring import GraphRing

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
        strides = [math.ceil(size / width) | 1 if size > width else 1 for size in sizes]
        self._places = [np.arange(0, n, k) for n, k in zip(sizes, strides, strict=True)]
        self._counts = [len(places) for places in self._places]
        self._widest = max([1, *self._counts])
        self._taken = NoteOfTrace()
        """Gradients and weights [P, W] from before the update that is traced."""

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

        def take() -> tuple[Any, Any]:
            chosen = [self._chosen(values[i], i) if known[i] else None for i in range(len(known))]
            return self._matrix(chosen), self._matrix(self._weights())

        def nothing() -> tuple[Any, Any]:
            return (tf.zeros((len(known), self._widest)),) * 2

        if is_compiled_here():
            # A branch is given copies of what it looks at: whole weights, where it chose itself.
            chosen = [self._chosen(values[i], i) if known[i] else None for i in range(len(known))]
            self._taken.put(chosen, self._weights(), known, gradients.loss_scale)
        else:
            taken = tf.cond(self._is_due(step), take, nothing)
            self._taken.put(*taken, known, gradients.loss_scale)

    def after(self, step: Any, skip: Any) -> None:
        """In a graph, behind the update of that step, or where it was skipped (0-d or None)."""
        taken = self._taken.take()
        if taken is None:
            return
        gradient, before, known, scale = taken
        due = self._is_due(step)
        due = due if skip is None else tf.logical_and(due, tf.logical_not(skip))
        number = step // self._every  # one sampled step after the other has a slot
        weights = self._weights() if is_compiled_here() else None

        def write() -> None:
            after = weights or self._weights()
            self.ring.write(number, self._found(gradient, before, after, known, scale))

        tf.cond(due, write, lambda: None)

    def read(self) -> list[tuple[int, Any]]:
        """Steps and their samples, oldest first."""
        return [(number * self._every, row) for number, row in self.ring.read()]

    def begin_at(self, step: int) -> None:
        self.ring.begin_at(-(-step // self._every))

    def _is_due(self, step: Any) -> Any:
        return tf.equal(step % self._every, 0)

    def _found(self, gradient: Any, before: Any, after: Any, known: Any, scale: Any) -> Any:
        """[S * P] by `records.SAMPLES`, NaN where there is nothing to say."""
        gradient, before, after = (self._matrix(rows) for rows in (gradient, before, after))
        there = tf.not_equal(gradient, 0.0)
        alive_P = _counted(there)
        unchanged_P = _counted(there & tf.equal(before, after)) / alive_P
        flushed_P = tf.fill(alive_P.shape, math.nan)
        if scale is not None:
            flushed_P = 1.0 - _counted(tf.abs(gradient) * scale >= FLUSHED) / self._count_P
        found = [
            1.0 - alive_P / self._count_P,
            flushed_P,
            unchanged_P,
            tf.norm(after - before, axis=1) * self._times_P,
            tf.norm(before, axis=1) * self._times_P,
        ]
        return tf.concat([tf.where(known, values, math.nan) for values in found], 0)

    def _weights(self) -> list[Any]:
        return [self._chosen(tf.convert_to_tensor(v), i) for i, v in enumerate(self._variables)]

    def _chosen(self, tensor: Any, i: int) -> Any:
        return tf.cast(tf.gather(tf.reshape(tensor, [-1]), self._places[i]), tf.float32)

    def _matrix(self, rows: Any) -> Any:
        """[P, W] of rows that are as long as they are, or the matrix that it is already."""
        if not isinstance(rows, list):
            return rows
        empty = tf.zeros(self._widest)
        return tf.stack(
            [
                empty if row is None else tf.pad(row, [[0, self._widest - count]])
                for row, count in zip(rows, self._counts, strict=True)
            ]
        )


def _counted(truths_PW: Any) -> Any:
    """[P] how many are true."""
    return tf.reduce_sum(tf.cast(truths_PW, tf.float32), 1)
