"""What the node agent costs: idle beside live runs, for a scrape, and to read a long recording.

    python benchmarks/node_agent.py [--ranks 8] [--layers 150] [--rate 10] [--steps 100000]

One process writes as many recordings as there are ranks, through the pipeline that a watch has,
without a framework. `gradwatch serve` is a process of its own, whose processor time is read from
the system; a scrape is timed from asking to the last byte.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from gradwatch.pipeline import Pipeline
from gradwatch.policy import load_policy
from gradwatch.recording.ring import Row
from gradwatch.recording.store import Store
from gradwatch.records import Layout, Parameter, RunInfo, StepRecord


def info_of(name: str, rank: int, layers: int) -> RunInfo:
    policy = load_policy(None)
    names = [f"transformer.blocks.{i}.attention.weight" for i in range(layers)]
    return RunInfo(
        run=name,
        rank=rank,
        layout=Layout.of([Parameter(name=one) for one in names]),
        policy=policy.canonical_yaml(),
        policy_sha256=policy.sha256,
        started=time.time(),
        pid=os.getpid(),
    )


def row(step: int, norms: np.ndarray) -> Row:
    total = float(np.linalg.norm(norms))
    return Row(
        step=step, time=time.time(), duration_seconds=0.1, overhead_seconds=1e-4,
        total_norm=total, total_norm_clipped=total, clip_coef=1.0, fired=0, skipped=0,
        micro_batches=1, weight=1.0, loss_scale=float("nan"), learning_rate=1e-3, limits=[],
        tensor_norms_P=norms, tensor_coefs_P=None, present_P=None,
    )  # fmt: skip


def write(directory: str, ranks: int, layers: int, rate: float, one_run: bool) -> None:
    """Records until it is killed."""
    names = [("bench", rank) if one_run else (f"bench-{rank}", 0) for rank in range(ranks)]
    pipelines = [
        Pipeline(info_of(name, rank, layers), load_policy(None), directory) for name, rank in names
    ]
    random, step, next_step = np.random.default_rng(0), 0, time.monotonic()
    while True:
        for pipeline in pipelines:
            norms = random.lognormal(sigma=0.1, size=layers).astype(np.float32)
            pipeline.recorder.append(row(step, norms))
        step, next_step = step + 1, next_step + 1 / rate
        time.sleep(max(0.0, next_step - time.monotonic()))


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started_agent(directory: str) -> tuple[subprocess.Popen[str], str]:
    agent = subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "serve", directory, "--port", "0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert agent.stdout is not None
    return agent, agent.stdout.readline().split(" at ")[1].split(";")[0]


def scraped(url: str) -> tuple[float, bytes]:
    started = time.perf_counter()
    body = urllib.request.urlopen(url).read()
    return time.perf_counter() - started, body


def live(options: argparse.Namespace, one_run: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        arguments = [options.ranks, options.layers, options.rate, int(one_run)]
        writer = subprocess.Popen(
            [sys.executable, __file__, "--write", directory, *map(str, arguments)]
        )
        time.sleep(3)
        agent, url = started_agent(directory)
        try:
            time.sleep(5)
            before = processor_seconds(agent.pid)
            time.sleep(options.seconds)
            share = (processor_seconds(agent.pid) - before) / options.seconds
            scrapes = []
            for _ in range(15):
                time.sleep(0.7)
                scrapes.append(scraped(url))
        finally:
            for process in (agent, writer):
                process.kill()
                process.wait()
    times = sorted(seconds for seconds, _ in scrapes)
    series = sum(not line.startswith(b"#") for line in scrapes[-1][1].splitlines())
    what = "one run of all ranks" if one_run else "a run each, all of rank 0"
    print(
        f"{what}: {share:.1%} of a core without a scrape; a scrape of {series} series "
        f"{statistics.median(times) * 1e3:.0f} ms, the slowest of 15 {times[-1] * 1e3:.0f} ms",
        flush=True,
    )


def long(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        info = info_of("long", 0, options.layers)
        store, random = Store(Path(directory, "long.sqlite"), info), np.random.default_rng(0)
        parameters = len(info.layout.parameters)
        for start in range(0, options.steps, 1000):
            store.add(
                [record(info, step, random, parameters) for step in range(start, start + 1000)]
            )
        store.note_state("finished")
        store.close()
        began = time.perf_counter()
        agent, url = started_agent(directory)
        slowest = 0.0
        try:
            while b"gradwatch_steps_total{" not in (answer := scraped(url))[1]:
                slowest = max(slowest, answer[0])
                time.sleep(0.1)
            took = time.perf_counter() - began
        finally:
            agent.kill()
            agent.wait()
    print(
        f"a recording of {options.steps} steps that was there before: shown after {took:.1f} s, "
        f"the slowest scrape meanwhile {slowest * 1e3:.0f} ms",
        flush=True,
    )


def record(info: RunInfo, step: int, random: np.random.Generator, count: int) -> StepRecord:
    norms = random.lognormal(sigma=0.1, size=count).astype(np.float32)
    total = float(np.linalg.norm(norms))
    return StepRecord(
        step=step, time=time.time(), layout=info.layout, total_norm=total,
        total_norm_clipped=total, tensor_norms_P=norms, tensor_coefs_P=np.ones_like(norms),
        present_P=np.ones(count, dtype=np.bool_), duration_seconds=0.1, scalars={"loss": 1.0},
    )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        directory, ranks, layers, rate, one_run = sys.argv[2:]
        write(directory, int(ranks), int(layers), float(rate), bool(int(one_run)))
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--ranks", type=int, default=8)
    arguments.add_argument("--layers", type=int, default=150)
    arguments.add_argument("--rate", type=float, default=10.0)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--steps", type=int, default=100_000)
    options = arguments.parse_args()
    print(f"{options.ranks} ranks of {options.layers} layers, {options.rate:g} steps/s each")
    live(options, one_run=True)
    live(options, one_run=False)
    long(options)


if __name__ == "__main__":
    main()
