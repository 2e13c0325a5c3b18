"""What gradwatch costs a step of Keras, against `tf.clip_by_global_norm` in the same step.

    python benchmarks/keras_overhead.py [--parameters 5 50] [--steps 60] [--rounds 7]

Two copies of one network, one clipped by TensorFlow's own function and one watched with a policy
that clips to the same norm (recording and detection on), take turns, `--steps` at a time. Printed
is the ratio of the time of a step, the median and the quickest of all rounds, in a graph and
compiled with XLA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

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


def compared(
    ours: Callable[[], object], theirs: Callable[[], object], steps: int, rounds: int
) -> tuple[float, float, float]:
    """Ratio of the medians, of the quickest, and the time of their step in ms."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for run in (ours, theirs):
        for _ in range(5):
            run()
    for turn in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, run in pair if turn % 2 else reversed(pair):
            for _ in range(steps):
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    quick = {name: statistics.quantiles(values, n=10)[0] for name, values in times.items()}
    return (
        medians["ours"] / medians["theirs"],
        quick["ours"] / quick["theirs"],
        1000 * medians["theirs"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[5, 50], help="millions")
    parser.add_argument("--policies", nargs="+", default=["global"], choices=list(POLICIES))
    parser.add_argument("--steps", type=int, default=60, help="in each turn")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(
        f"{'parameters':>10} {'how':>6} {'policy':>16} {'median':>8} {'p10':>8} {'clip step':>10}"
    )
    with tempfile.TemporaryDirectory() as directory:
        for millions in given.parameters:
            for xla in (False, True):
                theirs = stepper(width_for(millions), xla, "tensorflow", directory)
                for name in given.policies:
                    ours = stepper(width_for(millions), xla, POLICIES[name], directory)
                    steps = given.steps if millions < 20 else max(5, given.steps // 6)
                    median, quick, ms = compared(ours, theirs, steps, given.rounds)
                    how = "xla" if xla else "graph"
                    print(f"{millions:>9g}M {how:>6} {name:>16} {median:>7.3f}x {quick:>7.3f}x "
                          f"{ms:>8.1f}ms", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
