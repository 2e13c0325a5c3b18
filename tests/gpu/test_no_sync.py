"""A whole training loop in which every wait of the host for the device is an error."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

WARM = 4
"""Steps before it counts: what is allocated once may wait."""

SKIPPING = {
    "version": 1,
    "clip": [{"limit": 0.5}, {"limit": 50.0, "then": "skip", "name": "spike"}],
}
LEARNING = {
    "version": 1,
    "clip": [
        {"limit": {"z": 4, "warmup": 2}},
        {"per": "layer", "limit": {"ratio": 2, "warmup": 1}},
        {"per": "element", "limit": 0.1},
    ],
}
SCALING = {"version": 1, "guard": {"nonfinite": "none"}, "clip": [{"limit": 0.5}]}
LOOPS = {
    "observing, any optimizer": (None, torch.optim.RMSprop, {}),
    "scaling, not fused": (SCALING, torch.optim.AdamW, {}),
    "skipping, fused AdamW": (SKIPPING, torch.optim.AdamW, {"fused": True}),
    "skipping, fused SGD": (SKIPPING, torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "limits that learn, fused": (LEARNING, torch.optim.AdamW, {"fused": True}),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_step_waits_for_the_device(attach, model, batches, loop, scaled):
    policy, make, options = LOOPS[loop]
    if scaled and not options.get("fused"):
        pytest.skip("a GradScaler itself waits for the device where the optimizer is not fused")
    optimizer = make(model.parameters(), lr=1e-3, **options)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    policy = {**(policy or {"version": 1, "mode": "shadow"}), "detect": {"every": 2}}
    watch = attach(model, optimizer, policy, scaler=scaler if scaled else None)
    losses = []
    try:
        for step in range(24):
            torch.cuda.set_sync_debug_mode("error" if step >= WARM else "default")
            loss = model(batches[step % len(batches)]).square().mean()
            scaler.scale(loss).backward()
            watch.log(loss=loss)
            losses.append(loss.detach())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.flush()
    assert [record.step for record in watch.history(99)] == list(range(24))
    logged = [record.scalars["loss"] for record in watch.history(99)]
    assert logged == [float(loss) for loss in losses]
    assert not any(watch.pipeline.tally.status().hook_errors.values())


@pytest.mark.parametrize("drive", ["hook, marked", "hook", "loop"])
def test_no_micro_batch_waits_for_the_device(attach, model, batches, drive):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    accumulate = {"steps": 2, "drive": drive.partition(",")[0]}
    watch = attach(model, optimizer, {**SKIPPING, "accumulate": accumulate})
    try:
        for epoch in range(6):
            torch.cuda.set_sync_debug_mode("error" if epoch else "default")
            if drive == "hook, marked":
                for micro in watch.micro_batches(batches):
                    with micro:
                        micro.scale(model(micro.batch).square().mean()).backward()
                    if micro.last:
                        optimizer.step()
                        optimizer.zero_grad()
                continue
            for i, batch in enumerate(batches):
                loss = model(batch).square().mean()
                (loss / 2 if drive == "loop" else loss).backward()
                if drive == "hook" or i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.flush()
    assert [record.micro_batches for record in watch.history(99)] == [2] * 24
