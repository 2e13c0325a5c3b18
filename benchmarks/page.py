"""What the live page costs: the first picture of a long run, a spike at each zoom, and idling.

    python benchmarks/page.py [--layers 1000] [--steps 100000] [--seconds 20]

A recording with one spike of one layer in one step is written first. `gradwatch serve` is a process
of its own; a headless Chromium opens the page as soon as the server says that it is there, so the
recording is read for the first time while the browser waits, and the node agent wants to read it
too. Processor time is that of the server, read from the system. Needs chromium and playwright.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

from gradwatch.pipeline import Pipeline
from gradwatch.policy import load_policy
from gradwatch.recording.ring import Row
from gradwatch.recording.store import Store
from gradwatch.records import Layout, Parameter, RunInfo, StepRecord

SPIKE = 1000.0
DRAWN = "html[data-drawn=yes]"


def info_of(name: str, layers: int) -> RunInfo:
    parts = "qkv", "proj", "up", "down"
    names = [f"blocks.{i // 4}.{parts[i % 4]}.weight" for i in range(layers)]
    return RunInfo(
        run=name, layout=Layout.of([Parameter(name=one) for one in names]),
        started=time.time(), pid=os.getpid(), policy=load_policy(None).canonical_yaml(),
    )  # fmt: skip


def write_long(path: Path, layers: int, steps: int, spike: tuple[int, int]) -> None:
    """One spike of one layer in one step of a run that is healthy otherwise."""
    info, random = info_of("long", layers), np.random.default_rng(0)
    store, ones = Store(path, info), np.ones(layers, dtype=np.float32)
    present = np.ones(layers, dtype=np.bool_)
    for start in range(0, steps, 1000):
        norms = random.lognormal(-3.0, 0.15, size=(min(1000, steps - start), layers))
        norms = norms.astype(np.float32)
        if start <= spike[0] < start + len(norms):
            norms[spike[0] - start, spike[1]] *= SPIKE
        totals = np.sqrt(np.square(norms, dtype=np.float64).sum(axis=1))
        store.add([
            StepRecord(
                step=start + i, time=info.started + 0.1 * (start + i), layout=info.layout,
                total_norm=float(totals[i]), total_norm_clipped=float(totals[i]),
                tensor_norms_P=norms[i], tensor_coefs_P=ones, present_P=present,
                duration_seconds=0.1, scalars={"loss": 2.0 + float(random.normal(0, 0.05))},
            )
            for i in range(len(norms))
        ])  # fmt: skip
    store.note_state("finished")
    store.close()


def write_live(directory: str, layers: int, rate: float) -> None:
    """Records until it is killed."""
    pipeline = Pipeline(info_of("live", layers), load_policy(None), directory)
    random, step = np.random.default_rng(0), 0
    while True:
        norms = random.lognormal(-3.0, 0.15, size=layers).astype(np.float32)
        total = float(np.linalg.norm(norms))
        pipeline.recorder.append(
            Row(
                step=step, time=time.time(), duration_seconds=1 / rate, overhead_seconds=1e-4,
                total_norm=total, total_norm_clipped=total, clip_coef=1.0, fired=0, skipped=0,
                micro_batches=1, weight=1.0, loss_scale=float("nan"), learning_rate=1e-3,
                limits=[], tensor_norms_P=norms, tensor_coefs_P=None, present_P=None,
            )
        )  # fmt: skip
        step += 1
        time.sleep(1 / rate)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started_server(directory: str) -> tuple[subprocess.Popen[str], str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "serve", directory, "--port", "0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(server.kill)  # whatever ends this program first
    assert server.stdout is not None
    server.stdout.readline()
    return server, server.stdout.readline().split()[-1]


def contention() -> float:
    """How much longer than its processor time a loop takes here: 1 where nobody else computes."""
    began, own = time.perf_counter(), time.process_time()
    while time.process_time() - own < 0.5:
        sum(range(1000))
    return (time.perf_counter() - began) / (time.process_time() - own)


def first_picture(browser: Browser, url: str, name: str) -> float:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    began = time.perf_counter()
    page.goto(f"{url}run?r={name}")
    page.wait_for_selector(DRAWN)
    took = time.perf_counter() - began
    page.close()
    return took


def picture(url: str, name: str, start: int, stop: int) -> tuple[np.ndarray, float]:
    """The departures as they are drawn, and how long they took to come."""
    began = time.perf_counter()
    asked = f"{url}news?r={name}&from={start}&to={stop}&version=0"
    news = json.loads(urllib.request.urlopen(asked).read())
    took = time.perf_counter() - began
    ((_, (array,)),) = [e for e in news["columns"]["heat"]["entries"] if e[0] == "departure"]
    stored = gzip.decompress(base64.b64decode(array["array"]["data"]))
    values = np.frombuffer(stored, "<f4")
    return values.reshape(array["shape"]), took


def zooms(url: str, name: str, steps: int, spike: tuple[int, int]) -> None:
    width = steps
    while width >= 50:
        start = min(max(0, spike[0] - width // 3), steps - width)
        cells, took = picture(url, name, start, start + width - 1)
        row, column = np.unravel_index(np.nanargmax(cells), cells.shape)
        seen = int((cells > 1.0).sum())
        print(
            f"  {width:>7} steps in {cells.shape[1]:>3} columns: {seen} cell above ten times its "
            f"usual, {10 ** float(cells[row, column]):,.0f} times; {took * 1e3:.0f} ms",
            flush=True,
        )
        width //= 4


def idle(browser: Browser, server: subprocess.Popen[str], page_url: str, seconds: float) -> float:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(page_url)
    page.wait_for_selector(DRAWN)
    time.sleep(5)
    before = processor_seconds(server.pid)
    time.sleep(seconds)
    share = (processor_seconds(server.pid) - before) / seconds
    page.close()
    return share


def settled(server: subprocess.Popen[str]) -> None:
    """Until the node agent has read what was there."""
    calm = 0
    while calm < 3:
        before = processor_seconds(server.pid)
        time.sleep(1)
        calm = calm + 1 if processor_seconds(server.pid) - before < 0.1 else 0


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        write_live(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--layers", type=int, default=1000)
    arguments.add_argument("--steps", type=int, default=100_000)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--rate", type=float, default=10.0)
    options = arguments.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("needs chromium: apt-get install chromium")
    spike = options.steps * 37 // 100 + 123, options.layers // 2
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        write_long(Path(directory, "long.sqlite"), options.layers, options.steps, spike)
        browser = playwright.chromium.launch(executable_path=chromium, args=as_root)
        load = os.getloadavg()[0]
        print(f"{options.layers} layers x {options.steps} steps; load {load:.1f}", flush=True)
        for _ in range(3):
            waited = contention()
            server, url = started_server(directory)
            cold, warm = (first_picture(browser, url, "long.sqlite") for _ in range(2))
            print(
                f"  first picture {cold:.1f} s, again {warm:.1f} s (just before, a loop took "
                f"{waited:.1f} times its processor time)",
                flush=True,
            )
            server.kill()
            server.wait()
        server, url = started_server(directory)
        settled(server)
        zooms(url, "long.sqlite", options.steps, spike)
        share = idle(browser, server, f"{url}run?r=long.sqlite", options.seconds)
        print(f"  its page open: {share:.1%} of a core", flush=True)
        writer = subprocess.Popen(
            [sys.executable, __file__, "--write", directory, "150", str(options.rate)]
        )
        atexit.register(writer.kill)
        time.sleep(5)
        (live,) = (path.name for path in Path(directory).glob("live*.sqlite"))
        share = idle(browser, server, f"{url}run?r={live}", options.seconds)
        print(f"a live run of 150 layers, {options.rate:g} steps/s: {share:.1%} of a core")
        for process in (writer, server):
            process.kill()
            process.wait()
        browser.close()


if __name__ == "__main__":
    main()
