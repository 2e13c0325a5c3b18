"""What gradwatch costs a step of Keras, against `tf.clip_by_global_norm` in the same step.

    python benchmarks/keras_overhead.py [--parameters 5 50] [--seconds 120]

Two copies of one network, one clipped by TensorFlow's own function and one watched with a policy
that clips to the same norm (recording and detection on), take turns in blocks of steps. A block
ends when its records are handled, so that what threads do for it is part of its time. Printed are
ratios of the time of a step, in a graph and compiled with XLA, and the tenth and ninetieth
percentile of those of the pairs of blocks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import gradwatch

LAYERS = 13
"""Of two variables each."""

BATCH = 32
BLOCK_SECONDS = 1.0
POLICIES = {
    "no policy": None,
    "global": {"version": 1, "clip": [{"limit": 1.0}]},
    "all clipped": {"version": 1, "clip": [{"limit": 1e-6}]},
    "z": {"version": 1, "clip": [{"limit": {"z": 4, "until": 1.0}}]},
}


def width_for(millions: float) -> int:
    return int((millions * 1e6 / LAYERS) ** 0.5)


def network(width: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, activation="relu") for _ in range(LAYERS)]
    return keras.Sequential([keras.Input((width,)), *layers])


def stepper(width: int, xla: bool, policy: object, directory: str) -> Any:
    """One training step, with its `watch`; with `policy` "tensorflow" it clips by itself."""
    model = network(width)
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    clips = policy == "tensorflow"
    watch = None
    if not clips:
        watch = gradwatch.attach(model, optimizer, policy, port=None, recording=directory)
    x = tf.random.normal((BATCH, width), seed=1)
    y = tf.random.normal((BATCH, width), seed=2)

    @tf.function(jit_compile=xla)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        grads = tape.gradient(loss, model.trainable_variables)
        if clips:
            grads, _ = tf.clip_by_global_norm(grads, 1.0)
        optimizer.apply(grads, model.trainable_variables)
        return loss

    def run() -> object:
        return step().numpy()

    run.watch = watch
    return run


@dataclass
class Times:
    """Of a step, on average over a block each: seconds on the wall, and of all cores together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, run: Any, steps: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            run()
        if run.watch is not None:
            run.watch.flush()
        self.wall.append((time.perf_counter() - wall) / steps)
        self.cpu.append((time.process_time() - cpu) / steps)


def compared(ours: Any, theirs: Any, seconds: float) -> list[float]:
    """Medians of the ratios of pairs of blocks on the wall and of the time of all cores, each with
    its spread, and the time of their step in ms."""
    for run in (ours, theirs):
        for _ in range(12):  # a sampled step among them
            run()
    begun = time.perf_counter()
    theirs()
    # In whole tens, of which one is sampled.
    steps = 10 * max(1, round(BLOCK_SECONDS / (time.perf_counter() - begun) / 10))
    our, their = Times(), Times()
    turns = [(our, ours), (their, theirs)]
    while len(our.wall) < 6 or time.perf_counter() - begun < seconds:
        for times, run in turns:
            times.of(run, steps)
        turns.reverse()
    found = []
    for a, b in ((our.wall, their.wall), (our.cpu, their.cpu)):
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        tenths = statistics.quantiles(ratios, n=10)
        found += [statistics.median(ratios), tenths[0], tenths[-1]]
    return [*found, 1000 * statistics.median(their.wall)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[5, 50], help="millions")
    parser.add_argument("--policies", nargs="+", default=["global"], choices=list(POLICIES))
    parser.add_argument("--how", nargs="+", default=["graph", "xla"], choices=["graph", "xla"])
    parser.add_argument("--seconds", type=float, default=120, help="for each line")
    given = parser.parse_args()
    heads = ("parameters", "how", "policy", "wall", "cpu", "clip, ms")
    print("{:>10} {:>6} {:>12} {:>22} {:>22} {:>9}".format(*heads))
    with tempfile.TemporaryDirectory() as directory:
        for millions, how, name in itertools.product(given.parameters, given.how, given.policies):
            width, xla = width_for(millions), how == "xla"
            theirs = stepper(width, xla, "tensorflow", directory)
            ours = stepper(width, xla, POLICIES[name], directory)
            *ratios, ms = compared(ours, theirs, given.seconds)
            shown = " ".join(
                f"{r:>7.3f}x" if i % 3 == 0 else f"{r:>6.3f}" for i, r in enumerate(ratios)
            )
            print(f"{millions:>9g}M {how:>6} {name:>12} {shown} {ms:>9.1f}", flush=True)
            ours.watch.close()


if __name__ == "__main__":
    main()
