"""Sums of many numbers, accurate in float32.

XLA adds up in windows that it writes to memory first; folded, a sum is a tree of one pass, which
takes a quarter of the time on a CPU and has as small an error.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gradwatch.tensorflow.applying import is_all_on_cpu, is_compiled_here

__all__ = ["l2_loss", "sum_of", "sum_of_rows"]

FOLD = 32
"""Terms that are added one after the other under XLA."""

BLOCK = 1024
"""The same in a graph."""


def sum_of(x: Any) -> Any:
    """0-d, of tensors of any shape."""
    return _folded(x) if _folds(x) else tf.reduce_sum(x)


def l2_loss(x: Any) -> Any:
    """0-d, half the sum of the squares, as `tf.nn.l2_loss`."""
    return 0.5 * _folded(x * x) if _folds(x) else tf.nn.l2_loss(x)


def sum_of_rows(x: Any) -> Any:
    """[C] of [R, C], whose rows TensorFlow adds one after the other."""
    rows = x.shape[0]
    if rows is None or rows < 2 * BLOCK or is_compiled_here():
        return tf.reduce_sum(x, 0)
    whole = rows - rows % BLOCK
    blocks = tf.reduce_sum(tf.reshape(x[:whole], [-1, BLOCK, x.shape[1]]), 1)
    return tf.reduce_sum(blocks, 0) + tf.reduce_sum(x[whole:], 0)


def _folds(x: Any) -> bool:
    return x.shape.num_elements() is not None and is_compiled_here() and is_all_on_cpu()


def _folded(x: Any) -> Any:
    flat = tf.reshape(x, [-1])
    rest = []
    while (size := flat.shape[0]) > FOLD:
        whole = size - size % FOLD
        if whole < size:
            rest.append(tf.reduce_sum(flat[whole:]))
        flat = tf.reduce_sum(tf.reshape(flat[:whole], [FOLD, -1]), 0)
    return tf.add_n([tf.reduce_sum(flat), *rest])
