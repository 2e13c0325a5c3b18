"""Loss scaling and half precision on several processes."""

from __future__ import annotations

import itertools
import math
import urllib.request

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.torch.shares import local

STEPS, BATCH, LIMIT = 12, 8, 0.5
CLIP = {"version": 1, "clip": [{"limit": LIMIT}]}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def wrapped(kind: str, model: nn.Module | None = None, **fsdp) -> nn.Module:
    model = model_of() if model is None else model
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **fsdp)
    return fully_shard(model, mesh=mesh, **fsdp)


def scaler_of(init_scale: float = 2.0**8) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)


def data(step: int, part: int = 0, parts: int = 1):
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=draw), torch.randn(BATCH, 3, generator=draw)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def loss_of(model, batch):
    x, y = batch
    return 3 * (model(x) - y).square().mean()


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]


def with_scaler(rank, size, kind, fused, accumulates):
    """Rank 1 overflows in its loss, rank 2 in one element of what it holds."""
    model = wrapped(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = scaler_of()
    policy = {**CLIP, "accumulate": {"steps": 2}} if accumulates else CLIP
    scales = []
    with gradwatch.attach(
        model, optimizer, policy, port=None, recording=None, scaler=scaler
    ) as watch:
        batches = [(step, half) for step in range(STEPS) for half in range(1 + accumulates)]
        for micro in watch.micro_batches(batches):
            step, half = micro.batch
            with micro:
                batch = data(step + 100 * half, rank, size)
                gain = math.inf if step == 4 and rank == 1 else 1.0
                scaler.scale(micro.scale(loss_of(model, batch)) * gain).backward()
            if micro.last:
                if step == 7:
                    grads = [p.grad for p in model.parameters() if local(p.grad).numel()]
                    everyone = kind == "ddp"  # what is replicated is so on each of them
                    if everyone or rank == 2:
                        local(grads[0]).view(-1)[0] = math.inf
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
        watch.flush()
        return watch.history(STEPS), whole(model.parameters()), scales


def alone(accumulates):
    model, scaler = model_of(), scaler_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms, scales = [], []
    for step in range(STEPS):
        gain = math.inf if step in (4, 7) else 1.0
        for half in range(1 + accumulates):
            loss = loss_of(model, data(step + 100 * half)) / (1 + accumulates)
            scaler.scale(loss * gain).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return norms, [p.detach() for p in model.parameters()], scales


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fused", "accumulates"),
    [*itertools.product(["ddp", "fsdp"], [False, True], [False]), ("ddp", False, True),
     ("fsdp", True, True)],
)  # fmt: skip
def test_what_a_scaler_drops_is_dropped_and_told_on_every_rank(on_ranks, kind, fused, accumulates):
    norms, weights, expected = alone(accumulates)
    for records, ours, scales in on_ranks(with_scaler, kind, fused, accumulates):
        assert scales == expected
        assert [r.skipped for r in records] == [
            "overflow" if step in (4, 7) else None for step in range(STEPS)
        ]
        for record, norm in zip(records, norms, strict=True):
            if record.skipped is None:
                assert record.total_norm == pytest.approx(norm, rel=2e-6)
                assert record.clipped == (norm > LIMIT)
        for one, other in zip(ours, weights, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=2e-6)
        before = [2.0**8, *expected[:-1]]
        known = [r.loss_scale for r in records if r.skipped is None]
        assert known == [s for s, r in zip(before, records, strict=True) if r.skipped is None]


def with_two_optimizers(rank, size, kind, fused):
    """Two losses over a body and a head; the loss of the head overflows on rank 1 in step 3."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(6, 9)), nn.Sequential(nn.Linear(9, 3))
    parts = [wrapped(kind, body), wrapped(kind, head)]
    optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-2, fused=fused) for p in parts]
    scaler = scaler_of()
    watches = [
        gradwatch.attach(part, optimizer, CLIP, port=None, recording=None, scaler=scaler)
        for part, optimizer in zip(parts, optimizers, strict=True)
    ]
    for step in range(6):
        x, y = data(step, rank, size)
        hidden = parts[0](x)
        gain = math.inf if step == 3 and rank == 1 else 1.0
        scaler.scale(hidden.square().mean()).backward()
        scaler.scale((parts[1](hidden.detach().tanh()) - y).square().mean() * gain).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    skipped = []
    for watch in watches:
        watch.flush()
        skipped.append([record.skipped for record in watch.history(9)])
        watch.close()
    return skipped


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fused"), [*itertools.product(["ddp", "fsdp"], [False, True])])
def test_of_several_optimizers_only_the_one_that_overflowed_skips(on_ranks, kind, fused):
    for body, head in on_ranks(with_two_optimizers, kind, fused, size=2):
        assert body == [None] * 6
        assert head == [None] * 3 + ["overflow"] + [None] * 2


def stage_with_a_scaler(rank, size):
    model = nn.ModuleDict({f"stage{rank}": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(gradwatch.AttachError) as error:
        gradwatch.attach(model, optimizer, CLIP, port=None, recording=None, scaler=scaler_of())
    off = torch.amp.GradScaler("cpu", enabled=False)
    gradwatch.attach(model, optimizer, CLIP, port=None, recording=None, scaler=off).close()
    return str(error.value)


@pytest.mark.slow
def test_a_scaler_that_one_rank_alone_would_obey_is_refused(on_ranks):
    for said in on_ranks(stage_with_a_scaler, size=2):
        assert "stage0.weight is not on every rank" in said


def in_half_precision(rank, size, how):
    """Norms of bfloat16 gradients, and those in float64 of the very same ones."""
    if how == "bf16 weights, ddp":
        model = wrapped("ddp", model_of().to(torch.bfloat16))
    elif how == "bf16 weights, fsdp":
        model = wrapped("fsdp", model_of().to(torch.bfloat16))
    elif how == "fp16 reduction, ddp":
        model = wrapped("ddp")
        model.register_comm_hook(None, fp16_compress_hook)
    else:
        half = torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
        model = wrapped("fsdp", mp_policy=policy)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    with gradwatch.attach(model, optimizer, CLIP, port=None, recording=None) as watch:
        for step in range(3):
            optimizer.zero_grad()
            batch = [both.to(dtype) for both in data(step, rank, size)]
            loss_of(model, batch).backward()
            grads = whole([p.grad for p in model.parameters()])
            exact = [torch.cat([g.double().flatten() for g in grads[i : i + 2]]) for i in (0, 2)]
            optimizer.step()
            layers = [float(layer.norm()) for layer in exact]
            found.append((watch.latest.grad_norms.tolist(), layers, watch.latest.total_norm))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["bf16 weights, ddp", "bf16 weights, fsdp", "fp16 reduction, ddp", "bf16 reduction, fsdp"],
)
def test_half_precision_gradients_are_measured_in_float32(on_ranks, how):
    for found in on_ranks(in_half_precision, how):
        for norms, exact, total in found:
            assert norms == pytest.approx(exact, rel=5e-7)
            assert total == pytest.approx(math.hypot(*exact), rel=5e-7)


def collapsing(rank, size):
    """A loss that overflows in each step, then one that float16 would lose."""
    found = {}
    model = wrapped("fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = scaler_of(2.0**16)
    policy = {"version": 1, "guard": {"patience": 1000}}
    with gradwatch.attach(
        model, optimizer, policy, port=0, recording=None, scaler=scaler, run="r"
    ) as watch:
        for step in range(30):
            optimizer.zero_grad()
            loss = loss_of(model, data(step, rank, size)) * (math.inf if step > 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        watch.flush()
        text = urllib.request.urlopen(watch.url, timeout=10).read().decode()
        found["exported"] = [line for line in text.splitlines() if "gradwatch_loss_scale{" in line]
        found["scale"] = watch.latest.loss_scale
        found["collapse"] = [a.kind for r in watch.history(30) for a in r.anomalies]

    model = wrapped("fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    policy = {"version": 1, "detect": {"every": 1}}
    with gradwatch.attach(
        model, optimizer, policy, port=None, recording=None, scaler=scaler
    ) as watch:
        for step in range(60):
            optimizer.zero_grad()
            gain = 1e-9 if step >= 20 else 1.0
            scaler.scale(loss_of(model, data(step, rank, size)) * gain).backward()
            scaler.step(optimizer)
            scaler.update()
        watch.flush()
        found["underflow"] = [a.kind for r in watch.history(60) for a in r.anomalies]
    return found


@pytest.mark.slow
def test_the_loss_scale_is_exported_and_its_collapse_and_underflow_are_found(on_ranks):
    for rank, found in enumerate(on_ranks(collapsing, size=2)):
        assert "loss_scale_collapse" in found["collapse"]
        assert "underflow" in found["underflow"]
        assert found["scale"] < 1
        labels = f'run="r",rank="{rank}"'
        assert found["exported"] == [f"gradwatch_loss_scale{{{labels}}} {found['scale']!r}"]
