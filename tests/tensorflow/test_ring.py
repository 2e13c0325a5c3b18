"""Rows from a graph to a thread: whole, in order, and known to be missing where they are."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf

from gradwatch.tensorflow.ring import GraphRing, variable

WIDTH = 40


def stepper(strategy, jit=False):
    ring = GraphRing(WIDTH, strategy)
    step = variable(0, tf.int64, strategy)

    def write():
        number = step.read_value()
        ring.write(number, tf.fill([WIDTH], tf.cast(number, tf.float64)))
        step.assign_add(tf.ones((), tf.int64))

    @tf.function(jit_compile=jit)
    def steps(count):
        for _ in tf.range(count):
            if strategy.num_replicas_in_sync > 1:
                strategy.run(write)
            else:
                write()

    return ring, steps


@pytest.mark.parametrize("how", ["graph", "xla", "two replicas"])
def test_rows_are_read_once_and_in_order(how, mirrored):
    strategy = mirrored if how == "two replicas" else tf.distribute.get_strategy()
    ring, steps = stepper(strategy, jit=how == "xla")
    assert ring.read() == []
    steps(tf.constant(3))
    assert [number for number, _ in ring.read()] == [0, 1, 2]
    steps(tf.constant(2))
    found = ring.read()
    assert [number for number, _ in found] == [3, 4]
    for number, row in found:
        np.testing.assert_array_equal(row, float(number))


def test_a_slow_reader_loses_the_oldest_rows():
    ring, steps = stepper(tf.distribute.get_strategy())
    steps(tf.constant(ring.slots + 10))
    assert [number for number, _ in ring.read()] == list(range(10, ring.slots + 10))


@pytest.mark.parametrize("how", ["graph", "xla", "two replicas"])
def test_no_row_is_torn_by_a_reader_that_never_rests(how, mirrored):
    strategy = mirrored if how == "two replicas" else tf.distribute.get_strategy()
    ring, steps = stepper(strategy, jit=how == "xla")
    count = 3000  # under a shared lock one row in two thousand was torn
    torn, seen, reads, ended = [], [], [0], threading.Event()

    def read():
        while True:
            last = ended.is_set()
            reads[0] += 1
            for number, row in ring.read():
                seen.append(number)
                torn.extend([number] if (row != float(number)).any() else [])
            if last:
                return

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(count):
        steps(tf.constant(1))
    ended.set()
    thread.join()
    assert torn == []
    assert seen == sorted(set(seen))
    assert seen[-1] == count - 1
    assert reads[0] > 20
