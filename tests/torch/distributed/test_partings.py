"""Processes that do not come, leave, or are asked for what cannot be measured."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gradwatch


def sharded(policy, recording=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return (
        model,
        optimizer,
        gradwatch.attach(model, optimizer, policy, port=None, recording=recording),
    )


def dies(rank, size, directory):
    model, optimizer, watch = sharded({"version": 1, "clip": [{"limit": 1.0}]}, directory)
    for step in range(10):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        if step == 5 and rank == 1:
            watch.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end_with_its_number_and_whole_recordings(on_ranks, tmp_path):
    results = on_ranks(dies, str(tmp_path / "runs"), size=4, check=False)
    codes = [code for code, _ in results]
    assert codes[1] == -signal.SIGKILL
    for rank in (0, 2, 3):
        assert codes[rank] == 1
        assert (
            "TrainingStopped: stopped before the update of step 5: rank 1 of 4 did not take part"
            in (results[rank][1])
        )
    for path in (tmp_path / "runs").glob("*.sqlite"):
        with gradwatch.open_recording(path) as recording:
            assert [record.step for record in recording] == list(range(5))
            assert recording.state == ("running" if recording.info.rank == 1 else "stopped")
    assert len(list((tmp_path / "runs").glob("*.sqlite"))) == 4


def comes_alone(rank, size):
    import gradwatch.torch.shares as shares

    shares.ATTACH_SECONDS = 1.0
    model = nn.Linear(2, 2)
    if rank == 0:
        with pytest.raises(gradwatch.AttachError) as refused:
            gradwatch.attach(model, port=None, recording=None)
        alone = gradwatch.attach(model, port=None, recording=None, distributed=False)
        alone.close()
        return str(refused.value)
    return ""


@pytest.mark.slow
def test_a_rank_that_does_not_attach_is_named(on_ranks):
    said, _ = on_ranks(comes_alone, size=2)
    assert said.startswith("rank 0 has attached, and rank 1 of 2 has not within 1 seconds")
    assert "distributed=False" in said


def refused(rank, size):
    said = []
    for clip in (
        {"per": "unit", "limit": 1.0},
        {"measure": "update", "limit": 1.0, "then": "warn"},
    ):
        with pytest.raises((gradwatch.PolicyError, gradwatch.AttachError)) as error:
            sharded({"version": 1, "clip": [clip]})
        said.append(str(error.value))
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(6, 9)), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(gradwatch.AttachError) as error:
        gradwatch.attach(model, torch.optim.SGD(model.parameters()), port=None, recording=None)
    said.append(str(error.value))
    return said


@pytest.mark.slow
def test_what_is_not_measured_of_shards_is_refused(on_ranks):
    for said in on_ranks(refused, size=2):
        assert "per unit" in said[0]
        assert "updates" in said[1]
        assert "Use torch.distributed.fsdp.fully_shard" in said[2]


def one_without_gradients(rank, size):
    """Each process has a layer of its own; one of them none of its gradients in step 2."""
    model = nn.ModuleDict({f"layer{rank}": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    squares = []
    policy = {"version": 1, "clip": [{"limit": 0.1}]}
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        for step in range(4):
            optimizer.zero_grad()
            if not (step == 2 and rank == 1):
                model[f"layer{rank}"](torch.ones(2, 3)).square().sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            squares.append(sum(float(grad.double().square().sum()) for grad in grads))
            optimizer.step()
        return squares, watch.history(4)


@pytest.mark.slow
def test_a_rank_without_gradients_joins(on_ranks):
    results = on_ranks(one_without_gradients, size=3)
    for _, records in results:
        for step, record in enumerate(records):
            squares = [of_one[step] for of_one, _ in results]
            assert record.total_norm == pytest.approx(sum(squares) ** 0.5, rel=5e-7)
            assert record.grad_norms.tolist() == pytest.approx([s**0.5 for s in squares], rel=5e-7)
            assert record.clipped
        assert records[2].grad_norms[1] == 0.0
