"""What norms do not tell, from a sample in every so many steps of a graph.

    before(gradients)  ->  the optimizer's update  ->  after(): a row [S * P] in a ring of its own

At most `WIDTH` elements of each variable, the same ones of its gradient and of its weights before
and after, behind a branch that is taken in a sampled step only. The numbers are those of
`records.SAMPLES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

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
        chosen = [values.get(i) for i in range(len(present))]
        known = np.array([value is not None for value in chosen])
        is_due = self._is_due(step)

        def take() -> tuple[Any, Any]:
            return self._matrix(chosen, is_due), self._matrix(self._variables, is_due)

        def nothing() -> tuple[Any, Any]:
            return (tf.zeros((len(known), self._widest)),) * 2

        taken = take() if is_compiled_here() else tf.cond(is_due, _called(take), nothing)
        self._taken.put(*taken, known, gradients.loss_scale)

    def behind(self, step: Any) -> Callable[[Any], Any] | None:
        """Puts a gradient behind the sample, in a graph that XLA compiles; else None. XLA makes a
        copy of all weights that are looked at, unless their update has to wait for that."""
        taken = self._taken.look()
        if taken is None or not is_compiled_here():
            return None
        before = tf.reduce_sum(taken[1])
        return lambda value: _behind(value, before, step)

    def after(self, step: Any, skip: Any) -> None:
        """In a graph, behind the update of that step, or where it was skipped (0-d or None)."""
        taken = self._taken.take()
        if taken is None:
            return
        gradient, before, known, scale = taken
        is_due = self._is_due(step)
        number = step // self._every  # one sampled step after the other has a slot
        # A branch of XLA is given copies of what it looks at: whole weights, if it chose itself.
        weights = self._matrix(self._variables, is_due) if is_compiled_here() else None

        def write() -> None:
            after = self._matrix(self._variables, is_due) if weights is None else weights
            self.ring.write(number, self._found(gradient, before, after, known, scale))

        due = is_due if skip is None else tf.logical_and(is_due, tf.logical_not(skip))
        tf.cond(due, _called(write), lambda: None)

    def read(self, newest: int) -> list[tuple[int, Any]]:
        """Steps and their samples that are new, oldest first.

        Args:
            newest: the step that was seen last.
        """
        if newest // self._every < self.ring.next:
            return []
        return [(number * self._every, row) for number, row in self.ring.read()]

    def begin_at(self, step: int) -> None:
        self.ring.begin_at(-(-step // self._every))

    def _is_due(self, step: Any) -> Any:
        return tf.equal(step % self._every, 0)

    def _found(self, gradient: Any, before: Any, after: Any, known: Any, scale: Any) -> Any:
        """[S * P] by `records.SAMPLES`, NaN where there is nothing to say."""
        there = tf.not_equal(gradient, 0.0)
        alive_P = _counted(there)
        unchanged_P = _counted(there & tf.equal(before, after)) / alive_P
        flushed_P = tf.fill(alive_P.shape, math.nan)
        if scale is not None:
            flushed_P = 1.0 - _counted(tf.abs(gradient) * scale >= FLUSHED) / self._count_P
        found_SP = tf.stack(
            [
                1.0 - alive_P / self._count_P,
                flushed_P,
                unchanged_P,
                tf.norm(after - before, axis=1) * self._times_P,
                tf.norm(before, axis=1) * self._times_P,
            ]
        )
        return tf.reshape(found_SP + np.where(known, 0.0, math.nan).astype(np.float32), [-1])

    def _matrix(self, tensors: Sequence[Any], is_due: Any) -> Any:
        """[P, W] the chosen elements of each, zeros where there is none."""
        rows, empty = [], tf.zeros(self._widest)
        for tensor, places, count in zip(tensors, self._places, self._counts, strict=True):
            if tensor is None:
                rows.append(empty)
                continue
            if is_compiled_here():  # in other steps the same element again and again
                places = places * tf.cast(is_due, tf.int64)
            # Gathered from a variable itself, all later reads of it would be copies.
            flat = tf.reshape(tf.convert_to_tensor(tensor), [-1])
            row = tf.cast(tf.gather(flat, places), tf.float32)
            rows.append(tf.pad(row, [[0, self._widest - count]]))
        return tf.stack(rows)


def _called(branch: Callable[[], Any]) -> Callable[[], Any]:
    """A branch as one operation: those of one that is laid out in the graph are gone through also
    where it is not taken."""
    if tf.executing_eagerly() or is_compiled_here():
        return branch
    return cast(
        Callable[[], Any],
        tf.function(branch, autograph=False, experimental_attributes={"_noinline": True}),
    )


def _behind(value: Any, sample: Any, step: Any) -> Any:
    """The value, once the sample is there."""
    if isinstance(value, tf.IndexedSlices):
        values = _behind(value.values, sample, step)
        return tf.IndexedSlices(values, value.indices, value.dense_shape)
    return tf.where(step < 0, tf.cast(sample, value.dtype), value)  # no step is, and XLA not told


def _counted(truths_PW: Any) -> Any:
    """[P] how many are true."""
    return tf.reduce_sum(tf.cast(truths_PW, tf.float32), 1)
