"""What a scrape costs the run that is scraped, as ratios from one run.

    python benchmarks/scrape_stall.py [--rounds 20] [--scrapes 12]

Rendering: snapshot and text format of 100, 1,000 and 10,000 layer series, ours and
`prometheus_client.generate_latest` over the same totals, one after the other in each round;
medians. Stalling: a loop of torch operations on tensors of 4 KiB, about 3 ms a step, while both
serve 10,000 layer series over HTTP from threads of this process and are scraped in turn. Each
operation gives the interpreter up and must have it back, so a step waits for whoever renders.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import prometheus_client
import torch
from prometheus_client import CollectorRegistry

from gradwatch.export.collector import TallyCollector
from gradwatch.export.exporter import Exporter
from gradwatch.export.renderer import Renderer
from gradwatch.records import Layout, Parameter, RunInfo, StepRecord
from gradwatch.tally import Tally

STEP_SECONDS = 0.003
PER_LAYER_FAMILIES = 2


def filled_tally(num_series: int) -> Tally:
    count = num_series // PER_LAYER_FAMILIES
    names = [f"transformer.blocks.{i}.attention.weight" for i in range(count)]
    layout = Layout.of([Parameter(name=name) for name in names])
    norms = np.random.default_rng(0).lognormal(size=count).astype(np.float32)
    tally = Tally(RunInfo(run="benchmark", layout=layout), kinds=("exploding", "nonfinite"))
    tally.add(
        StepRecord(
            step=0,
            time=time.time(),
            layout=layout,
            total_norm=float(np.linalg.norm(norms)),
            total_norm_clipped=float(np.linalg.norm(norms)),
            tensor_norms_P=norms,
            tensor_coefs_P=np.ones_like(norms),
            present_P=np.ones(count, dtype=np.bool_),
        )
    )
    return tally


def registry_of(tally: Tally) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally, max_layers=sys.maxsize))
    return registry


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare_rendering(num_series: int, rounds: int) -> tuple[float, float]:
    """Median seconds of generate_latest and of ours."""
    tally = filled_tally(num_series)
    registry = registry_of(tally)
    renderer = Renderer(tally.info, max_layers=sys.maxsize)
    theirs, ours = [], []
    for round_ in range(rounds + 1):
        client = timed(lambda: prometheus_client.generate_latest(registry))
        own = timed(lambda: renderer.render(tally.snapshot()))
        if round_:  # the first one fills caches
            theirs.append(client)
            ours.append(own)
    return statistics.median(theirs), statistics.median(ours)


class Loop:
    """A step of many small operations, as many as take 3 ms."""

    def __init__(self) -> None:
        self._x = torch.randn(1024)
        self._operations = 100
        # Of many, the quickest: what a step takes when nobody else is at work.
        per_operation = min(timed(self.step) for _ in range(200)) / self._operations
        self._operations = max(1, round(STEP_SECONDS / per_operation))

    def step(self) -> None:
        for _ in range(self._operations):
            torch.sin(self._x)


@dataclass
class Stall:
    quiet: float
    """Median step before the scrape, in seconds."""

    worst: float
    """The longest of the steps during the scrape."""

    added: float
    """What all steps during the scrape took beyond the quiet median."""

    scrape: float
    """From asking to the last byte."""


# In a process of its own, so that only the answer is paid for by the loop.
CLIENT = "import sys, urllib.request\nfor url in sys.stdin:\n"
CLIENT += "    print(len(urllib.request.urlopen(url.strip()).read()), flush=True)"


class Scraper:
    def __init__(self) -> None:
        self._client = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._questions, self._answers = self._client.stdin, self._client.stdout

    def scrape(self, url: str) -> int:
        self._questions.write(url + "\n")
        return int(self._answers.readline())

    def during(self, loop: Loop, url: str) -> Stall:
        import select

        quiet = statistics.median(timed(loop.step) for _ in range(60))
        self._questions.write(url + "\n")
        asked = time.perf_counter()
        steps = []
        while not select.select([self._answers], [], [], 0)[0]:
            steps.append(timed(loop.step))
        scrape = time.perf_counter() - asked
        int(self._answers.readline())
        added = sum(max(0.0, step - quiet) for step in steps)
        return Stall(quiet, max(steps), added, scrape)

    def close(self) -> None:
        self._questions.close()
        self._client.wait(10)


def compare_stalls(num_series: int, scrapes: int) -> tuple[list[Stall], list[Stall]]:
    """Of prometheus_client's own server and of ours, scraped in turn."""
    tally = filled_tally(num_series)
    server, thread = prometheus_client.start_http_server(
        0, addr="127.0.0.1", registry=registry_of(tally)
    )
    exporter = Exporter(tally, port=0, max_layers=sys.maxsize)
    urls = f"http://127.0.0.1:{server.server_port}/metrics", exporter.url or ""
    scraper, loop = Scraper(), Loop()
    theirs, ours = [], []
    try:
        for url in urls:
            scraper.scrape(url)
        for _ in range(scrapes):
            theirs.append(scraper.during(loop, urls[0]))
            ours.append(scraper.during(loop, urls[1]))
    finally:
        scraper.close()
        exporter.close()
        server.shutdown()
        server.server_close()
        thread.join()
    return theirs, ours


def print_stalls(name: str, stalls: list[Stall]) -> None:
    quiet = statistics.median(stall.quiet for stall in stalls)
    worst = statistics.median(stall.worst for stall in stalls)
    added = statistics.median(stall.added for stall in stalls)
    scrape = statistics.median(stall.scrape for stall in stalls)
    ratio = statistics.median(stall.worst / stall.quiet for stall in stalls)
    print(
        f"{name:18} {quiet * 1e3:9.2f} ms {worst * 1e3:9.2f} ms {ratio:7.2f}x "
        f"{added * 1e3:9.2f} ms {scrape * 1e3:9.2f} ms",
        flush=True,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--scrapes", type=int, default=12)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    print(f"prometheus_client {_version()}, {options.rounds} rounds, {options.scrapes} scrapes")
    print(f"{'layer series':>12} {'generate_latest':>16} {'gradwatch':>12} {'ratio':>7}")
    for num_series in (100, 1000, 10_000):
        theirs, ours = compare_rendering(num_series, options.rounds)
        print(
            f"{num_series:12} {theirs * 1e3:13.2f} ms {ours * 1e3:9.2f} ms {theirs / ours:6.1f}x",
            flush=True,
        )
    print()
    print(f"{'10,000 series':18} {'quiet step':>12} {'worst step':>12} {'ratio':>8}", end=" ")
    print(f"{'added':>12} {'scrape':>12}")
    theirs_, ours_ = compare_stalls(10_000, options.scrapes)
    print_stalls("prometheus_client", theirs_)
    print_stalls("gradwatch", ours_)


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("prometheus-client")


if __name__ == "__main__":
    main()
