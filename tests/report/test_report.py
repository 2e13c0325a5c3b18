"""`gradwatch report`: what someone on call reads of a run."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.recording.cards import card_of
from gradwatch.records import Anomaly, Culprit, Layout, Parameter, RunInfo, StepRecord
from gradwatch.report.card import card_lines, printable
from gradwatch.report.command import WIDTH


@pytest.fixture
def recorded(tmp_path):
    """Trains with some faults, and returns the directory of the recording."""

    def record(bad_weight_at=None, gain=None, steps=90):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        policy = {"version": 1, "clip": [{"limit": 1.0}], "detect": {"culprit": "replay"}}
        with gradwatch.attach(
            model, optimizer, policy, port=None, recording=tmp_path, run="on-call"
        ) as watch:
            for step in range(steps):
                if step == bad_weight_at:
                    with torch.no_grad():
                        model[2].weight[0, 0] = math.nan
                factor = gain if gain and step >= 80 else 1.0
                loss = model(torch.randn(16, 4)).square().mean() * factor
                optimizer.zero_grad()
                loss.backward()
                watch.log(loss=loss)
                optimizer.step()
                if step == bad_weight_at:
                    break
        return tmp_path

    return record


def said(capsys, *arguments) -> list[str]:
    from gradwatch.cli import app

    with pytest.raises(SystemExit) as ended:
        app(["report", *map(str, arguments)])
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


def test_the_first_lines_say_what_happened_and_what_to_do(recorded, capsys):
    lines = said(capsys, recorded(bad_weight_at=85), "--last-anomaly")
    assert lines[0].startswith("step 85  alert nonfinite in 2, ")
    assert lines[1].startswith("to do      go back to a checkpoint from before step 84: ")
    text = "\n".join(lines)
    assert "\nbegan      in the weights of 2\n" in text
    assert "\ndone       step 85 was skipped (nonfinite)" in text
    text = "\n".join(lines)
    assert "steps 66 to 85" in text
    assert "layer 0 " in text
    assert "limits     global 1; mode enforce" in text
    assert max(map(len, lines)) <= WIDTH


def test_an_explosion_is_told_with_what_the_policy_did(recorded, capsys):
    lines = said(capsys, recorded(gain=1e3), "--last-anomaly")
    text = "\n".join(lines)
    assert "alert exploding" in lines[0]
    assert "were clipped by the rule global (step 82: " in text
    assert " -> 1)" in text
    assert "step 80, over the medians before it: the loss is" in text


@pytest.mark.parametrize(("bad_at", "said_of"), [(10, "step 10  alert nonfinite"),
                                               (None, "step 25  warning stuck, ")])  # fmt: skip
def test_the_last_alert_goes_before_a_later_warning_which_is_named(
    tmp_path, capsys, bad_at, said_of
):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "guard": {"nonfinite": "skip"}, "detect": {"stuck": {"steps": 5}}}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path):
        for step in range(30):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if step >= 20:
                model.weight.grad.fill_(0.1)
                model.bias.grad.fill_(0.1)
            elif step == bad_at:
                model.bias.grad.fill_(math.nan)
            optimizer.step()
    lines = said(capsys, tmp_path, "--last-anomaly")
    assert lines[0].startswith(said_of)
    assert ("also       stuck (--step 25)" in lines) == (bad_at is not None)
    level = said_of.split()[2]
    assert f"prints the card of the last {level}," in said(capsys, tmp_path)[-1]


def test_the_moment_of_the_first_bad_step_is_that_of_its_record(recorded, capsys):
    directory = recorded(gain=1e3)
    (step,) = gradwatch.open_recording(directory).records(80, 81)
    said_first = " ".join(" ".join(said(capsys, directory)).split())
    moment = datetime.fromtimestamp(step.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    assert f"Not healthy since step 80 ({moment}): exploding in all 2 layers" in said_first


def test_what_is_not_determined_is_said_once(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "guard": {"nonfinite": "skip"}}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(60):
            loss = model(torch.randn(16, 4) * (math.nan if step == 40 else 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
    text = "\n".join(said(capsys, tmp_path))
    assert text.count("not determined") == text.count("replay") == 1
    words = " ".join(text.split())
    assert (
        "Healthy again since step 41, after 1 alert: nonfinite gradients (NaN or inf) in all 2"
        in words
    )
    assert "at step 40 alone (" in words
    assert "last alert closed at step 45" in words


def test_what_a_loss_that_was_nan_before_the_backward_pass_means_is_told(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "guard": {"nonfinite": "skip"}}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(60):
            loss = model(torch.randn(16, 4)).square().mean() * (math.nan if step == 40 else 1)
            optimizer.zero_grad()
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
    words = " ".join(" ".join(said(capsys, tmp_path)).split())
    assert "with the loss, which was nan before the backward pass: the batch, the forward" in words
    assert "look for NaN or inf in the batch of step 40" in words
    assert "Not undone: what its forward pass did to BatchNorm statistics (1)" in words


def test_what_to_do_is_in_the_first_five_lines_and_the_rest_behind_it(tmp_path, capsys):
    """A learning rate that is raised for a few steps: the run comes back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "clip": [{"limit": 1.0}]}
    inputs, targets = torch.randn(64, 4), torch.randn(64, 2)
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(260):
            optimizer.param_groups[0]["lr"] = 30.0 if 150 <= step < 153 else 1e-3
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
    lines = said(capsys, tmp_path)
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert labels[1:7] == ["verdict:", "to", "done", "began", "worst", "now"]
    first = " ".join(" ".join(lines[:5]).split())
    assert "first find what set the learning rate to 30 at step 150 (back to 0.001 at 153)" in first
    words = " ".join(" ".join(lines).split())
    assert "go back to a checkpoint from before step 150" in words
    records = list(gradwatch.open_recording(tmp_path).records(151, 260))
    peak = max(records, key=lambda record: record.scalars["loss"])
    assert f"loss {peak.scalars['loss']:.3g} (" in words
    assert f"before) in step {peak.step}" in words
    clipped = sum(record.clipped for record in records)
    assert f"{clipped} of the 109 steps from 151 on were clipped by the rule global (the" in words
    hardest = min(records, key=lambda record: record.clip_coef)
    assert f"hardest in step {hardest.step}, {hardest.total_norm:.3g} -> 1)" in words
    assert "steps 150 to 152 were taken at the raised learning rate" in words


def test_without_options_every_finding_has_its_line(recorded, capsys):
    lines = said(capsys, recorded(gain=1e3))
    assert lines[0] == "run on-call, rank 0: finished, step 89, 2 layers"
    assert lines[1].startswith("verdict:   Not healthy since step 80 (")
    assert any("step 82  alert exploding" in line for line in lines)
    assert any(line.startswith("findings, oldest first") for line in lines)


def test_an_episode_of_bad_steps_is_one_line(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "guard": {"nonfinite": "skip", "patience": 100}}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(60):
            loss = model(torch.randn(16, 4)).square().mean()
            loss = loss * math.nan if 40 <= step < 44 or step == 57 else loss
            optimizer.zero_grad()
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
    lines = said(capsys, tmp_path)
    begun = [line for line in lines if line.startswith("  step")]
    assert [line.split()[1] for line in begun] == ["40", "57"]
    assert "(and 3 more steps, to 43)" in " ".join(" ".join(lines).split())


def test_a_healthy_run_is_said_to_be_healthy(recorded, capsys):
    directory = recorded()
    assert said(capsys, directory)[1].startswith(
        "verdict:   Healthy: no alert and no warning up to step "
    )
    assert said(capsys, directory, "--last-anomaly") == ["run on-call: no warning and no alert"]


def test_another_step_is_found_by_its_number_or_refused(recorded, capsys):
    from gradwatch.cli import app

    directory = recorded(bad_weight_at=85)
    assert said(capsys, directory, "--step", 85)[0].startswith("step 85")
    with pytest.raises(SystemExit) as refused:
        app(["report", str(directory), "--step", "3"])
    assert refused.value.code == 2
    assert "no card of step 3. There are: 85" in capsys.readouterr().err


def test_names_from_outside_do_nothing_to_a_terminal():
    name = "\x1b[31m<script>\n" + "x" * 10_000
    layout = Layout.of([Parameter(name=f"{name}.weight"), Parameter(name="b.weight")])
    norms = torch.ones(2).numpy()
    record = StepRecord(
        step=3, time=0.0, layout=layout, total_norm=1.0, total_norm_clipped=1.0,
        tensor_norms_P=norms, tensor_coefs_P=norms, present_P=norms > 0, limits={name: 1.0},
    )  # fmt: skip
    info = RunInfo(run=name, layout=layout, rules=(name,), model=name)
    anomaly = Anomaly(kind="exploding", level="alert", step=3, layer=name, message=name)
    lines = list(card_lines(card_of(info, anomaly, [record], Culprit(message=name))))
    assert all(line.isprintable() for line in lines)
    assert sum(map(len, lines)) < 10_000
    assert len(printable(name)) == 60


def test_many_steps_that_are_not_finite_are_told_as_many(tmp_path, capsys):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "guard": {"nonfinite": "skip"}}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(200):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if 100 <= step < 150 else 1)
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
    words = " ".join(" ".join(said(capsys, tmp_path)).split())
    assert "in 50 steps from 100 to 149" in words
    assert "all of them were skipped" in words
    assert "so many are not one bad batch" in words
    assert "50 steps from 100 to 149 were skipped (nonfinite)" in words


def test_in_shadow_mode_nothing_is_said_to_be_skipped_and_what_would_have_been_is(tmp_path, capsys):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = {"version": 1, "mode": "shadow"}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(60):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 50 else 1)
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
            if step == 50:
                assert not model.weight.isfinite().any()
                assert watch.skipped is None
                nn.utils.vector_to_parameters(
                    nn.utils.parameters_to_vector(before), model.parameters()
                )
        watch.flush()
        assert "mode shadow: clipped 0 of last 60, skipped 1" in repr(watch)
    words = " ".join(" ".join(said(capsys, tmp_path)).split())
    assert "step 50 was taken as it was; mode: enforce would have skipped it (nonfinite)" in words
    assert "the step was taken, mode: enforce would have skipped it" in words
    assert "was skipped" not in words
    assert "nothing urgent" not in words
