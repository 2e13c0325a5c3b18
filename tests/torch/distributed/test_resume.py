"""A run that goes on elsewhere, on more or fewer processes, decides as one that was not stopped."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradwatch
from gradwatch.rules.detect_sampled import SAMPLED

STEPS, SAVED, BATCH = 40, 25, 12
POLICY = {
    "version": 1,
    "guard": {"patience": 3},
    "clip": [
        {"name": "adaptive", "limit": {"z": 4, "warmup": 10}},
        {"name": "layers", "per": "layer", "limit": {"ratio": 1.5, "warmup": 5}},
        {
            "name": "spikes",
            "limit": {"z": 6, "space": "raw", "window": 16, "warmup": 8},
            "then": "skip",
        },
        {"name": "scheduled", "limit": {0: 10, 30: 1}},
    ],
}


def made(shards: bool):
    """Model and optimizer in float64, so that another order of summation moves nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    if shards:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, part=0, parts=1):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, y = (torch.randn(BATCH, n, generator=draw, dtype=torch.float64) for n in (6, 3))
        optimizer.zero_grad()
        gain = 200.0 if step in (13, 33) else 1.0
        gain = float("nan") if step in (17, 31) else gain
        ((model(x.chunk(parts)[part]) - y.chunk(parts)[part]).square().mean() * gain).backward()
        optimizer.step()


def attached(model, optimizer):
    return gradwatch.attach(model, optimizer, POLICY, port=None, recording=None)


def first_part(rank, size, directory, how):
    model, optimizer = made(shards=True)
    with attached(model, optimizer) as watch:
        train(model, optimizer, range(SAVED), rank, size)
        weights, state = get_state_dict(model, optimizer)
        parts = {"model": weights, "optimizer": state}
        if how != "torch.save":
            parts["gradwatch"] = watch if how == "dcp, the watch" else watch.state_dict()
        state = watch.state_dict()
        if rank == 0:
            torch.save(state, f"{directory}/gradwatch.pt")
        dcp.save(parts, checkpoint_id=f"{directory}/checkpoint")


def second_part(rank, size, directory, how):
    model, optimizer = made(shards=size > 1)
    with attached(model, optimizer) as watch:
        weights, state = get_state_dict(model, optimizer)
        parts = {"model": weights, "optimizer": state}
        if how != "torch.save":
            parts["gradwatch"] = watch if how == "dcp, the watch" else watch.state_dict()
        dcp.load(parts, checkpoint_id=f"{directory}/checkpoint")
        set_state_dict(
            model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
        )
        saved = torch.load(f"{directory}/gradwatch.pt", weights_only=True)
        if how == "torch.save":
            watch.load_state_dict(saved)
        elif how == "dcp":
            watch.load_state_dict(parts["gradwatch"])
        assert leaves_of(watch.state_dict()) == leaves_of(saved)
        train(model, optimizer, range(SAVED, STEPS), rank, size)
        watch.flush()
        weights = [p.full_tensor() if size > 1 else p.detach() for p in model.parameters()]
        return watch.history(STEPS - SAVED), weights


def leaves_of(state, place=""):
    """Every value by its place, but what is sampled, of the shards that a process has."""
    if isinstance(state, dict):
        parts = [leaves_of(one, f"{place}/{key}") for key, one in state.items()]
        return {key: value for part in parts for key, value in part.items()}
    if any(place.startswith(f"/detection/{kind}.") for kind in SAMPLED):
        return {}
    return {place: repr(state.tolist() if isinstance(state, torch.Tensor) else state)}


def uninterrupted():
    model, optimizer = made(shards=False)
    with attached(model, optimizer) as watch:
        train(model, optimizer, range(STEPS))
        watch.flush()
        return watch.history(STEPS), [p.detach() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dcp", "dcp, the watch", "torch.save"])
def test_a_run_resumed_on_another_number_of_processes_decides_as_before(on_ranks, tmp_path, how):
    expected, weights = uninterrupted()
    assert {record.skipped for record in expected} == {None, "nonfinite", "spikes"}
    on_ranks(first_part, str(tmp_path), how, size=4)
    for size in (2, 3, 1):
        for records, ours in on_ranks(second_part, str(tmp_path), how, size=size):
            assert [r.step for r in records] == list(range(SAVED, STEPS))
            for record, one in zip(records, expected[SAVED:], strict=True):
                assert (record.fired, record.skipped) == (one.fired, one.skipped)
                assert record.limits == pytest.approx(one.limits, rel=1e-6)
                assert record.total_norm == pytest.approx(one.total_norm, rel=5e-7, nan_ok=True)
            for one, other in zip(ours, weights, strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-9)
