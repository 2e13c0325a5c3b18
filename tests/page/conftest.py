"""Recordings without a framework, `gradwatch serve` as a process, a browser that looks at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gradwatch.pipeline import Pipeline
from gradwatch.policy import load_policy
from gradwatch.recording.ring import Row
from gradwatch.records import Layout, Parameter, RunInfo

POLICY = {"version": 1, "clip": [{"name": "global", "limit": 1.0}]}


@dataclass
class Run:
    """A run that is recorded by this process, as a watch would."""

    pipeline: Pipeline
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    count: int = 0

    @property
    def path(self) -> Path:
        return self.pipeline.path

    def steps(self, count: int, spikes: dict[int, float] | None = None, **changed: object) -> None:
        """Healthy ones, but for a factor on the layer in the middle in some of them."""
        for _ in range(count):
            self.pipeline.recorder.append(self._row((spikes or {}).get(self.count), **changed))
            self.count += 1
            if self.count % 100 == 0:
                self.pipeline.flush()  # the ring holds 256
        self.pipeline.flush()

    def _row(self, factor: float | None, **changed: object) -> Row:
        number = len(self.pipeline.info.layout.parameters)
        norms = (0.1 * self.random.lognormal(0, 0.1, number)).astype(np.float32)
        if factor is not None:
            norms[number // 2] *= factor
        total = float(np.linalg.norm(norms))
        coef = min(1.0, 1.0 / total) if np.isfinite(total) else 1.0
        bad = not np.isfinite(total)
        values = {
            "step": self.count, "time": time.time(), "duration_seconds": 0.1,
            "overhead_seconds": 1e-4, "total_norm": total, "total_norm_clipped": total * coef,
            "clip_coef": coef, "fired": int(coef < 1), "skipped": 1 if bad else 0,
            "micro_batches": 1, "weight": 1.0, "loss_scale": float("nan"), "learning_rate": 0.1,
            "limits": [1.0], "tensor_norms_P": norms,
            "tensor_coefs_P": None if coef == 1 else np.full(number, coef, dtype=np.float32),
            "present_P": None,
        }  # fmt: skip
        return Row(**(values | changed))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def record(runs: Path) -> Iterator[Callable[..., Run]]:
    """`record("name", layers=["a.weight"], rank=1)`: a run that goes on until `.pipeline.close`."""
    opened: list[Pipeline] = []

    def start(name: str, layers: list[str] | int = 6, folder: Path | None = None, **facts) -> Run:
        names = [f"block.{i}.weight" for i in range(layers)] if isinstance(layers, int) else layers
        policy = load_policy(POLICY)
        info = RunInfo(
            run=name, layout=Layout.of([Parameter(name=one, shape=(4, 4)) for one in names]),
            **{
                "rules": ("global",), "multiplying": ("global",), "mode": "enforce",
                "policy": policy.canonical_yaml(), "policy_sha256": policy.sha256,
                "started": time.time(), "pid": os.getpid(), "host": "here", **facts,
            },
        )  # fmt: skip
        opened.append(Pipeline(info, policy, runs if folder is None else folder))
        return Run(opened[-1])

    yield start
    for pipeline in opened:
        pipeline.close("finished")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    """Of the page, with a slash at its end."""


@pytest.fixture
def serve(runs: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, environment: dict[str, str] | None = None) -> Server:
        with (tmp_path / "serve.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "error::ResourceWarning", "-m", "gradwatch", "serve",
                 str(runs), "--port", "0", *arguments],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        started.append(process)
        process.stdout.readline()
        said = process.stdout.readline()
        assert said.startswith("the page is at "), (tmp_path / "serve.log").read_text()
        return Server(process, said.split()[-1])

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def samples_of() -> Callable[[str], list[str]]:
    """The lines of an exposition that can be parsed."""
    from prometheus_client.parser import text_string_to_metric_families as read

    return lambda text: [sample.name for family in read(text) for sample in family.samples]


@pytest.fixture(scope="session")
def chromium():
    """A headless one of the system, for all tests of the session."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is missing: scripts/programs installs it")
        pytest.skip("chromium is not installed: scripts/programs installs it")
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=as_root)
        yield browser
        with suppress(Exception):
            browser.close()


class Looked:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, browser, **settings) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 900}, **settings)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else 0,
        )
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, url: str):
        """A page whose figures are drawn."""
        self.page.goto(url)
        self.page.wait_for_selector("html[data-drawn=yes]", timeout=30_000)
        return self.page

    def until(self, expression: str, seconds: float = 15.0) -> None:
        """Asks until it is true; the page's own rules let no test wait inside of it."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}"
            time.sleep(0.05)

    def elsewhere(self, url: str) -> list[str]:
        """What was asked for that is not of that server."""
        inside = (url, "data:", "blob:", "file:")
        return [asked for asked in self.asked if not asked.startswith(inside)]


@pytest.fixture
def look(chromium) -> Iterator[Callable[..., Looked]]:
    opened: list[Looked] = []

    def start(**settings) -> Looked:
        opened.append(Looked(chromium, **settings))
        return opened[-1]

    yield start
    for one in opened:
        one.context.close()
