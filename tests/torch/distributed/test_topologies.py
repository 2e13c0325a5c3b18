"""Norms, decisions and updates of four processes against one process in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.torch.shares import local

STEPS, BATCH = 20, 8
LAYERS = ["embed", "first", "second", "head"]
TOPOLOGIES = ["ddp", "fsdp", "hsdp", "tp", "fsdp x tp", "mixed"]
POLICY = {
    "version": 1,
    "guard": {"nonfinite": "skip"},
    "clip": [
        {"per": "layer", "limit": 0.4, "name": "layers"},
        {"measure": "l1", "limit": 9.0, "name": "one"},
        {"measure": "linf", "limit": 0.3, "name": "largest"},
        {"limit": 0.5},
    ],
}


class Model(nn.Module):
    """Sizes that four do not divide: shards are uneven, and some of them empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x).tanh()).tanh()).tanh())


def data(step: int, dtype=torch.float32):
    draw = torch.Generator().manual_seed(step)
    scale = 1.0 + 5.0 * (step % 5 == 0)
    return scale * torch.randn(BATCH, 5, generator=draw).to(dtype), torch.randn(
        BATCH, 3, generator=draw
    ).to(dtype)


def spread(model: nn.Module, topology: str):
    """The model as a topology has it, and which part of the batch this process takes."""
    rank = dist.get_rank()
    if topology == "ddp":
        return DistributedDataParallel(model), (rank, 4)
    if topology == "fsdp":
        mesh = init_device_mesh("cpu", (4,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh), (rank, 4)
    if topology == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh), (rank, 4)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    if topology == "tp":
        return parallelize_module(model, init_device_mesh("cpu", (4,)), plan), (0, 1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], plan)
    if topology == "fsdp x tp":
        return fully_shard(model, mesh=mesh["data"]), (mesh.get_local_rank("data"), 2)
    for parameter in model.parameters():  # data parallel by hand around the mesh of tensors
        group = mesh.get_group("data")
        parameter.register_post_accumulate_grad_hook(
            lambda p, group=group: dist.all_reduce(local(p.grad).div_(2), group=group)
        )
    return model, (mesh.get_local_rank("data"), 2)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def trained(rank: int, size: int, topology: str, policy: dict, bad_at: int = -1):
    """Records, weights and collectives of a watched run on this process."""
    model, (part, parts) = spread(Model(), topology)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    records, collectives = [], []
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        for step in range(STEPS):
            x, y = data(step)
            rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            optimizer.zero_grad()
            (model(x[rows]) - y[rows]).square().mean().backward()
            if step == bad_at and rank == 2:
                grad = next(p.grad for p in model.parameters() if local(p.grad).numel())
                with torch.no_grad():
                    local(grad).view(-1)[0] = math.nan
            with CommDebugMode() as counted:
                optimizer.step()
            collectives.append(counted.get_total_counts())
        watch.flush()
        records = [
            (r.total_norm, r.total_norm_clipped, r.fired, r.skipped, r.grad_norms.tolist(),
             {name: values.tolist() for name, values in r.measures.items()})
            for r in watch.history(STEPS)
        ]  # fmt: skip
        layers = [name.removeprefix("module.") for name in watch.info.layout.layers]
        rank_label = watch.info.rank
    weights = [whole(parameter) for parameter in model.parameters()]
    return records, weights, collectives, layers, rank_label


def reference(policy: dict, bad_at: int = -1):
    """One process in float64 under the same policy."""
    model = Model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        for step in range(STEPS):
            x, y = data(step, torch.float64)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if step == bad_at:
                with torch.no_grad():
                    next(model.parameters()).grad.view(-1)[0] = math.nan
            optimizer.step()
        watch.flush()
        return watch.history(STEPS), [p.detach() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_norms_decisions_and_weights_are_those_of_one_process(on_ranks, topology):
    expected, weights = reference(POLICY)
    results = on_ranks(trained, topology, POLICY)
    for rank, (records, got, collectives, layers, label) in enumerate(results):
        assert layers == LAYERS
        assert label == rank
        assert collectives == [0 if topology == "ddp" else 1] * STEPS
        for (total, clipped, fired, skipped, norms, measures), one in zip(
            records, expected, strict=True
        ):
            assert total == pytest.approx(one.total_norm, rel=2e-6)
            assert clipped == pytest.approx(one.total_norm_clipped, rel=2e-6)
            assert (fired, skipped) == (one.fired, one.skipped)
            assert norms == pytest.approx(one.grad_norms.tolist(), rel=2e-6)
            for name, values in measures.items():
                assert values == pytest.approx(one.measures[name].tolist(), rel=2e-6)
        for ours, theirs in zip(got, weights, strict=True):
            assert torch.allclose(ours.double(), theirs, rtol=0, atol=1e-6)
    first = copy.deepcopy(results[0][0])
    for records, *_ in results[1:]:
        assert [r[:4] for r in records] == [r[:4] for r in first]  # to the bit


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "tp"])
def test_a_step_that_one_rank_spoils_is_skipped_by_all(on_ranks, topology):
    results = on_ranks(trained, topology, POLICY, 7)
    for records, *_ in results:
        assert [i for i, record in enumerate(records) if record[3]] == [7]
        assert records[7][3] == "nonfinite"
