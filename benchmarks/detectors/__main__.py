"""False alarms, detection rates and latencies of the default detectors, as tables.

    python -m benchmarks.detectors [--seed 1000] [--rounds 2] [--faults 3] [--only NAME]
                                   [--data FOLDER] [--write docs/detectors.md]

Seeds below 1000 were looked at while thresholds were chosen; those of the report were not.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.detectors.faults import FAULTS, Fault
from benchmarks.detectors.runs import Setting, healthy_settings, played
from gradwatch import Anomaly
from gradwatch.policy import KINDS
from gradwatch.records import Layout, Parameter, StepRecord
from gradwatch.rules.detection import Detection
from gradwatch.whatif.rates import upper_bound

MARK = "<!-- written by python -m benchmarks.detectors --write docs/detectors.md -->"
"""Behind it, to its end, a page holds what was measured."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectors", description=__doc__)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2, help="of the 36 healthy settings")
    parser.add_argument("--faults", type=int, default=3, help="runs of each fault and model")
    parser.add_argument("--write", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--only", help="faults whose name holds this")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    told = io.StringIO()
    with contextlib.redirect_stdout(told if options.write else sys.stdout):
        print(f"Seeds from {options.seed} on, torch {torch.__version__}.\n")
        if not options.only:
            report_healthy(options.seed, options.rounds)
            report_traces(options.data)
        report_faults(options.seed, options.faults, options.only or "")
    if options.write:
        head, _, _ = options.write.read_text().partition(MARK)
        options.write.write_text(f"{head}{MARK}\n\n{told.getvalue()}")
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr)


def report_healthy(seed: int, rounds: int) -> None:
    settings = [s for r in range(rounds) for s in healthy_settings(seed + 100 * r)]
    found: dict[str, Counter[str]] = defaultdict(Counter)
    runs: dict[str, int] = Counter()
    steps = 0
    for setting in settings:
        anomalies = played(setting)
        steps += setting.steps
        for kind in {a.kind for a in anomalies}:
            runs[kind] += 1
        for anomaly in anomalies:
            found[anomaly.kind][anomaly.level] += 1
            if anomaly.level != "event":
                print(f"{setting} seed {setting.seed} step {anomaly.step}: {anomaly.message}",
                      file=sys.stderr)  # fmt: skip
    count = len(settings)
    print(f"### {count} healthy runs, {steps} steps\n")
    print("| kind | level | findings | runs | per 1000 steps | runs, 95 % bound |")
    print("| --- | --- | --: | --: | --: | --: |")
    for kind in KINDS:
        levels = found[kind] or {"": 0}
        for level, times in levels.items():
            bound = upper_bound(runs[kind], count)
            print(f"| `{kind}` | {level} | {times} | {runs[kind]} | {1000 * times / steps:.3g} | "
                  f"{bound:.1%} |")  # fmt: skip
    alerts = sum(counter["alert"] for counter in found.values())
    print(f"\nAlerts: {alerts} in {count} runs; with 95 % confidence fewer than "
          f"{upper_bound(alerts, count):.1%} of runs.\n")  # fmt: skip


def report_traces(folder: Path) -> None:
    path = folder / "healthy_gpt_losses.json.gz"
    if not path.exists():
        print(f"No public traces at {folder}.\n")
        return
    series = traces(path)
    found = Counter(a.level for losses in series for a in of_losses(losses))
    steps = sum(len(losses) for losses in series)
    print(f"### {len(series)} public loss series of healthy GPTs, {steps} steps\n")
    print(f"alerts {found['alert']}, warnings {found['warning']}, events {found['event']}; with "
          f"95 % confidence fewer than {upper_bound(found['alert'], len(series)):.1%} of runs "
          "raise an alert.\n")  # fmt: skip


def traces(path: Path) -> list[Sequence[float]]:
    with gzip.open(path, "rt") as file:
        series = json.load(file)["series"]
    return list(series.values() if isinstance(series, dict) else series)


def of_losses(losses: Sequence[float]) -> list[Anomaly]:
    """Detection over a run of which only the loss is known; its norms are made up and steady."""
    layout = Layout.of([Parameter(name="made_up.weight")])
    detection, found = Detection(layout), []
    draw = np.random.default_rng(0)
    for step, loss in enumerate(losses):
        norm = np.array([np.exp(0.2 * draw.standard_normal())], dtype=np.float32)
        found += detection.observe(
            StepRecord(
                step=step, time=0.0, layout=layout, total_norm=float(norm[0]),
                total_norm_clipped=float(norm[0]), tensor_norms_P=norm,
                tensor_coefs_P=np.ones_like(norm), present_P=np.ones(1, dtype=np.bool_),
                scalars={"loss": float(loss)},
            )
        )  # fmt: skip
    return found


def report_faults(seed: int, runs: int, only: str) -> None:
    print("### Faults\n")
    print("| fault | to be said by | found | median latency | twins with an alert |")
    print("| --- | --- | --: | --: | --: |")
    for name, fault in FAULTS.items():
        if only in name:
            print(_line(name, fault, seed, runs), flush=True)


def _line(name: str, fault: Fault, seed: int, runs: int) -> str:
    caught, latencies, twins, ill = 0, [], 0, 0
    for model in fault.models:
        for number in range(runs):
            setting = Setting(model, fault.optimizer, seed=seed + number, steps=fault.steps)
            anomalies = played(
                setting, fault.hook, fault.at, prepare=fault.prepare, policy=fault.policy
            )
            hits = [a for a in anomalies if a.kind in fault.kinds and a.level == fault.level
                    and a.step >= fault.at]  # fmt: skip
            caught += bool(hits)
            latencies += [hits[0].step - fault.at + 1] if hits else []
            if not hits:
                others = [(a.kind, a.step) for a in anomalies]
                print(f"{name}: not found in {model} seed {setting.seed}: {others}",
                      file=sys.stderr)  # fmt: skip
            if fault.twin is not None or fault.twin_prepare is not None:
                twins += 1
                calm = played(
                    setting, fault.twin, fault.at,
                    prepare=fault.prepare if fault.twin_prepare is None else fault.twin_prepare,
                )  # fmt: skip
                alerts = [a for a in calm if a.level == "alert"]
                ill += bool(alerts)
                for alert in alerts[:1]:
                    print(f"twin of {name}: {model} seed {setting.seed}: {alert.message}",
                          file=sys.stderr)  # fmt: skip
    total = len(fault.models) * runs
    latency = f"{statistics.median(latencies):.0f}" if latencies else "-"
    twin = f"{ill} of {twins}" if twins else "-"
    kinds = " or ".join(f"`{kind}`" for kind in fault.kinds)
    return f"| {name} | {kinds} | {caught} of {total} | {latency} | {twin} |"


if __name__ == "__main__":
    main()
