"""Trainings that go wrong, one for each alert, a forked process for each rank.

    provoking.py GO TARGETS RECORDINGS FOLLOWED     until it is terminated

Each trains in good health until the file GO is there, and then its fault begins: a file RUN.fault
beside GO says at which Unix time. A run is called like its alert without `Gradwatch`; `Healthy` has
no fault.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradwatch

WARMUP = 120
STEP_SECONDS = 0.1
WIDTH = 16
CLIP = {"clip": [{"name": "global", "limit": 10.0}]}
"""Far above the norm of a healthy step."""

FILE = "version: 1\nclip:\n  - {name: global, limit: LIMIT}\n"


class Network(nn.Module):
    """Two layers, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.beside = nn.Linear(WIDTH, WIDTH)
        self.passed_back = 1.0
        """Of the gradient of `first`."""

        self.calls_beside = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.passed_back != 1.0:
            hidden = hidden * self.passed_back + (hidden * (1 - self.passed_back)).detach()
        out = self.last(torch.tanh(hidden))
        return out + self.beside(x) if self.calls_beside else out


class Wide(nn.Module):
    """One layer for each output."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat([layer.weight for layer in self.outputs]).T


@dataclass(frozen=True, kw_only=True)
class Provocation:
    """What a run is made of, and what befalls it."""

    fault: Callable[[Run], None] | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    follows_file: bool = False
    """Whether the policy is a file."""

    is_followed: bool = False
    """By the node agent, by way of its recording, and not by its own port."""

    ranks: int = 1
    network: Callable[[], nn.Module] = Network
    dtype: torch.dtype = torch.float32
    learning_rate: float = 0.01
    scales_loss: bool = False
    seconds: float = STEP_SECONDS
    warmup: int = WARMUP
    """Steps that are taken at once."""

    is_born_with_it: bool = False
    """Whether the fault is there from the first step."""


class Run:
    """One rank of a training whose network is as good as it can be, but for noise."""

    def __init__(self, name: str, made: Provocation, rank: int, where: Where) -> None:
        torch.manual_seed(0)
        self.name, self.rank, self.where = name, rank, where
        self.network = made.network().to(made.dtype)
        self._dtype = made.dtype
        self._teacher = copy.deepcopy(self.network)
        self._called = self.network
        if made.ranks > 1:
            self._called = nn.parallel.DistributedDataParallel(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=made.learning_rate, fused=made.scales_loss
        )
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if made.scales_loss else None
        self.policy_file = where.recordings / f"{name}.yaml"
        self.policy_file.write_text(FILE.replace("LIMIT", "10"))
        self.watch = gradwatch.attach(
            self._called, self.optimizer,
            self.policy_file if made.follows_file else {"version": 1, **made.policy},
            run=name, port=None if made.is_followed else 0, discovery=where.targets,
            recording=where.followed if made.is_followed else where.recordings,
            scaler=self._scaler,
        )  # fmt: skip
        torch.manual_seed(1 + rank)
        self._steps = 0
        self.kept: object = None
        self.seconds = made.seconds
        self.factor: Callable[[int], float] = lambda step: 1.0
        self.batch: Callable[[], torch.Tensor] = lambda: torch.randn(8, WIDTH)
        self.target: Callable[[torch.Tensor], torch.Tensor] = self._noisy
        self.clip: Callable[[], None] = lambda: None
        """What the loop itself does to the gradient."""

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        right = self._teacher(x)
        return right + 0.5 * torch.randn_like(right)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        self._steps += 1
        self.optimizer.zero_grad()
        x = self.batch().to(self._dtype)
        with torch.no_grad():
            wanted = self.target(x)
        loss = self.factor(self._steps) * (self._called(x) - wanted).square().mean()
        if self._scaler is None:
            loss.backward()
            self.clip()
            self.watch.log(loss=loss)
            self.optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self.watch.log(loss=loss)
            self._scaler.step(self.optimizer)
            self._scaler.update()


@dataclass(frozen=True)
class Where:
    go: Path
    targets: Path
    recordings: Path
    followed: Path
    """Recordings that a node agent follows."""

    parent: int

    def note(self, name: str) -> None:
        """That the fault of this run begins now."""
        self.go.with_name(f"{name}.fault").write_text(str(time.time()))

    def live(self) -> None:
        """Ends the process once nobody waits for it any more."""
        if os.getppid() != self.parent:
            os._exit(1)


def always(factor: float) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        run.factor = lambda step: factor

    return fault


def sometimes(factor: float, every: int) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        run.factor = lambda step: 1.0 if step % every else factor

    return fault


def learning_rate(rate: float) -> Callable[[Run], None]:
    return lambda run: run.set_learning_rate(rate)


def limit_in_file(limit: str) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        run.policy_file.write_text(FILE.replace("LIMIT", limit))

    return fault


def a_weight_changes_on_one_rank(run: Run) -> None:
    if run.rank == 1:
        with torch.no_grad():
            run.network.first.weight[0, 0] += 0.01


def one_rank_has_other_data(run: Run) -> None:
    if run.rank == 2:
        run.batch = lambda: 30 * torch.randn(8, WIDTH)


def a_layer_loses_its_gradient(run: Run) -> None:
    run.network.passed_back = 1e-8


def labels_are_of_other_inputs(run: Run) -> None:
    run.target = lambda x: 3 * torch.randn_like(x)


def the_same_batch_again(run: Run) -> None:
    batch = run.batch()
    with torch.no_grad():
        target = run.target(batch)
    run.batch, run.target = (lambda: batch), (lambda x: target)
    run.set_learning_rate(0.0)


def somebody_clips_before(run: Run) -> None:
    def clip() -> None:
        nn.utils.clip_grad_norm_(run.network.parameters(), 0.1)

    run.clip = clip


def a_layer_is_not_called_any_more(run: Run) -> None:
    run.network.calls_beside = False


def gradients_cannot_be_scaled(run: Run) -> None:
    """A hook of the loop's leaves a view whose elements are one and the same."""
    weight = run.network.last.weight
    weight.register_post_accumulate_grad_hook(
        lambda parameter: setattr(parameter, "grad", parameter.grad[:1].expand_as(parameter))
    )
    run.factor = lambda step: 1000.0


def hangs(run: Run) -> None:
    while True:
        run.where.live()
        time.sleep(0.1)


def is_killed(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_killed_and_forgotten(run: Run) -> None:
    (target,) = run.where.targets.glob(f"gradwatch-{run.name}-*")
    target.unlink()
    is_killed(run)


def callbacks_fail(run: Run) -> None:
    def callback(anomaly: gradwatch.Anomaly) -> None:
        raise ConnectionError("the chat server does not answer")

    run.watch.on_anomaly(callback)
    sometimes(100.0, every=20)(run)


def steps_become_short(run: Run) -> None:
    run.seconds = 0.001


def somebody_locks_the_recording(run: Run) -> None:
    run.kept = sqlite3.connect(run.watch.recording, isolation_level=None)
    run.kept.execute("BEGIN IMMEDIATE")


def half_a_recording_is_copied(run: Run) -> None:
    copied = run.where.followed / "copied.sqlite"
    with closing(sqlite3.connect(run.watch.recording)) as source:
        with closing(sqlite3.connect(copied)) as target:
            source.backup(target)
    os.truncate(copied, copied.stat().st_size // 2)


SAMPLED = {"detect": {"every": 1}}

HEALTHY = "Healthy"
PROVOCATIONS = {
    HEALTHY: Provocation(policy=CLIP, warmup=0),
    "ExplodingGradient": Provocation(policy=CLIP, fault=always(1e4)),
    "NonFiniteGradient": Provocation(
        policy={"guard": {"nonfinite": "skip"}}, fault=sometimes(float("nan"), every=10)
    ),
    "RankDivergence": Provocation(
        ranks=2, policy={"detect": {"rank_divergence": {"every": 10}}},
        fault=a_weight_changes_on_one_rank,
    ),
    "RankOutlier": Provocation(ranks=3, policy=SAMPLED, fault=one_rank_has_other_data),
    "VanishingGradient": Provocation(fault=a_layer_loses_its_gradient),
    "UpdateOutOfRange": Provocation(policy={**CLIP, **SAMPLED}, fault=learning_rate(100.0)),
    "PrecisionLost": Provocation(
        policy=SAMPLED, dtype=torch.bfloat16, learning_rate=0.2, fault=learning_rate(0.004)
    ),
    "LossRising": Provocation(fault=labels_are_of_other_inputs),
    "LossScaleCollapsed": Provocation(scales_loss=True, fault=always(1e37)),
    "GradientStuck": Provocation(fault=the_same_batch_again),
    "ParameterUnused": Provocation(
        policy={"detect": {"unused": {"steps": 20}}}, fault=a_layer_is_not_called_any_more
    ),
    "GradNormSpiking": Provocation(policy=CLIP, fault=sometimes(100.0, every=8)),
    "ClippingSaturated": Provocation(follows_file=True, fault=limit_in_file("0.001")),
    "ClippedElsewhere": Provocation(policy=CLIP, fault=somebody_clips_before),
    "StepsSkipped": Provocation(
        policy={"clip": [{"limit": 10.0, "then": "skip"}]}, fault=sometimes(100.0, every=6)
    ),
    "NotEnforcing": Provocation(
        policy={**CLIP, "guard": {"on_error": "observe"}}, fault=gradients_cannot_be_scaled
    ),
    "PolicyRefused": Provocation(follows_file=True, fault=limit_in_file("-1")),
    "TrainingStalled": Provocation(fault=hangs),
    "ExporterDown": Provocation(fault=is_killed),
    "RunDisappeared": Provocation(fault=is_killed_and_forgotten),
    "HookErrors": Provocation(policy=CLIP, fault=callbacks_fail),
    "OverheadHigh": Provocation(
        network=lambda: Wide(300), seconds=0.3, warmup=0, fault=steps_become_short
    ),
    "RecordsDropped": Provocation(fault=somebody_locks_the_recording),
    "SeriesDropped": Provocation(network=lambda: Wide(520), is_born_with_it=True),
    "AgentErrors": Provocation(is_followed=True, fault=half_a_recording_is_copied),
}  # fmt: skip


def train(name: str, rank: int, port: int, where: Where) -> None:
    made = PROVOCATIONS[name]
    if made.ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=made.ranks
        )
    while made.is_born_with_it and not where.go.exists():
        where.live()
        time.sleep(0.1)
    if made.is_born_with_it:
        where.note(name)
    run = Run(name, made, rank, where)
    for _ in range(made.warmup):
        run.step()
    while not where.go.exists():
        where.live()
        time.sleep(run.seconds)
        run.step()
    if made.fault is not None:
        if rank == made.ranks - 1:
            where.note(name)
        made.fault(run)
    while True:
        where.live()
        time.sleep(run.seconds)
        run.step()


def load() -> None:
    """Everything that a watched step imports, once for all; without a backward pass, whose threads
    no fork survives."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, port=None, recording=None):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def main() -> None:
    torch.set_num_threads(1)
    load()
    where = Where(*map(Path, sys.argv[1:]), parent=os.getpid())
    for name, made in PROVOCATIONS.items():
        port = free_port()
        for rank in range(made.ranks):
            if os.fork() == 0:
                try:
                    train(name, rank, port, where)
                finally:
                    sys.stderr.flush()
                    os._exit(1)
    while True:
        os.wait()


if __name__ == "__main__":
    main()
