"""What one record costs the detectors, by number of layers; no framework, one thread.

    python benchmarks/detection_cost.py [--records 1600]

Each record is new: log-normal norms, one tensor a layer, all present. The mean holds the refresh
of the baselines, which comes every 16 records; the 99th percentile is such a record. Bars: 60
microseconds a record at 62 layers, 500 at 1000.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from gradwatch.records import Layout, Parameter, StepRecord
from gradwatch.rules.detection import Detection

LAYERS = {10: None, 62: 60.0, 148: None, 1000: 500.0, 5000: None}
"""Number of layers, and the bar in microseconds."""

WARMUP = 256


def records(layout: Layout, count: int) -> list[StepRecord]:
    draw = np.random.default_rng(0)
    present = np.ones(len(layout.parameters), dtype=np.bool_)
    made = []
    for step in range(count):
        norms = draw.lognormal(0.0, 0.2, len(layout.parameters)).astype(np.float32)
        total = float(np.linalg.norm(norms))
        made.append(
            StepRecord(
                step=step,
                time=0.0,
                layout=layout,
                total_norm=total,
                total_norm_clipped=total,
                tensor_norms_P=norms,
                tensor_coefs_P=np.ones_like(norms),
                present_P=present,
                learning_rate=1e-3,
            )
        )
    return made


def costs(num_layers: int, count: int) -> np.ndarray:
    """Seconds of each record once the baselines are full."""
    layout = Layout.of([Parameter(name=f"layer{i}.weight") for i in range(num_layers)])
    detection = Detection(layout)
    seconds = []
    for record in records(layout, WARMUP + count):
        started = time.perf_counter()
        detection.observe(record)
        seconds.append(time.perf_counter() - started)
    return np.array(seconds[WARMUP:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--records", type=int, default=1600)
    count = arguments.parse_args().records
    print(f"{'layers':>6} {'mean':>10} {'median':>10} {'p99':>10}   microseconds a record")
    for num_layers, bar in LAYERS.items():
        micros = 1e6 * costs(num_layers, count if num_layers < 5000 else count // 4)
        mean, median, late = micros.mean(), np.median(micros), np.quantile(micros, 0.99)
        verdict = "" if bar is None else f"bar {bar:g}: {'met' if mean <= bar else 'MISSED'}"
        print(f"{num_layers:6} {mean:10.1f} {median:10.1f} {late:10.1f}   {verdict}", flush=True)


if __name__ == "__main__":
    main()
