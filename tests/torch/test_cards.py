"""The card of an anomaly: written at once, whole by itself, and read back."""

from __future__ import annotations

import math
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.policy import load_policy
from gradwatch.recording.cards import (
    FIRST_KEPT,
    HISTORY,
    LAST_KEPT,
    Card,
    card_from,
    card_of,
    card_row,
    write_card,
)
from gradwatch.records import Culprit
from gradwatch.rules.detection import Detection
from gradwatch.torch.culprit import ClueFinder
from gradwatch.torch.plan import Plan
from tests.torch.test_plan import LAYOUT, Injected, engine_on, parameters

POLICY = {
    "version": 1,
    "guard": {"nonfinite": "skip"},
    "clip": [{"limit": 100.0}],
    "detect": {"culprit": "replay"},
}


def trained(attach, tmp_path, bad=(), gains=None, steps=60, policy=POLICY):
    """A recorded run of which some steps are bad, or are multiplied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = attach(model, optimizer, policy, recording=tmp_path, run="carded")
    for step in range(steps):
        loss = model(torch.randn(16, 4)).square().mean() * (gains or {}).get(step, 1.0)
        loss = loss * math.nan if step in bad else loss
        optimizer.zero_grad()
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()
    watch.flush()
    watch.close()
    return watch


def test_a_card_says_what_when_where_and_under_which_conditions(attach, tmp_path):
    watch = trained(attach, tmp_path, bad=[50])
    with gradwatch.open_recording(tmp_path) as recording:
        (card,) = recording.cards()
        (record,) = recording.records(50, 51)
    assert (card.kind, card.level, card.step, card.skipped) == (
        "nonfinite",
        "alert",
        50,
        "nonfinite",
    )
    assert card.culprit.origin == "loss"
    assert card.culprit == record.culprit
    assert card.steps == tuple(range(31, 51))
    assert len(card.steps) == HISTORY
    assert np.isfinite(card.series["total_norm"][:-1]).all()
    assert math.isnan(card.series["loss"][-1])
    assert set(card.norms) == {"0", "2", "4"}
    assert card.limits == {"global": 100.0}
    assert card.series["learning_rate"][-1] == pytest.approx(1e-3)
    assert len(card.culprit.batch) == 16
    environment = card.environment
    assert environment["policy_sha256"] == load_policy(POLICY).sha256
    assert environment["framework"].startswith("torch ")
    assert environment["device"] == "cpu"
    assert environment["host"] != ""
    assert environment["run"] == "carded"
    assert watch.info.device == "cpu"


def test_an_explosion_has_a_card_with_the_order_of_its_layers(attach, tmp_path):
    policy = {"version": 1}
    trained(attach, tmp_path, gains=dict.fromkeys(range(80, 100), 1e3), steps=100, policy=policy)
    with gradwatch.open_recording(tmp_path) as recording:
        cards = {card.kind: card for card in recording.cards()}
    card = cards["exploding"]
    assert card.step == 82
    assert (card.culprit.origin, card.culprit.module) == (None, None)
    assert card.culprit.near == ("the loss",)
    assert "from the one nearest the loss on" in card.culprit.message
    assert set(card.norms) == {"0", "2", "4"}


def test_a_run_without_findings_has_no_card(attach, tmp_path):
    trained(attach, tmp_path)
    with gradwatch.open_recording(tmp_path) as recording:
        assert recording.cards() == []


def test_the_live_anomalies_are_those_of_a_replay_culprits_included(attach, tmp_path):
    gains = dict.fromkeys(range(70, 80), 1e3)
    trained(attach, tmp_path, bad=[40, 41, 60], gains=gains, steps=100)
    with gradwatch.open_recording(tmp_path) as recording:
        live = recording.anomalies()
        detection = Detection(recording.info.layout, load_policy(POLICY).detect)
        again = [
            a for record in recording for a in detection.observe(replace(record, anomalies=()))
        ]
    assert {a.kind for a in live} >= {"nonfinite", "exploding"}
    assert repr(again) == repr(live)  # NaN is not equal to itself


def test_in_shadow_mode_a_bad_step_is_said_to_be_taken_and_what_enforcing_would_have_done(
    attach, tmp_path
):
    policy = {**POLICY, "mode": "shadow"}
    trained(attach, tmp_path, bad=[50], policy=policy)
    with gradwatch.open_recording(tmp_path) as recording:
        (live,) = recording.anomalies()
        card = recording.cards()[0]
        info = recording.info
        detection = Detection(info.layout, load_policy(policy).detect, is_shadow=info.is_shadow)
        again = [
            a for record in recording for a in detection.observe(replace(record, anomalies=()))
        ]
    assert live.message.endswith("; the step was taken, mode: enforce would have skipped it")
    assert card.message == live.message
    assert (card.skipped, card.was_dropped) == ("nonfinite", False)
    assert repr(again) == repr([live])


CRASHING = """
import math, os, signal, sys, torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.attach(
    model, optimizer, {"version": 1, "detect": {"culprit": "replay"}}, port=None,
    recording=sys.argv[1],
)
step = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

# Behind gradwatch's hook, and before the optimizer moves.
optimizer.register_step_pre_hook(lambda *_: die() if step == 30 else None)
for step in range(40):
    inputs = torch.randn(4, 8)
    if step == 30:
        with torch.no_grad():
            model[2].weight[0, 0] = math.nan
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
"""


def test_a_crash_right_behind_the_step_leaves_its_card(tmp_path):
    done = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with gradwatch.open_recording(tmp_path) as recording:
        (card,) = recording.cards()
        assert (card.step, card.culprit.origin, card.culprit.module) == (30, "weight", "2")
        assert len(card.steps) == HISTORY
        assert [record.step for record in recording][-1] == 30
        assert recording.last(1)[0].culprit == card.culprit


def test_a_card_that_cannot_be_written_costs_nothing_else(attach, tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("gradwatch.recorder.write_card", full)
    watch = trained(attach, tmp_path, bad=[50])
    errors = watch.pipeline.tally.snapshot().labelled["hook_errors_total"]
    assert errors["recording",] == 1
    with gradwatch.open_recording(tmp_path) as recording:
        assert [a.kind for a in recording.anomalies()] == ["nonfinite"]
        (card,) = recording.cards()  # the thread behind has written it
        (record,) = recording.records(50, 51)
    assert card.culprit == record.culprit == watch.history(20)[-10].culprit


def test_what_goes_on_badly_does_not_fill_the_disk(attach, tmp_path):
    path = trained(attach, tmp_path, bad=[50]).recording
    with gradwatch.open_recording(tmp_path) as recording:
        (card,) = recording.cards()
    for step in range(FIRST_KEPT + LAST_KEPT + 20):
        write_card(path, replace(card, step=100 + step))
    with gradwatch.open_recording(tmp_path) as recording:
        steps = [card.step for card in recording.cards()]
    assert steps[:FIRST_KEPT] == [50, *range(100, 99 + FIRST_KEPT)]
    assert steps[FIRST_KEPT:] == list(range(120 + FIRST_KEPT, 120 + FIRST_KEPT + LAST_KEPT))


def test_a_step_that_is_bad_now_and_then_is_looked_into_and_one_in_two_is_not(attach, tmp_path):
    policy = {**POLICY, "guard": {"nonfinite": "skip", "patience": 1000}}
    watch = trained(attach, tmp_path, bad=range(0, 200, 2), steps=200, policy=policy)
    looked_into = [record.step for record in watch.history(256) if record.culprit is not None]
    assert looked_into[:10] == list(range(0, 20, 2))
    assert 5 <= len(looked_into[10:]) <= 11


def test_a_card_that_cannot_be_read_is_left_out_and_said(attach, tmp_path, caplog):
    path = trained(attach, tmp_path, bad=[40, 50]).recording
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE cards SET card = '{' WHERE step = 40")
    with gradwatch.open_recording(tmp_path) as recording:
        assert [card.step for card in recording.cards()] == [50]
        assert len(list(recording)) == 60
        assert recording.last(15)[5].culprit is not None
    assert "1 of 2 cards cannot be read" in caplog.text


def test_any_card_is_read_as_it_was_written(attach, tmp_path):
    watch = trained(attach, tmp_path, bad=[50])
    records = watch.history(30)
    culprit = Culprit(origin="forward", module="ü\n'\"", near=("a", "b"), same_batch=(1, 2))
    (anomaly,) = [a for record in records for a in record.anomalies]
    card = card_of(watch.info, anomaly, [r for r in records if r.step <= 50], culprit)
    again = card_from(card_row(card)[2])
    assert isinstance(again, Card)
    assert repr(again) == repr(card)  # NaN is not equal to itself


def test_a_recording_of_an_earlier_version_has_no_cards(attach, tmp_path):
    path = trained(attach, tmp_path, bad=[50]).recording
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE cards")
    with gradwatch.open_recording(tmp_path) as recording:
        assert recording.cards() == []
        assert len(list(recording)) == 60


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("skips", [True, False])
def test_on_an_accelerator_the_culprit_is_found_before_the_next_update(lag, skips):
    """Decisions come late there. Weights are evidence while nothing was updated since."""
    tensors = parameters("cpu")
    model = nn.Module()
    for name, tensor in zip(("a.weight", "a.bias", "b.weight"), tensors, strict=True):
        owner, _, leaf = name.partition(".")
        if not hasattr(model, owner):
            model.add_module(owner, nn.Module())
        getattr(model, owner).register_parameter(leaf, tensor)
    optimizer = torch.optim.AdamW(tensors, fused=True)
    policy = load_policy({"version": 1, "guard": {"nonfinite": "skip" if skips else "none"}})
    plan = Plan(reads_host=False, fused=skips, one_scale=True, on_accelerator=True)
    engine, backend, failures = engine_on(tensors, optimizer, policy, Injected(lag), plan)
    backend.finder = ClueFinder(model, tensors, "flags", failures.append)
    with torch.no_grad():
        model.b.weight[0, 0] = math.nan
    for step in range(lag + 2):
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, math.nan if step == 0 else 1.0)
        engine.step(gradwatch.backend.StepContext())
    found = engine._recorder.culprits
    assert failures == []
    (step, culprit) = found[0]
    assert step == 0
    known = skips and lag == 0
    assert (culprit.origin, culprit.module) == (("weight", "b") if known else (None, None))
    assert LAYOUT.layers == ("a", "b")
