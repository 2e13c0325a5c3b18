"""GradScaler: what it drops is seen and counted, what it does is not changed."""

from __future__ import annotations

import math

import pytest
import torch

import gradwatch

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


def scaler(init_scale: float = 2.0**8, interval: int = 3) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=interval)


def train(task, optimizer, scaler, overflows: set[int], steps: int = 12, clip: float | None = None):
    scales = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 20, (8, 6), generator=generator)
        target = torch.randint(0, 5, (8,), generator=generator)
        loss = torch.nn.functional.cross_entropy(task.model(tokens), target) * 10
        optimizer.zero_grad()
        scaler.scale(loss * (math.inf if step in overflows else 1.0)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows", [set(), {5}, {4, 5, 6}, {0, 1}, {2, 3, 8, 9, 10}])
def test_a_dropped_step_is_one_with_its_reason_and_training_is_the_usual_one(
    task, attach, fused, overflows
):
    other = task.copy()
    optimizer, plain = (
        torch.optim.AdamW(one.model.parameters(), lr=1e-3, fused=fused) for one in (task, other)
    )
    scalers = scaler(), scaler()
    watch = attach(task.model, optimizer, CLIP, scaler=scalers[0])
    ours = train(task, optimizer, scalers[0], overflows)
    assert ours == train(other, plain, scalers[1], overflows, clip=1.0)
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 5e-7

    records = watch.history(20)
    # A non-fused optimizer is not called for a dropped step: the last ones are not known yet.
    known = 12 if fused else max(i for i in range(12) if i not in overflows) + 1
    # Before its first good step a non-fused scaler has no scale to compare with.
    first = 0 if fused else min(i for i in range(12) if i not in overflows)
    assert [r.skipped == "overflow" for r in records] == [
        i in overflows for i in range(first, known)
    ]
    assert [r.step for r in records] == list(range(len(records)))


def test_without_the_scaler_dropped_steps_of_a_non_fused_optimizer_are_not_seen(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    watch = attach(task.model, optimizer, CLIP)
    train(task, optimizer, scaler(), {4, 5})
    assert len(watch.history(20)) == 10
    assert {record.skipped for record in watch.history(20)} == {None}


def test_an_overflow_is_an_event_and_pages_nobody(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, fused=True)
    scale = scaler()
    watch = attach(task.model, optimizer, CLIP, scaler=scale)
    found: list[gradwatch.Anomaly] = []
    watch.on_anomaly(found.append)
    train(task, optimizer, scale, {5})
    watch.flush()
    assert [(a.kind, a.level) for a in found] == [("overflow", "event")]


def test_patience_counts_what_the_scaler_drops(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, fused=True)
    scale = scaler()
    policy = {**CLIP, "guard": {"patience": 2}}
    attach(task.model, optimizer, policy, scaler=scale)
    with pytest.raises(gradwatch.TrainingStopped, match="3 steps skipped in a row"):
        train(task, optimizer, scale, {3, 4, 5, 6})


def test_a_scaler_that_is_switched_off_changes_nothing(task, attach):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    off = torch.amp.GradScaler("cpu", enabled=False)
    watch = attach(task.model, optimizer, CLIP, scaler=off)
    train(task, optimizer, off, set())
    assert len(watch.history(20)) == 12
    assert math.isnan(watch.latest.loss_scale)


def test_what_is_no_scaler_is_refused(task, attach):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    with pytest.raises(gradwatch.AttachError, match=r"must be a torch.amp.GradScaler. Received: i"):
        attach(task.model, optimizer, CLIP, scaler=1024)


def test_a_logged_loss_stays_with_its_step_when_one_before_it_was_dropped(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    scale = scaler()
    watch = attach(task.model, optimizer, CLIP, scaler=scale)
    for step in range(6):
        optimizer.zero_grad()
        loss = task.model(torch.randint(0, 20, (8, 6))).square().sum()
        scale.scale(loss * (math.inf if step == 3 else 1.0)).backward()
        watch.log(index=step)
        scale.step(optimizer)
        scale.update()
    logged = [record.scalars.get("index") for record in watch.history(9)]
    assert logged == [0, 1, 2, None, 4, 5]
    assert watch.history(9)[3].skipped == "overflow"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_is_measured(task, attach, dtype):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    scale = scaler(2.0**4)
    watch = attach(task.model, optimizer, CLIP, scaler=scale)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(step))
            loss = task.model(tokens).float().square().mean()
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        norms = [p.grad.double().norm() for p in task.model.parameters()]
        scale.step(optimizer)
        scale.update()
        assert watch.latest.total_norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-6)
