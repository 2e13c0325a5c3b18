"""What is out of the ordinary is found while its record is open: there may be no next step."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import consumer
from gradwatch.policy import load_policy
from gradwatch.records import Layout, Parameter, StepRecord
from gradwatch.rules.detection import Detection
from gradwatch.urgency import FACTOR, WARMUP, Urgency

LAYOUT = Layout.of([Parameter(name="a.weight")])


def record(step: int, norm: float) -> StepRecord:
    return StepRecord(
        step=step, time=1000.0 + step, layout=LAYOUT, total_norm=norm, total_norm_clipped=norm,
        tensor_norms_P=np.array([norm], np.float32), tensor_coefs_P=np.ones(1, np.float32),
        present_P=np.ones(1, np.bool_),
    )  # fmt: skip


@pytest.fixture
def woken() -> list[int]:
    return []


@pytest.fixture
def urgency(woken) -> Urgency:
    """That has learned what is usual: norms about 2."""
    urgency = Urgency(lambda: woken.append(1))
    urgency.learn([record(i, 2.0 + 0.01 * i) for i in range(WARMUP)], is_calm=True)
    return urgency


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 2.2 * FACTOR])
def test_a_norm_that_is_not_finite_or_far_above_the_usual_wakes_the_consumer(urgency, woken, norm):
    urgency.see(99, norm)
    assert (urgency.step, woken) == (99, [1])


@pytest.mark.parametrize("norm", [0.0, 2.0, 2.0 * FACTOR])
def test_a_usual_one_does_not(urgency, woken, norm):
    urgency.see(99, norm)
    assert (urgency.step, woken) == (-1, [])


def test_while_an_alert_is_open_nothing_is_urgent(urgency):
    urgency.learn([record(50, 2.0)], is_calm=False)
    urgency.see(99, float("nan"))
    assert urgency.step == -1
    urgency.learn([], is_calm=True)
    urgency.see(100, float("nan"))
    assert urgency.step == 100


def test_before_the_usual_is_known_only_what_is_not_finite_is_urgent():
    urgency = Urgency(lambda: None)
    urgency.learn([record(i, 1.0) for i in range(WARMUP - 1)], is_calm=True)
    urgency.see(1, 1e30)
    assert urgency.step == -1
    urgency.see(2, float("inf"))
    assert urgency.step == 2


class Loop:
    def __init__(self, attach) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.watch = attach(self.model, self.optimizer)

    def step(self, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 4)).square().mean() * factor
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())


@pytest.fixture
def patient(monkeypatch) -> None:
    """Nothing but urgency has a record looked at that no step has closed."""
    monkeypatch.setattr(consumer, "OPEN_SECONDS", 1e9)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", ["nonfinite", "exploding"])
def test_an_alert_of_the_last_step_is_told_without_a_step_behind_it(attach, kind):
    loop, found = Loop(attach), threading.Event()
    loop.watch.on_anomaly(lambda anomaly: anomaly.kind == kind and found.set())
    for _ in range(150):
        loop.step()
    for factor in [float("nan")] if kind == "nonfinite" else [1e8] * 3:
        loop.step(factor)
    assert found.wait(30)


@pytest.mark.usefixtures("patient")
def test_a_loss_that_is_logged_behind_its_step_is_seen_by_the_detectors(attach, monkeypatch):
    monkeypatch.setattr(consumer, "URGENT_SECONDS", 1e9)
    loop, found = Loop(attach), threading.Event()
    kinds: list[str] = []
    loop.watch.on_anomaly(lambda anomaly: (kinds.append(anomaly.kind), found.set()))
    for _ in range(30):
        loop.step()
        loop.watch.log(loss=loop.loss)
    loop.watch.flush()
    loop.step()
    loop.watch.log(loss=loop.loss)
    loop.step(float("nan"))
    time.sleep(0.3)
    assert kinds == []  # the record is not whole yet
    loop.watch.log(loss=loop.loss)
    assert found.wait(30)
    assert np.isnan(loop.watch.latest.scalars["loss"])


def test_a_step_that_was_looked_at_early_is_in_history_and_card_once(tmp_path):
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.attach(model, optimizer, port=None, recording=tmp_path) as watch:
        for step in range(80):
            optimizer.zero_grad()
            (
                model(torch.ones(8, 16)) * (1e6 if 70 <= step < 74 else 1.0)
            ).square().mean().backward()
            optimizer.step()
            if step >= 68:
                time.sleep(0.06)  # so that each of these is looked at while it is open
        watch.flush()
        assert [record.step for record in watch.history(20)] == list(range(60, 80))
    with gradwatch.open_recording(tmp_path) as recording:
        (card,) = [card for card in recording.cards() if card.kind == "exploding"]
        assert list(card.steps) == list(range(card.step - 19, card.step + 1))


class HeldBack(torch.optim.SGD):
    """Whose update waits, in one step, until the record of that step was looked at."""

    watch: gradwatch.Watch | None = None

    def step(self, closure=None):
        if self.watch is not None:
            deadline = time.monotonic() + 30
            while self.watch.pipeline.consumer._early is None:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            self.watch = None
        return super().step(closure)


def test_what_is_sampled_after_an_early_look_is_judged_live_as_in_a_replay(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = HeldBack(model.parameters(), lr=1e-4)
    policy = {"version": 1, "guard": {"nonfinite": "none"}, "detect": {
        "every": 1, "oversized_update": {"ratio": 0.5, "need": 1, "of": 5}}}  # fmt: skip
    told = []
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        watch.on_anomaly(told.append)
        for step in range(42):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)).square().mean() * (1e6 if step == 40 else 1)).backward()
            if step == 40:
                watch.flush()  # what is usual is known
                optimizer.watch = watch
            optimizer.step()
        watch.flush()
        counted = watch.pipeline.tally.snapshot().labelled["events_total"]
        assert "oversized_update" in watch.pipeline.consumer.open_anomalies()
    with gradwatch.open_recording(tmp_path) as recording:
        detection = Detection(recording.info.layout, load_policy(policy).detect)
        again = [a for one in recording for a in detection.observe(replace(one, anomalies=()))]
        live = recording.anomalies()
        cards = [(card.kind, card.step) for card in recording.cards()]
        assert [record.step for record in recording] == list(range(42))
    assert ("oversized_update", 40) in [(a.kind, a.step) for a in again]
    assert sorted(map(repr, live)) == sorted(map(repr, again)) == sorted(map(repr, told))
    assert counted["oversized_update", "alert"] == 1
    assert cards.count(("oversized_update", 40)) == 1
    assert len(cards) == len(set(cards))
