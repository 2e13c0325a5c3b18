"""Clipping and dropping inside a fused kernel against torch's own clipping before it."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.gpu

LIMIT = 0.05
FUSED = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_clips_as_torch_does_before_it(attach, model, batches, name, scaled):
    try:
        ours = FUSED[name](model.parameters())
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} has no fused {name} on this device")
    other = copy.deepcopy(model)
    theirs = FUSED[name](other.parameters())
    scalers = [torch.amp.GradScaler("cuda", enabled=scaled, init_scale=2.0**8) for _ in range(2)]
    watch = attach(model, ours, {"version": 1, "clip": [{"limit": LIMIT}]})
    assert watch.plan.fused
    assert not watch.plan.reads_host
    for batch in batches:
        for one, optimizer, scaler in ((model, ours, scalers[0]), (other, theirs, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(one(batch).square().mean()).backward()
            if one is other:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(other.parameters(), LIMIT)
            scaler.step(optimizer)
            scaler.update()
    watch.flush()
    assert all(record.clipped for record in watch.history(99))
    for a, b in zip(weights(model), weights(other), strict=True):
        assert float((a - b).abs().max()) <= 5e-7


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bad", [0, 3])
def test_the_kernel_drops_a_step_that_is_not_finite(attach, model, batches, name, bad):
    """The first one too, where SGD has no momentum yet."""
    try:
        optimizer = FUSED[name](model.parameters())
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} has no fused {name} on this device")
    watch = attach(model, optimizer, {"version": 1})
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if step == bad:
            next(model.parameters()).grad[0, 0] = float("nan")
            before = weights(model)
        optimizer.step()
        if step == bad:
            pairs = zip(before, weights(model), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    watch.flush()
    assert [record.skipped for record in watch.history(99)] == [
        "nonfinite" if step == bad else None for step in range(len(batches))
    ]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(model))
