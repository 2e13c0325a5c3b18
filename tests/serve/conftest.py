"""Training processes that are asked step by step, and a node agent as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from gradwatch.pipeline import Pipeline
from gradwatch.policy import load_policy
from gradwatch.recording.ring import Row
from gradwatch.records import Layout, Parameter, RunInfo

TRAINER = """
import os, signal, sys, torch, gradwatch, gradwatch.torch.watch as watching
torch.set_num_threads(1)
torch.manual_seed(0)
name, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
made = watching.run_info
watching.run_info = lambda *given, **facts: made(*given, **{**facts, "rank": rank})
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
watch = gradwatch.attach(
    model, optimizer, {"version": 1, "clip": [{"limit": 1.0}]},
    run=name, port=0, recording=directory, linger=0,
)
print(watch.url, flush=True)
for line in sys.stdin:
    count, scale, *then = line.split()
    for _ in range(int(count)):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean() * float(scale)
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()
    if then == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if then != ["open"]:
        watch.flush()
    print("done", flush=True)
watch.close()
"""


@dataclass
class Trainer:
    """A training process that steps when it is told to."""

    process: subprocess.Popen[str]
    url: str

    def steps(self, count: int, scale: float = 1.0, then: str = "") -> None:
        self.process.stdin.write(f"{count} {scale} {then}\n")
        self.process.stdin.flush()
        if then != "die":
            assert self.process.stdout.readline() == "done\n"
        else:
            # Not reaped: a killed child of a launcher is a zombie, and dead all the same.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def finish(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """`train("name", rank)`; every process has ended when the test has."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, rank: int = 0, directory: Path | None = None) -> Trainer:
        folder = tmp_path / "runs" if directory is None else directory
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, name, str(rank), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Trainer(process, process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def fetched(url: str, accept: str = "") -> str:
    asked = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="session", name="fetched")
def fetched_fixture() -> Callable[..., str]:
    return fetched


def samples_of(text: str) -> dict[tuple[str, ...], str]:
    """Each series with its value; a series that comes twice is an error."""
    read = read_openmetrics if text.endswith("# EOF\n") else read_text
    found: dict[tuple[str, ...], str] = {}
    families = set()
    for family in read(text):
        assert family.name not in families, f"twice: {family.name}"
        families.add(family.name)
        for sample in family.samples:
            key = (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items())))
            assert key not in found, f"twice: {key}"
            found[key] = repr(float(sample.value))
    return found


@pytest.fixture(scope="session", name="samples_of")
def samples_of_fixture() -> Callable[[str], dict[tuple[str, ...], str]]:
    return samples_of


@pytest.fixture(scope="session")
def eventually() -> Callable[..., object]:
    """Asks until the answer is true, and gives it back."""

    def wait(ask: Callable[[], object], seconds: float = 20.0) -> object:
        deadline = time.monotonic() + seconds
        while not (answer := ask()):
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.05)
        return answer

    return wait


@dataclass
class Served:
    """`gradwatch serve` as a shell starts it."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def samples(self, accept: str = "") -> dict[tuple[str, ...], str]:
        return samples_of(fetched(self.url, accept))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started = []

    def start(directory: Path, *arguments: str) -> Served:
        log = tmp_path / "serve.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "gradwatch", "serve", str(directory),
                 "--port", "0", *arguments],
                stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip
        started.append(process)
        said = process.stdout.readline()
        assert " at http://127.0.0.1:" in said, log.read_text()
        return Served(process, said.split(" at ")[1].split(";")[0], log)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class Recorded:
    """A run without a framework, recorded by this process."""

    pipeline: Pipeline
    count: int = 0

    def steps(self, count: int, norm: float = 1.0, **changed: object) -> None:
        for _ in range(count):
            self.pipeline.recorder.append(self._row(norm, **changed))
            self.count += 1
        self.pipeline.flush()

    def _row(self, norm: float, **changed: object) -> Row:
        number = len(self.pipeline.info.layout.parameters)
        norms = np.full(number, norm, dtype=np.float32) * (1 + 0.01 * (self.count % 7))
        total = float(np.linalg.norm(norms))
        values = {
            "step": self.count,
            "time": time.time(),
            "duration_seconds": 0.1,
            "overhead_seconds": 1e-4,
            "total_norm": total,
            "total_norm_clipped": total,
            "clip_coef": 1.0,
            "fired": 0,
            "skipped": 0,
            "micro_batches": 1,
            "weight": 1.0,
            "loss_scale": float("nan"),
            "learning_rate": 0.1,
            "limits": [],
            "tensor_norms_P": norms,
            "tensor_coefs_P": None,
            "present_P": None,
        }
        return Row(**(values | changed))


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Callable[..., Recorded]]:
    """`record("name", rank=1)`: a run whose pipeline is open."""
    opened: list[Pipeline] = []

    def start(name: str, directory: Path | None = None, layers: int = 3, **changed) -> Recorded:
        policy = load_policy(None)
        layout = Layout.of([Parameter(name=f"block.{i}.weight") for i in range(layers)])
        values = {"started": time.time(), "pid": os.getpid(), "host": "here", "version": "1"}
        values |= {"policy": policy.canonical_yaml(), "policy_sha256": policy.sha256}
        info = RunInfo(run=name, layout=layout, **(values | changed))
        folder = tmp_path / "runs" if directory is None else directory
        opened.append(Pipeline(info, policy, folder))
        return Recorded(opened[-1])

    yield start
    for pipeline in opened:
        pipeline.close("finished")
