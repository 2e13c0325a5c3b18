"""Micro-batches on several processes against one big batch in one process."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradwatch

WIDTH, LIMIT = 6, 0.5


def model_of(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def wrapped(kind: str, dtype=torch.float64):
    """The model, and which of how many parts of the data this process takes."""
    model, rank, size = model_of(dtype), dist.get_rank(), dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model), rank, size
    if kind == "ddp views":
        return DistributedDataParallel(model, gradient_as_bucket_view=True), rank, size
    if kind == "ddp static":
        return DistributedDataParallel(model, static_graph=True), rank, size
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (size,))), rank, size
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"]), mesh.get_local_rank("data"), 2


def batch_of(part: int, index: int, epoch: int, tokens: int, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1000 * epoch + 100 * part + index)
    x = torch.randn(tokens, WIDTH, generator=draw, dtype=torch.float64)
    return x.to(dtype), (2 + torch.randn(tokens, 3, generator=draw, dtype=torch.float64)).to(dtype)


def tokens_of(part: int, index: int, uneven: bool) -> int:
    return 1 + (5 * part + 3 * index) % 9 if uneven else 4


def loader_of(part: int, count: int, epoch: int, uneven: bool, dtype=torch.float64):
    return [
        batch_of(part, i, epoch, tokens_of(part, i, uneven), dtype) for i in range(count)
    ]  # fmt: skip


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def whole(parameters):
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for p in parameters]  # fmt: skip


def policy_of(**accumulate) -> dict:
    return {"version": 1, "accumulate": {"steps": 3, **accumulate}, "clip": [{"limit": LIMIT}]}


def marked(watch, model, optimizer, loader, scaler=None):
    """Syncing backward passes, by place in the loader."""
    reductions = []
    for micro in watch.micro_batches(loader):
        with CommDebugMode() as counted, micro:
            loss = micro.scale(loss_of(model, micro.batch), weight=len(micro.batch[0]))
            (loss if scaler is None else scaler.scale(loss)).backward()
        names = {str(op): n for op, n in counted.get_comm_counts().items()}
        reductions.append(any("reduce" in name for name in names))
        if micro.last:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return reductions


def unchanged(watch, model, optimizer, loader):
    for batch in loader:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.end_window()
    optimizer.zero_grad()


def dividing(watch, model, optimizer, loader):
    for i, batch in enumerate(loader):
        is_last = i % 3 == 2 or i == len(loader) - 1
        held = contextlib.nullcontext()
        if not is_last and isinstance(model, DistributedDataParallel):
            held = model.no_sync()
        with held:
            (loss_of(model, batch) / 3).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


LOOPS = {"marked": marked, "unchanged": unchanged, "dividing": dividing}


def trained(rank, size, kind, loop, accumulate, counts, uneven=False, epochs=2):
    """One watched run on this process."""
    model, part, _ = wrapped(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = policy_of(**accumulate)
    reductions = []
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        for epoch in range(epochs):
            loader = loader_of(part, counts[part], epoch, uneven)
            reductions.append(LOOPS[loop](watch, model, optimizer, loader))
        watch.flush()
        return watch.history(99), whole(model.parameters()), reductions


def one_big_batch(parts, windows_of, uneven=False, epochs=2, weigh="mean"):
    """Norms and weights of one process that sees each window of all parts as one batch.

    Args:
        windows_of: by part the windows of a whole run, each a list of (epoch, index).
    """
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for window in range(len(windows_of[0])):
        optimizer.zero_grad()
        micros = [(p, epoch, i) for p in range(parts) for epoch, i in windows_of[p][window]]
        weights = [tokens_of(p, i, uneven) if weigh == "weight" else 1 for p, _, i in micros]
        loss = sum(
            w * loss_of(model, batch_of(p, i, epoch, tokens_of(p, i, uneven)))
            for w, (p, epoch, i) in zip(weights, micros, strict=True)
        )
        (loss / sum(weights)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        optimizer.step()
    return norms, [p.detach() for p in model.parameters()]


def windows(count: int, steps: int = 3, epochs: int = 2, carry: bool = False):
    runs = [[(epoch, i) for i in range(count)] for epoch in range(epochs)]
    runs = [[place for run in runs for place in run]] if carry else runs
    cut = [run[i : i + steps] for run in runs for i in range(0, len(run), steps)]
    return [window for window in cut if not carry or len(window) == steps]


def check(results, norms, weights, exact=1e-9):
    for records, ours, _ in results:
        assert [r.total_norm for r in records] == pytest.approx(norms, rel=5e-7)
        assert all(r.clipped == (n > LIMIT) for r, n in zip(records, norms, strict=True))
        for one, other in zip(ours, weights, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=exact)
    assert any(n > LIMIT for n in norms)


CASES = [
    ("ddp", "marked", {}),
    ("ddp views", "marked", {}),
    ("ddp static", "marked", {}),
    ("ddp", "marked", {"sync": "every"}),
    ("ddp", "unchanged", {}),
    ("ddp", "dividing", {"drive": "loop"}),
    ("fsdp", "marked", {}),
    ("fsdp", "marked", {"sync": "boundary"}),
    ("fsdp", "unchanged", {}),
    ("fsdp", "dividing", {"drive": "loop"}),
    ("fsdp x tp", "marked", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "loop", "accumulate"), CASES)
def test_windows_are_one_big_batch_however_the_loop_is_written(on_ranks, kind, loop, accumulate):
    """Seven micro-batches an epoch: the last window is short."""
    counts = [7] * 4
    results = on_ranks(trained, kind, loop, accumulate, counts)
    parts = 2 if kind == "fsdp x tp" else 4
    check(results, *one_big_batch(parts, [windows(7)] * parts))
    assert [r.micro_batches for r in results[0][0]] == [3, 3, 1] * 2
    holds_back = accumulate.get("sync") == "boundary" or kind in ("ddp", "ddp views")
    if loop == "marked" and accumulate.get("sync") != "every" and holds_back:
        at_the_end = [False, False, True, False, False, True, True]
        assert all(reductions == [at_the_end] * 2 for _, _, reductions in results)
    elif loop == "marked":
        assert all(all(map(all, reductions)) for _, _, reductions in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sync"),
    [("ddp", None), ("ddp", "every"), ("fsdp", None), ("fsdp", "boundary"), ("fsdp x tp", None)],
)
def test_token_weights_count_over_all_ranks(on_ranks, kind, sync):
    accumulate = {"weigh": "weight"} | ({"sync": sync} if sync else {})
    results = on_ranks(trained, kind, "marked", accumulate, [7] * 4, True)
    parts = 2 if kind == "fsdp x tp" else 4
    windows_of = [windows(7)] * parts
    check(results, *one_big_batch(parts, windows_of, uneven=True, weigh="weight"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sync"), [("ddp", None), ("fsdp", "boundary"), ("fsdp", None)])
def test_a_window_that_is_carried_over_does_not_end_an_epoch_unreduced(on_ranks, kind, sync):
    accumulate = {"partial": "carry"} | ({"sync": sync} if sync else {})
    results = on_ranks(trained, kind, "marked", accumulate, [7] * 4, False, 3)
    windows_of = [windows(7, epochs=3, carry=True)] * 4
    check(results, *one_big_batch(4, windows_of))
    if kind == "ddp" or sync:
        first, second, third = results[0][2]
        assert first == [False, False, True, False, False, True, True]
        assert second == [False, True, False, False, True, False, True]
        assert third == [True, False, False, True, False, False, True]


@pytest.mark.slow
def test_ranks_may_have_windows_of_other_lengths(on_ranks):
    counts = [7, 8, 9, 7]
    results = on_ranks(trained, "ddp", "marked", {"weigh": "weight"}, counts, True)
    windows_of = [windows(count) for count in counts]
    check(results, *one_big_batch(4, windows_of, uneven=True, weigh="weight"))


def refused(rank, size):
    said = []
    model, _, _ = wrapped("ddp static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gradwatch.PolicyError) as error:
        gradwatch.attach(model, optimizer, policy_of(sync="boundary"), port=None, recording=None)
    said.append(str(error.value))
    policy = policy_of(sync="every", drive="loop")
    with pytest.raises(gradwatch.PolicyError) as error:
        gradwatch.attach(model, optimizer, policy, port=None, recording=None)
    said.append(str(error.value))
    model, part, _ = wrapped("ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(
        model, optimizer, policy_of(sync="boundary"), port=None, recording=None
    ) as watch:
        with pytest.raises(gradwatch.PolicyError) as error:
            unchanged(watch, model, optimizer, loader_of(part, 1, 0, False))
        said.append(str(error.value))
        with pytest.raises(gradwatch.GradwatchError) as error:
            marked(watch, model, optimizer, loader_of(part, 6 + (rank == 2), 0, False))
    said.append(str(error.value))
    policy = policy_of(steps=3 + (rank == 2))
    with pytest.raises(gradwatch.AttachError) as error:
        gradwatch.attach(model, optimizer, policy, port=None, recording=None)
    said.append(str(error.value))
    model, part, _ = wrapped("fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(
        model, optimizer, policy_of(sync="boundary"), port=None, recording=None
    ) as watch:
        for micro in watch.micro_batches(loader_of(part, 2, 0, False)):
            with micro:
                micro.scale(loss_of(model, micro.batch)).backward()
            break
        with pytest.raises(gradwatch.GradwatchError) as error:
            marked(watch, model, optimizer, loader_of(part, 2, 0, False))
    said.append(str(error.value))
    return said


@pytest.mark.slow
def test_what_would_be_wrong_is_refused_with_the_way_out(on_ranks):
    for static, loop, plain, longer, policies, left in on_ranks(refused):
        assert "static_graph=True" in static
        assert "the loop's under drive: loop" in loop
        assert "for a loop over watch.micro_batches" in plain
        assert "rank 2 would take 3 optimizer steps in this loop and rank 3 2" in longer
        assert "rank 2 has another policy than rank 0" in policies
        assert "left in the middle of a window" in left


def with_another_state(rank, size):
    """One process goes on from a state in which micro-batches weighed more."""
    model, part, _ = wrapped("ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = policy_of(weigh="weight")
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        state = watch.state_dict()
        watch.load_state_dict({**state, "common_weight": 7.0 if rank == 1 else 3.0})
        with pytest.raises(gradwatch.TrainingStopped) as error:
            marked(watch, model, optimizer, loader_of(part, 3, 0, True))
        return str(error.value)


@pytest.mark.slow
def test_losses_that_were_divided_by_different_numbers_stop_the_run_on_every_rank(on_ranks):
    for said in on_ranks(with_another_state, size=2):
        assert "ranks divide the losses of a window by different numbers (9, 21)" in said


def in_half_precision(rank, size, sync):
    model, part, _ = wrapped("ddp", torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = policy_of(steps=64, **({"sync": sync} if sync else {}))
    policy["clip"] = [{"limit": 1e9}]
    norms = []
    with gradwatch.attach(model, optimizer, policy, port=None, recording=None) as watch:
        marked(watch, model, optimizer, loader_of(part, 64, 0, False, torch.bfloat16))
        norms = watch.latest.grad_norms.tolist()
    reference = model_of(torch.bfloat16).double()  # the same weights
    for one in range(size):
        for batch in loader_of(one, 64, 0, False, torch.bfloat16):
            x, y = (both.double() for both in batch)
            (loss_of(reference, (x, y)) / 64 / size).backward()
    layers = [reference[0], reference[2]]
    return norms, [
        float(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()) for layer in layers
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sync", [None, "every"])
def test_half_precision_sums_are_kept_in_float32_until_they_are_reduced(on_ranks, sync):
    """64 sums in bfloat16 would be some 5 % off."""
    for norms, expected in on_ranks(in_half_precision, sync, size=2):
        assert norms == pytest.approx(expected, rel=1e-2)
