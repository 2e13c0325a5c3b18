"""Norms, decisions and updates of four processes against one process in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.torch.shares import local

STEPS, BATCH, EXPERTS = 20, 8, 2
LAYERS = ["embed", "first", "second", "head"]
TOPOLOGIES = ["ddp", "fsdp", "hsdp", "tp", "fsdp x tp", "mixed", "pipeline", "experts"]
NORMS = (2.0, 1.0, math.inf)
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


class Experts(nn.Module):
    """[E] linear maps, of which a token goes through the one that its place says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, outputs) / 3)

    def forward(self, x):
        maps = [x @ w.T + b for w, b in zip(self.weight, self.bias, strict=True)]
        return torch.stack(maps, 1)[torch.arange(len(x)), torch.arange(len(x)) % EXPERTS]


class SumAcross(torch.autograd.Function):
    """The sum over a group; the loss is the sum of the losses of its processes."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumAcross.apply(grad, ctx.group), None


class OneExpert(nn.Module):
    """The map of this process; tokens meet those of the other processes of its group."""

    def __init__(self, whole: Experts, expert: int, group) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight[expert].detach().clone())
        self.bias = nn.Parameter(whole.bias[expert].detach().clone())
        self.expert, self.group = expert, group

    def forward(self, x):
        place = torch.eye(EXPERTS, dtype=x.dtype)[self.expert]
        tokens = SumAcross.apply(torch.kron(place[:, None], x), self.group)
        mine = (torch.arange(len(tokens)) % EXPERTS == self.expert)[:, None]
        out = SumAcross.apply(mine * (tokens @ self.weight.T + self.bias), self.group)
        return out.chunk(EXPERTS)[self.expert]


def model_of(topology: str) -> Model:
    model = Model()
    if topology == "experts":
        model.second = Experts(12, 8)
    return model


def data(step: int, dtype):
    draw = torch.Generator().manual_seed(step)
    scale = 1.0 + 5.0 * (step % 5 == 0)
    return scale * torch.randn(BATCH, 5, generator=draw).to(dtype), torch.randn(
        BATCH, 3, generator=draw
    ).to(dtype)


class Stage(nn.Module):
    """Half of the model, its layers under their names in the whole."""

    def __init__(self, model: Model, index: int) -> None:
        super().__init__()
        for name in LAYERS[2 * index : 2 * index + 2]:
            setattr(self, name, getattr(model, name))

    def forward(self, x):
        for name, layer in self.named_children():
            x = layer(x) if name == "head" else layer(x).tanh()
        return x


@dataclass
class Spread:
    """A model as a topology has it on this process."""

    model: nn.Module
    part: tuple[int, int] = (0, 1)
    """Which part of the batch this process takes, of how many."""

    backward: Callable | None = None
    shard_keys: dict | None = None
    expert: int | None = None


def loss_of(output, target):
    return (output - target).square().mean()


def averaged(parameters, group, by: int) -> None:
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda p: dist.all_reduce(local(p.grad).div_(by), group=group)
        )


def spread(topology: str, dtype) -> Spread:
    rank, model = dist.get_rank(), model_of(topology).to(dtype)
    if topology == "ddp":
        return Spread(DistributedDataParallel(model), (rank, 4))
    if topology == "fsdp":
        mesh = init_device_mesh("cpu", (4,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        return Spread(fully_shard(model, mesh=mesh), (rank, 4))
    if topology == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return Spread(fully_shard(model, mesh=mesh), (rank, 4))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    if topology == "tp":
        return Spread(parallelize_module(model, init_device_mesh("cpu", (4,)), plan))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
    data_rank, other_rank = mesh.get_coordinate()
    if topology == "pipeline":
        stage = Stage(model, other_rank)
        averaged(stage.parameters(), mesh.get_group("data"), 2)
        return Spread(stage, (data_rank, 2), piped(stage, other_rank, mesh.get_group("other")))
    if topology == "experts":
        model.second = OneExpert(model.second, other_rank, mesh.get_group("other"))
        ours = list(model.second.parameters())
        averaged([p for p in model.parameters() if not any(p is q for q in ours)], None, 4)
        averaged(ours, mesh.get_group("data"), 4)
        return Spread(model, (rank, 4), shard_keys={"second.*": other_rank}, expert=other_rank)
    parallelize_module(model, mesh["other"], plan)
    if topology == "fsdp x tp":
        return Spread(fully_shard(model, mesh=mesh["data"]), (data_rank, 2))
    averaged(model.parameters(), mesh.get_group("data"), 2)  # outside the mesh of the tensors
    return Spread(model, (data_rank, 2))


def piped(stage: nn.Module, index: int, group) -> Callable:
    """Two micro-batches through the stages of two processes, forward and backward."""
    schedule = ScheduleGPipe(
        PipelineStage(stage, index, 2, torch.device("cpu"), group=group),
        n_microbatches=2, loss_fn=loss_of,
    )  # fmt: skip
    return lambda x, y: schedule.step(x) if index == 0 else schedule.step(target=y)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def trained(rank: int, size: int, topology: str, policy: dict, bad_at: int = -1):
    """A watched run of this process in float32 and in float64."""
    return {
        dtype: one_run(rank, topology, policy, bad_at, dtype)
        for dtype in ((torch.float32, torch.float64) if bad_at < 0 else (torch.float32,))
    }


def one_run(rank: int, topology: str, policy: dict, bad_at: int, dtype) -> dict:
    here = spread(topology, dtype)
    optimizer = torch.optim.AdamW(here.model.parameters(), lr=1e-2)
    pieces = {
        (name.removeprefix("module."), here.expert if name.startswith("second.") else None): p
        for name, p in here.model.named_parameters()
    }
    collectives, of_gradients = [], []
    with gradwatch.attach(
        here.model, optimizer, policy, port=None, recording=None, shard_keys=here.shard_keys
    ) as watch:
        for step in range(STEPS):
            part, parts = here.part
            x, y = (both.chunk(parts)[part] for both in data(step, dtype))
            optimizer.zero_grad()
            if here.backward is None:
                loss_of(here.model(x), y).backward()
            else:
                here.backward(x, y)
            if step == bad_at and rank == 2:
                grad = next(p.grad for p in here.model.parameters() if local(p.grad).numel())
                with torch.no_grad():
                    local(grad).view(-1)[0] = math.nan
            if bad_at < 0:
                of_gradients.append({key: norms_of(whole(p.grad)) for key, p in pieces.items()})
            with CommDebugMode() as counted:
                optimizer.step()
            collectives.append(counted.get_total_counts())
        watch.flush()
        return {
            "records": watch.history(STEPS),
            "weights": {key: whole(p) for key, p in pieces.items()},
            "gradients": of_gradients,
            "collectives": collectives,
            "layout": watch.info.layout,
            "rank": watch.info.rank,
        }


def norms_of(gradient: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(torch.linalg.vector_norm(gradient.double(), p)) for p in NORMS)


def reference(topology: str, policy: dict):
    """One process in float64 under the same policy: its records and weights."""
    model = model_of(topology).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        for step in range(STEPS):
            x, y = data(step, torch.float64)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
        watch.flush()
        return watch.history(STEPS), {n: p.detach() for n, p in model.named_parameters()}, (
            watch.info.layout
        )  # fmt: skip


def combined(norms: list[float], p: float) -> float:
    return float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), p))


def norms_by_name(results: list, step: int) -> dict[str, list[float]]:
    """L2, L1 and Linf in float64 of the gradients that the processes had, put together."""
    pieces = {key: n for result in results for key, n in result["gradients"][step].items()}
    names = dict.fromkeys(name for name, _ in pieces)
    return {
        name: [
            combined([n[i] for (of, _), n in pieces.items() if of == name], p)
            for i, p in enumerate(NORMS)
        ]
        for name in names
    }


def by_name(record, layout, measure: str) -> dict[str, float]:
    names = [p.name.removeprefix("module.") for p in layout.parameters]
    return dict(zip(names, record.measures[measure].tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_norms_decisions_and_weights_are_those_of_one_process(on_ranks, topology):
    everyone = on_ranks(trained, topology, POLICY)
    expected, weights, plain = reference(topology, POLICY)
    for dtype in (torch.float32, torch.float64):
        results = [result[dtype] for result in everyone]
        for rank, result in enumerate(results):
            layout, records = result["layout"], result["records"]
            assert sorted(n.removeprefix("module.") for n in layout.layers) == sorted(LAYERS)
            assert result["rank"] == rank
            assert result["collectives"] == [0 if topology == "ddp" else 1] * STEPS
            assert len(records) == STEPS
            for step, (record, one) in enumerate(zip(records, expected, strict=True)):
                assert (record.fired, record.skipped) == (one.fired, one.skipped)
                of_gradients = norms_by_name(results, step)
                for k, measure in enumerate(("l2", "l1", "linf")):
                    if measure == "l2":
                        names = [n.removeprefix("module.") for n in layout.layers]
                        got = dict(zip(names, record.grad_norms.tolist(), strict=True))
                        theirs = dict(zip(plain.layers, one.grad_norms.tolist(), strict=True))
                        same = {
                            layer: combined(
                                [n[0] for name, n in of_gradients.items() if f"{layer}." in name], 2
                            )
                            for layer in theirs
                        }
                    else:
                        got = by_name(record, layout, measure)
                        theirs = by_name(one, plain, measure)
                        same = {name: n[k] for name, n in of_gradients.items()}
                    assert got == pytest.approx(same, rel=5e-7)
                    # Backward passes in float32 differ by their order of summation.
                    rounding = 5e-7 if dtype == torch.float64 else 2e-6
                    assert got == pytest.approx(theirs, rel=rounding)
                    assert record.total_norm == pytest.approx(one.total_norm, rel=rounding)
                    assert record.total_norm_clipped == pytest.approx(
                        one.total_norm_clipped, rel=rounding
                    )
            for (name, expert), ours in result["weights"].items():
                theirs = weights[name] if expert is None else weights[name][expert]
                assert torch.allclose(ours.double(), theirs, rtol=0, atol=1e-6)
        for result in results[1:]:
            assert decisions(result) == decisions(results[0])


def decisions(result: dict) -> list:
    """Of each step, to the bit."""
    return [
        (r.total_norm, r.total_norm_clipped, r.fired, r.skipped, r.grad_norms.tolist())
        for r in result["records"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["fsdp", "tp", "pipeline", "experts"])
def test_a_step_that_one_rank_spoils_is_skipped_by_all(on_ranks, topology):
    for result in on_ranks(trained, topology, POLICY, 7):
        records = result[torch.float32]["records"]
        assert [i for i, record in enumerate(records) if record.skipped] == [7]
        assert records[7].skipped == "nonfinite"
