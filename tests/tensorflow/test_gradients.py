"""Norms, multipliers and bounds of gradients, dense and of rows that repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from gradwatch.rules.clipping import UnitSlice
from gradwatch.tensorflow.gradients import (
    bounded,
    merged,
    norms_of,
    scaled,
    scaled_units,
    unit_norms,
)

JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


def rows() -> tf.IndexedSlices:
    """Of ids 4, 1, 4: the gradient is row 1 and the sum of two rows in 4."""
    return tf.IndexedSlices(
        tf.constant([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]), tf.constant([4, 1, 4]),
        tf.constant([6, 2]),
    )  # fmt: skip


def test_rows_that_share_an_id_are_one_row():
    norm = float(norms_of([rows()], 2.0)[0])
    assert norm == pytest.approx(math.sqrt(8.0), rel=1e-6)
    assert float(tf.linalg.global_norm([rows()])) == pytest.approx(2.0)  # what TensorFlow says


@JIT
def test_merged_rows_are_the_dense_gradient(jit):
    draw = np.random.default_rng(0)
    values = draw.standard_normal((50, 3)).astype(np.float32)
    ids = draw.integers(0, 9, 50)

    @tf.function(jit_compile=jit)
    def both(values, ids):
        sums, of = merged(tf.IndexedSlices(values, ids, tf.constant([9, 3])))
        return tf.math.unsorted_segment_sum(sums, of, 9), norms_of(
            [tf.IndexedSlices(values, ids, tf.constant([9, 3]))], 2.0
        )[0]

    dense, norm = both(tf.constant(values), tf.constant(ids))
    expected = np.zeros((9, 3))
    np.add.at(expected, ids, values)
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-6)
    assert float(norm) == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@JIT
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_norms_are_those_of_float64(p, jit):
    x = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    norm = tf.function(lambda x: norms_of([x], p)[0], jit_compile=jit)
    expected = np.linalg.norm(x.astype(np.float64), p)
    assert float(norm(tf.constant(x))) == pytest.approx(expected, rel=5e-6 if p == 3.5 else 1e-6)
    half = tf.constant(np.full(1000, 200.0), tf.float16)  # whose square is no float16
    assert float(norm(half)) == pytest.approx(np.linalg.norm(np.full(1000, 200.0), p), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_no_norm_passes_over_what_is_not_finite(p, bad):
    x = np.ones(1000, np.float32)
    x[500] = bad
    assert not math.isfinite(float(norms_of([tf.constant(x)], p)[0]))


def test_a_coef_of_0_leaves_nothing_of_nan():
    bad = tf.constant([1.0, math.nan])
    np.testing.assert_array_equal(scaled(bad, tf.constant(0.0)), [0.0, 0.0])
    sparse = scaled(rows(), tf.constant(0.5))
    np.testing.assert_array_equal(tf.convert_to_tensor(sparse)[4], [1.0, 1.0])


def test_bounds_hold_for_the_sum_of_rows():
    found = bounded(rows(), tf.constant(1.0), zeroes=False).numpy()
    np.testing.assert_array_equal(found[4], [1.0, 1.0])
    zeroed = bounded(rows(), tf.constant(1.0), zeroes=True).numpy()
    np.testing.assert_array_equal(zeroed[4], [0.0, 0.0])


def test_units_of_a_kernel_are_its_last_axis_and_of_an_embedding_its_rows():
    kernel = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    of = UnitSlice(0, 0, 4, 2, 1)
    np.testing.assert_allclose(
        unit_norms(tf.constant(kernel), of, 2.0), np.linalg.norm(kernel.reshape(-1, 4), axis=0),
        rtol=1e-6,
    )  # fmt: skip
    by = tf.constant([1.0, 0.5, 0.0, 2.0])
    np.testing.assert_allclose(scaled_units(tf.constant(kernel), of, by), kernel * by.numpy())
    table = UnitSlice(0, 0, 6, 0, 1)
    found = unit_norms(rows(), table, 2.0)
    np.testing.assert_allclose(found, [0, 0, 0, 0, math.sqrt(8), 0], rtol=1e-6)
    halved = scaled_units(rows(), table, tf.constant([1.0, 1.0, 1.0, 1.0, 0.5, 1.0]))
    np.testing.assert_allclose(tf.convert_to_tensor(halved)[4], [1.0, 1.0])


@JIT
@pytest.mark.parametrize(
    ("shape", "axis"), [((4608, 64), 1), ((3, 3, 512, 64), 3), ((64, 50_000), 0), ((500_000, 2), 1)]
)
def test_norms_of_units_are_those_of_float64(shape, axis, jit):
    draw = np.random.default_rng(0)
    x = (1 + draw.standard_normal(shape)).astype(np.float32)
    of = UnitSlice(0, 0, shape[axis], axis, 1)
    norms = tf.function(lambda x: unit_norms(x, of, 2.0), jit_compile=jit)(tf.constant(x))
    others = tuple(other for other in range(x.ndim) if other != axis)
    expected = np.sqrt((x.astype(np.float64) ** 2).sum(others))
    np.testing.assert_allclose(norms, expected, rtol=1e-6)
