"""What gradwatch costs a step of Keras, against `tf.clip_by_global_norm` in the same step.

    python benchmarks/keras_overhead.py [--parameters 5 50] [--seconds 120]

Two copies of one network, one clipped by TensorFlow's own function and one watched with a policy
that clips to the same norm (recording and detection on), take turns in blocks of steps. A block
ends when its records are handled, so that what threads do for it is part of its time. Where in
memory a network comes to lie is worth 2 % of its step, so that several such pairs are made, each in
a process of its own. Printed are ratios of the time of a step, in a graph and compiled with XLA:
the mean over the pairs, with its standard error.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import gradwatch

LAYERS = 13
"""Of two variables each."""

BATCH = 32
BLOCK_SECONDS = 4.0
"""At its end the trainer waits for half a second's records, as no run does."""

PAIRS = 8
CLIPS = "tensorflow"
"""The policy of who clips by itself."""

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


def stepper(width: int, xla: bool, policy: str, directory: str) -> Any:
    """One training step, with its `watch`; with the policy `CLIPS` it clips by itself."""
    model = network(width)
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    clips = policy == CLIPS
    watch = None
    if not clips:
        watch = gradwatch.attach(model, optimizer, POLICIES[policy], port=None, recording=directory)
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


Blocks = tuple[Times, Times]
"""Ours and theirs."""


def compared(ours: Any, theirs: Any, seconds: float) -> Blocks:
    """As many blocks of each, in turns."""
    for run in (ours, theirs):
        for _ in range(12):  # a sampled step among them
            run()
    begun = time.perf_counter()
    theirs()
    # In whole tens, of which one is sampled.
    steps = 10 * max(1, round(BLOCK_SECONDS / (time.perf_counter() - begun) / 10))
    our, their = Times(), Times()
    turns = [(our, ours), (their, theirs)]
    while len(our.wall) < 2 or time.perf_counter() - begun < seconds:
        for times, run in turns:
            times.of(run, steps)
        turns.reverse()
    return our, their


def pair(width: int, xla: bool, policy: str, seconds: float, ours_first: bool) -> Blocks:
    """The blocks of one pair."""
    with tempfile.TemporaryDirectory() as directory:
        order = (policy, CLIPS) if ours_first else (CLIPS, policy)
        made = {one: stepper(width, xla, one, directory) for one in order}
        found = compared(made[policy], made[CLIPS], seconds)
        made[policy].watch.close()
        return found


def of_pairs(*of: Any, seconds: float) -> list[Blocks]:
    """Each of `PAIRS` in a process of its own, every other one with ours made first."""
    alone = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, alone, max_tasks_per_child=1) as processes:
        begun = [processes.submit(pair, *of, seconds / PAIRS, k % 2 == 1) for k in range(PAIRS)]
        return [one.result() for one in begun]


def told(pairs: list[Blocks]) -> str:
    """Means over the pairs of the median ratios on the wall and of the time of all cores, each
    with the standard error of that mean; the time of a step that clips, in ms."""
    found = ""
    for of in ("wall", "cpu"):
        medians = [
            statistics.median(
                a / b for a, b in zip(getattr(our, of), getattr(their, of), strict=True)
            )
            for our, their in pairs
        ]
        error = statistics.stdev(medians) / len(medians) ** 0.5
        found += f" {statistics.mean(medians):>9.3f}x +-{error:.3f}"
    return found + f" {1000 * statistics.mean(statistics.median(b.wall) for _, b in pairs):>9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[5, 50], help="millions")
    parser.add_argument("--policies", nargs="+", default=["global"], choices=list(POLICIES))
    parser.add_argument("--how", nargs="+", default=["graph", "xla"], choices=["graph", "xla"])
    parser.add_argument("--seconds", type=float, default=120, help="for each line")
    given = parser.parse_args()
    heads = ("parameters", "how", "policy", "wall", "cpu", "clip, ms")
    print("{:>10} {:>6} {:>12} {:>18} {:>18} {:>9}".format(*heads))
    for millions, how, name in itertools.product(given.parameters, given.how, given.policies):
        pairs = of_pairs(width_for(millions), how == "xla", name, seconds=given.seconds)
        print(f"{millions:>9g}M {how:>6} {name:>12}{told(pairs)}", flush=True)


if __name__ == "__main__":
    main()
