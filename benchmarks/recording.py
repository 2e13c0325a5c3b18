"""What recording costs: the ring on the training thread, the store on the consumer's.

python benchmarks/recording.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from gradwatch.recording.ring import Ring, Row
from gradwatch.recording.store import Store
from gradwatch.records import Layout, Parameter, RunInfo


def microseconds(started: float, count: int) -> float:
    return (time.perf_counter() - started) / count * 1e6


def row(num_parameters: int) -> Row:
    norms = np.ones(num_parameters, dtype=np.float32)
    return Row(
        step=1,
        time=1.0,
        duration_seconds=1.0,
        overhead_seconds=0.0,
        total_norm=1.0,
        total_norm_clipped=1.0,
        clip_coef=1.0,
        fired=0,
        skipped=0,
        micro_batches=1,
        weight=1.0,
        loss_scale=1.0,
        learning_rate=1.0,
        limits=[1.0],
        tensor_norms_P=norms,
        tensor_coefs_P=norms * 0.5,
        present_P=None,
    )


def measured(num_parameters: int, directory: Path) -> tuple[float, float, float]:
    """Microseconds a row to append, to take, and to store in batches of 30; medians of rounds."""
    parameters = [Parameter(name=f"layer{i}.weight") for i in range(num_parameters)]
    info = RunInfo(run="bench", layout=Layout.of(parameters), rules=("global",))
    ring = Ring(info, directory / f"{num_parameters}.ring")
    store = Store(directory / f"{num_parameters}.sqlite", info)
    appends, takes, stores = [], [], []
    one = row(num_parameters)
    for _ in range(200):
        started = time.perf_counter()
        for _ in range(30):
            ring.append(one, {"loss": 1.0})
        appends.append(microseconds(started, 30))
        started = time.perf_counter()
        records = ring.take()
        takes.append(microseconds(started, len(records)))
        started = time.perf_counter()
        store.add(records)
        stores.append(microseconds(started, len(records)))
    store.close()
    return statistics.median(appends), statistics.median(takes), statistics.median(stores)


def main() -> None:
    print(f"{'tensors':>8} {'append':>10} {'take':>10} {'store':>10}   microseconds a step")
    with tempfile.TemporaryDirectory() as directory:
        for count in (10, 148, 1000, 5000):
            append, take, store = measured(count, Path(directory))
            print(f"{count:8} {append:10.1f} {take:10.1f} {store:10.1f}", flush=True)


if __name__ == "__main__":
    main()
