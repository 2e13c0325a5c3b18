"""Micro-batches of a GradientTape loop in, the gradient of all of them out.

    add(w g), ...  ->  sums of w g, sum of w  ->  take: G = sum of w g / sum of w

One tape over many batches has the activations of all of them in memory and, where the last loss is
differentiated, the gradient of the last one only. Here each micro-batch has a tape of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gradwatch.errors import GradwatchError
from gradwatch.tensorflow.applying import replicas, unconverted
from gradwatch.tensorflow.ring import variable

__all__ = ["Accumulator"]


class Accumulator:
    """The sums of one window. Its end is known on the host, so that no graph has a branch for it
    and the loop has two traces."""

    def __init__(
        self,
        every: int,
        variables: Sequence[Any],
        strategy: Any,
        weigh: str,
        partial: str,
        taken: Callable[[Any, Any], None],
    ) -> None:
        self.every = every
        self.count = 0
        """Micro-batches of the window so far, as `boundary` has counted them."""

        self._weigh, self._partial, self._taken = weigh, partial, taken
        dtypes = [tf.float64 if v.dtype == tf.float64 else tf.float32 for v in variables]
        self._sums = [
            variable(tf.zeros(v.shape, dtype), dtype, strategy)
            for v, dtype in zip(variables, dtypes, strict=True)
        ]
        self._weight = variable(0.0, tf.float32, strategy)
        self._micro_batches = variable(0.0, tf.float32, strategy)
        self._seen: set[int] = set()
        """Variables that have had a gradient in any trace."""

    def boundary(self) -> bool:
        """Whether the micro-batch that comes next is the last of its window; once for each."""
        self.count += 1
        if self.count < self.every:
            return False
        self.count = 0
        return True

    @unconverted
    def add(self, grads: Sequence[Any], weight: Any = None) -> None:
        """Adds the gradient of one micro-batch, in a graph or eagerly.

        Args:
            grads: of the mean loss of the micro-batch, one for each watched variable in order.
            weight: of this micro-batch among the others: its samples, its tokens. Left out: 1, as
                where the policy's `weigh` is `mean` or `sum`.

        Raises:
            GradwatchError: other variables are watched.
        """
        if len(grads) != len(self._sums):
            raise GradwatchError(
                f"expected a gradient, or None, for each of {len(self._sums)} watched variables. "
                f"Received: {len(grads)}"
            )
        weighs = weight is not None and self._weigh == "weight"
        by = tf.cast(weight, tf.float32) if weighs else tf.ones(())
        for i, grad in enumerate(grads):
            if grad is not None:
                self._seen.add(i)
                _added(self._sums[i], grad, by)
        self._weight.assign_add(by)
        self._micro_batches.assign_add(tf.ones(()))

    @unconverted
    def take(self) -> list[Any]:
        """The gradient of the window, which is empty then. Of several replicas each has its part:
        their sum, as an optimizer takes it, is the gradient.

        Returns:
            A tensor for each watched variable, None for those that have had no gradient.
        """
        weight, count = self._weight.read_value(), self._micro_batches.read_value()
        if replicas() > 1:
            context = tf.distribute.get_replica_context()
            weight = context.all_reduce(tf.distribute.ReduceOp.SUM, weight)
        found = [
            self._mean(held.read_value(), weight) if i in self._seen else None
            for i, held in enumerate(self._sums)
        ]
        self.reset()
        self._taken(count, weight)
        return found

    def flush(self, update: Callable[[], Any]) -> bool:
        """At the end of the data: what becomes of a window that is not full.

        Args:
            update: takes the gradient and applies it, as the loop does at a boundary; called where
                the policy's `partial` is `step`, as it is without a policy.

        Returns:
            Whether it was called.
        """
        if not self.count or self._partial == "carry":
            return False
        self.count = 0
        if self._partial == "drop":
            self.reset()
            return False
        update()
        return True

    def reset(self) -> None:
        """Empties the window. Not by multiplying with 0, which leaves NaN where there was inf."""
        for held in (*self._sums, self._weight, self._micro_batches):
            held.assign(tf.zeros_like(held.read_value()))

    def _mean(self, total: Any, weight: Any) -> Any:
        if self._weigh == "sum":
            return total
        return tf.math.divide_no_nan(total, tf.cast(weight, total.dtype))


def _added(held: Any, grad: Any, by: Any) -> None:
    if isinstance(grad, tf.IndexedSlices) and replicas() == 1:
        values = tf.cast(grad.values, held.dtype) * tf.cast(by, held.dtype)
        held.scatter_add(tf.IndexedSlices(values, grad.indices))
        return
    dense = tf.cast(tf.convert_to_tensor(grad), held.dtype)
    held.assign_add(dense * tf.cast(by, held.dtype))
