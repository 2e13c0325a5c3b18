"""Rows from a graph to the host: one variable, written in the graph and read by a thread.

    write (in the graph): row -> slot step % K      read (any thread): the rows that are new

One variable, since a snapshot of it is whole: with the step in another one a reader would see the
number before its row. Nobody waits: a slow reader loses rows, and the number of each tells it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

__all__ = ["GraphRing", "local", "variable"]

MOST_BYTES = 2**20
SLOTS = (32, 256)
"""The least and the most rows that are kept."""


class GraphRing:
    """The last K rows of float64, each with its step in front."""

    def __init__(self, width: int, strategy: Any) -> None:
        row_bytes = 8 * (1 + width)
        self.slots = int(np.clip(MOST_BYTES // row_bytes, *SLOTS))
        self._width = width
        self._several = strategy.num_replicas_in_sync > 1
        start = np.full((self.slots, 1 + width), -1.0)
        self._rows = variable(start, tf.float64, strategy)
        self._strategy = strategy
        self.next = 0
        """The least step that would be news."""

    def write(self, step: Any, row: Any) -> None:
        """In a graph: the row of a step, padded to the width of all."""
        row = tf.pad(tf.cast(row, tf.float64), [[0, self._width - row.shape[0]]])
        row = tf.concat([tf.reshape(tf.cast(step, tf.float64), [1]), row], 0)
        slot = tf.cast(step % self.slots, tf.int32)
        if self._several:
            # What a replica has of a variable of its own takes no scatter.
            here = tf.equal(tf.range(self.slots), slot)[:, None]
            self._rows.assign(tf.where(here, row[None, :], self._rows.read_value()))
        else:
            # scatter_update holds the lock that it shares with those who read: rows were torn.
            tf.raw_ops.ResourceScatterNdUpdate(
                ref=self._rows.handle, indices=tf.reshape(slot, [1, 1]), updates=row[None, :],
                use_locking=True,
            )  # fmt: skip

    def read(self) -> list[tuple[int, npt.NDArray[np.float64]]]:
        """The rows that were written since, oldest first, each with its step."""
        # Without the copies that reading it as a variable makes on its way.
        held = local(self._rows, self._strategy).handle
        rows = tf.raw_ops.ReadVariableOp(resource=held, dtype=tf.float64).numpy()
        steps = rows[:, 0].astype(np.int64)
        new = np.flatnonzero(steps >= self.next)
        if not new.size:
            return []
        new = new[np.argsort(steps[new])]
        self.next = int(steps[new[-1]]) + 1
        return [(int(steps[i]), rows[i, 1:]) for i in new]

    def begin_at(self, step: int) -> None:
        """Rows of steps before are not news."""
        self.next = step


def variable(value: Any, dtype: Any, strategy: Any) -> Any:
    """State of ours: one for each replica, all of which compute the same."""
    with tf.init_scope(), strategy.scope():
        if strategy.num_replicas_in_sync == 1:
            return tf.Variable(value, trainable=False, dtype=dtype)
        return tf.Variable(
            value,
            trainable=False,
            dtype=dtype,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )


def local(held: Any, strategy: Any) -> Any:
    """A variable of ours as the host may read it."""
    return strategy.experimental_local_results(held)[0]
