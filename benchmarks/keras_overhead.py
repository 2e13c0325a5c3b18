"""What gradwatch costs a step of Keras, against `tf.clip_by_global_norm` in the same step.

    python benchmarks/keras_overhead.py [--parameters 5 50] [--pairs 400]

Two copies of one network, one clipped by TensorFlow's own function and one watched with a policy
that clips to the same norm (recording and detection on), take turns step by step. Printed are
ratios of the time of a step, in a graph and compiled with XLA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import gradwatch

LAYERS = 13
"""Of two variables each."""

BATCH = 32
POLICIES = {
    "no policy": None,
    "global": {"version": 1, "clip": [{"limit": 1.0}]},
    "global, no skip": {"version": 1, "guard": {"nonfinite": "none"}, "clip": [{"limit": 1.0}]},
    "z": {"version": 1, "clip": [{"limit": {"z": 4, "until": 1.0}}]},
}


def width_for(millions: float) -> int:
    return int((millions * 1e6 / LAYERS) ** 0.5)


def network(width: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, activation="relu") for _ in range(LAYERS)]
    return keras.Sequential([keras.Input((width,)), *layers])


def stepper(width: int, xla: bool, policy: object, directory: str) -> Callable[[], object]:
    """One training step; with `policy` "tensorflow" it clips by itself."""
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
        run.watch = watch  # kept as long as the step is
        return step().numpy()

    return run


@dataclass
class Times:
    """Of one step each: seconds on the wall, and of all cores together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, run: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def compared(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> list[float]:
    """The median of the ratios of pairs, the ratio of the quickest tenth and of the time of all
    cores, and the time of their step in ms."""
    for run in (ours, theirs):
        for _ in range(5):
            run()
    our, their = Times(), Times()
    for pair in range(pairs):
        for times, run in [(our, ours), (their, theirs)][:: 1 if pair % 2 else -1]:
            times.of(run)
    ratios = [a / b for a, b in zip(our.wall, their.wall, strict=True)]
    quick = [statistics.quantiles(times.wall, n=10)[0] for times in (our, their)]
    return [
        statistics.median(ratios),
        quick[0] / quick[1],
        statistics.median(our.cpu) / statistics.median(their.cpu),
        1000 * statistics.median(their.wall),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[5, 50], help="millions")
    parser.add_argument("--policies", nargs="+", default=["global"], choices=list(POLICIES))
    parser.add_argument("--pairs", type=int, default=400, help="of steps; a tenth from 20 M on")
    given = parser.parse_args()
    heads = ("parameters", "how", "policy", "paired", "p10", "cpu", "clip, ms")
    print("{:>10} {:>6} {:>16} {:>8} {:>8} {:>8} {:>9}".format(*heads))
    with tempfile.TemporaryDirectory() as directory:
        for millions in given.parameters:
            for xla in (False, True):
                theirs = stepper(width_for(millions), xla, "tensorflow", directory)
                for name in given.policies:
                    ours = stepper(width_for(millions), xla, POLICIES[name], directory)
                    pairs = given.pairs if millions < 20 else max(10, given.pairs // 10)
                    *ratios, ms = compared(ours, theirs, pairs)
                    shown = " ".join(f"{ratio:>7.3f}x" for ratio in ratios)
                    how = "xla" if xla else "graph"
                    print(f"{millions:>9g}M {how:>6} {name:>16} {shown} {ms:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
