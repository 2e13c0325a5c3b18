"""The cases of torch's own tests of clipping under `fully_shard`, with the policy in its place."""

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

import gradwatch

NORMS = {"l2": 2.0, "l1": 1.0, "l3": 3.0, "linf": math.inf}
MAX_NORM = 0.3
WIDTH = 13


def mlps() -> nn.Module:
    torch.manual_seed(42)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(3)
        )
    )


def one_dimensional(model: nn.Module) -> int:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for mlp in model:
        fully_shard(mlp, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return mesh.get_local_rank()


def two_dimensional(model: nn.Module) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for mlp in model:
        parallelize_module(mlp, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(mlp, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return mesh["dp"].get_local_rank()


def clipped(rank: int, size: int, dimensions: int, measure: str):
    """Ten steps beside a copy in one process, whose gradients torch clips."""
    norm_type = NORMS[measure]
    reference = mlps().double()  # in float32 two runs drift apart by themselves
    model = copy.deepcopy(reference)
    shard = one_dimensional if dimensions == 1 else two_dimensional
    data_rank, parts = shard(model), size if dimensions == 1 else 2
    theirs, ours = (torch.optim.Adam(m.parameters(), lr=1e-2) for m in (reference, model))
    policy = {"version": 1, "clip": [{"measure": measure, "limit": MAX_NORM, "eps": 1e-6}]}
    with gradwatch.attach(model, ours, policy, port=None, recording=None) as watch:
        for step in range(10):
            x = torch.randn(
                3 * parts, WIDTH, generator=torch.Generator().manual_seed(step)
            ).double()
            for one, optimizer, batch in (
                (reference, theirs, x),
                (model, ours, x.chunk(parts)[data_rank]),
            ):
                optimizer.zero_grad()
                (1000 * one(batch).square().mean()).backward()
            total = nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM, norm_type)
            assert total > MAX_NORM
            with CommDebugMode() as counted:
                ours.step()
            assert counted.get_total_counts() == 1
            theirs.step()
            record = watch.latest
            found = record.measures.get(measure, record.grad_norms)
            norm = torch.linalg.vector_norm(torch.tensor(found, dtype=torch.float64), norm_type)
            assert float(norm) == pytest.approx(float(total), rel=5e-7)
            assert record.clipped
            pieces = [p.grad.full_tensor() for p in model.parameters()]
            for piece, one in zip(pieces, reference.parameters(), strict=True):
                assert torch.allclose(piece, one.grad, rtol=0, atol=1e-9 * MAX_NORM)
            after = torch.linalg.vector_norm(torch.cat([p.flatten() for p in pieces]), norm_type)
            assert float(after) <= MAX_NORM * (1 + 1e-6)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("measure", NORMS)
@pytest.mark.parametrize(("dimensions", "size"), [(1, 2), (2, 4)])
def test_shards_are_clipped_as_torch_clips_the_whole(on_ranks, dimensions, size, measure):
    assert on_ranks(clipped, dimensions, measure, size=size) == [True] * size


class Container(torch.optim.Optimizer):
    """Like torchtitan's: an optimizer over all parameters, which steps one for each model part."""

    def __init__(self, parts) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {"lr": 1e-2})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def as_torchtitan_trains(rank: int, size: int):
    """Sharded, tensor-parallel parts under one container, micro-batches divided by the loop."""
    reference = mlps().double()
    model = copy.deepcopy(reference)
    data_rank = two_dimensional(model)
    theirs, ours = torch.optim.AdamW(reference.parameters(), lr=1e-2), Container(list(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(ours.optimizers[0], lambda step: 1.0)
    policy = {
        "version": 1, "accumulate": {"steps": 2, "drive": "loop"},
        "clip": [{"limit": MAX_NORM, "eps": 1e-6}],
    }  # fmt: skip
    with gradwatch.attach(model, ours, policy, port=None, recording=None) as watch:
        for step in range(5):
            ours.zero_grad()
            theirs.zero_grad()
            for half in range(2):
                draw = torch.Generator().manual_seed(2 * step + half)
                x = torch.randn(6, WIDTH, generator=draw).double()
                (1000 * reference(x).square().mean() / 2).backward()
                (1000 * model(x.chunk(2)[data_rank]).square().mean() / 2).backward()
            total = nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
            theirs.step()
            ours.step()
            schedule.step()
            assert watch.latest.total_norm == pytest.approx(float(total), rel=5e-7)
            assert (watch.latest.micro_batches, watch.latest.learning_rate) == (2, 1e-2)
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(one.full_tensor(), other, rtol=0, atol=1e-9)
    return True


@pytest.mark.slow
def test_a_loop_in_the_manner_of_torchtitan(on_ranks):
    assert on_ranks(as_torchtitan_trains) == [True] * 4
