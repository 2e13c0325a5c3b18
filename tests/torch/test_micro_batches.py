"""What is known and kept of micro-batches: their noise, their sums, how many they are."""

from __future__ import annotations

import math

import pytest
import torch

import gradwatch

DIMENSIONS = 50


def model_of(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(DIMENSIONS, 1, bias=False).to(dtype)


def policy(**accumulate) -> dict:
    return {"version": 1, "accumulate": {"steps": 8, **accumulate}, "clip": [{"limit": 1e3}]}


def out_of_memory() -> None:
    raise RuntimeError


def noisy_batches(count: int, sizes=(4,)) -> tuple[list[torch.Tensor], float]:
    """Samples whose gradients are themselves, and the noise scale of those."""
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(DIMENSIONS, generator=draw) * 0.2
    deviation = torch.exp(torch.randn(DIMENSIONS, generator=draw) * 0.5)
    batches = [
        mean + deviation * torch.randn(sizes[i % len(sizes)], DIMENSIONS, generator=draw)
        for i in range(count)
    ]
    return batches, float(deviation.square().sum() / mean.square().sum())


def marked(watch, model, optimizer, batches, weight=len, scaler=None):
    for micro in watch.micro_batches(batches):
        with micro:
            loss = micro.scale(model(micro.batch).mean(), weight(micro.batch))
            (loss if scaler is None else scaler.scale(loss)).backward()
        if micro.last:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


def unchanged(watch, model, optimizer, batches):
    for batch in batches:
        model(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def dividing(watch, model, optimizer, batches):
    for i, batch in enumerate(batches):
        (model(batch).mean() / 8).backward()
        if i % 8 == 7:
            optimizer.step()
            optimizer.zero_grad()


LOOPS = {
    "marked": (marked, {}),
    "marked, by weight": (marked, {"weigh": "weight"}),
    "marked, a sum": (marked, {"weigh": "sum"}),
    "unchanged": (unchanged, {"partial": "drop"}),
    "dividing": (dividing, {"drive": "loop"}),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_noise_scale_of_a_run_is_within_five_percent_after_2000_steps(attach, loop):
    train, accumulate = LOOPS[loop]
    batches, truth = noisy_batches(2000 * 8)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, policy(**accumulate))
    train(watch, model, optimizer, batches)
    unit = 1 if accumulate.get("weigh") == "weight" else 4  # samples of a micro-batch
    assert watch.latest.step == 1999
    assert watch.latest.noise_scale * unit == pytest.approx(truth, rel=0.05)


def test_uneven_weights_give_the_same_noise_scale(attach):
    batches, truth = noisy_batches(2000 * 8, sizes=(1, 7, 4, 2, 9))
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, policy(weigh="weight"))
    marked(watch, model, optimizer, batches)
    assert watch.latest.noise_scale == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_no_noise(attach, fused):
    batches, _ = noisy_batches(64)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
        watch = attach(model, optimizer, policy(), scaler=scaler)
        marked(watch, model, optimizer, batches, scaler=scaler)
        found.append(watch.latest.noise_scale)
        watch.close()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_without_accumulation_there_is_no_noise_scale(attach):
    batches, _ = noisy_batches(4)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, {"version": 1})
    unchanged(watch, model, optimizer, batches)
    assert math.isnan(watch.latest.noise_scale)


@pytest.mark.parametrize("loop", ["marked", "unchanged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_added_up_in_float32_and_rounded_once(attach, loop, dtype):
    """A large first micro-batch, then many that bfloat16 would add to it without effect."""
    model = model_of(dtype)
    sizes = [1.0] + [1e-3] * 63
    batches = [torch.full((1, DIMENSIONS), size, dtype=dtype) for size in sizes]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    watch = attach(model, optimizer, policy(steps=64, weigh="sum"))
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(model.weight.grad.clone() if model.weight.grad is not None else None)
    )
    LOOPS[loop][0](watch, model, optimizer, batches)
    exact = sum(float(torch.tensor(size, dtype=dtype)) for size in sizes)
    last = [grad for grad in seen if grad is not None][-1]
    assert last.dtype == dtype
    assert torch.equal(last, torch.full_like(last, exact))
    plain = torch.tensor(0.0, dtype=dtype)
    for size in sizes:
        plain = plain + torch.tensor(size, dtype=dtype)
    if dtype == torch.bfloat16:
        assert float(plain) == 1.0  # what adding up in bfloat16 makes of it


def test_a_micro_batch_that_fails_has_no_part_in_a_sum_in_half_precision(attach):
    model = model_of(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    watch = attach(model, optimizer, policy(steps=2, weigh="sum"))
    batches = [torch.full((1, DIMENSIONS), size, dtype=torch.bfloat16) for size in (1.0, 8.0, 2.0)]
    for i, micro in enumerate(watch.micro_batches(batches)):
        try:
            with micro:
                micro.scale(model(micro.batch).mean()).backward()
                if i == 1:
                    out_of_memory()
        except RuntimeError:
            continue
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.weight, before - 3.0)


def test_a_target_of_samples_ends_windows_where_it_is_reached(attach):
    sizes = [3, 3, 3, 5, 4, 10, 1]
    batches = [torch.ones(size, DIMENSIONS) for size in sizes]
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, policy(steps={"target": 9}, weigh="weight"))
    marked(watch, model, optimizer, batches)
    records = watch.history(9)
    assert [r.weight for r in records] == [9.0, 9.0, 10.0, 1.0]
    assert [r.micro_batches for r in records] == [3, 2, 1, 1]
    assert [r.total_norm for r in records] == pytest.approx([math.sqrt(DIMENSIONS)] * 4, rel=1e-6)


@pytest.mark.parametrize("weigh", ["mean", "weight"])
def test_windows_of_a_target_are_exact_whatever_their_number(attach, weigh):
    draw = torch.Generator().manual_seed(0)
    sizes = [2, 5, 3, 8, 1, 4, 6, 7]
    batches = [torch.randn(size, DIMENSIONS, generator=draw) for size in sizes]
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, policy(steps={"target": 10}, weigh=weigh))
    marked(watch, model, optimizer, batches)
    expected = []
    for group in ([0, 1, 2], [3, 4, 5], [6, 7]):
        if weigh == "weight":
            whole = torch.cat([batches[i] for i in group]).double().mean(dim=0)
        else:
            whole = torch.stack([batches[i].double().mean(dim=0) for i in group]).mean(dim=0)
        expected.append(float(whole.norm()))
    assert [r.total_norm for r in watch.history(9)] == pytest.approx(expected, rel=1e-6)


def test_samples_are_counted_in_whatever_holds_a_tensor(attach):
    class Batch:
        def __init__(self, size):
            self.note, self.x = "text", torch.ones(size, DIMENSIONS)

    for make in (
        lambda n: (torch.ones(n, DIMENSIONS), torch.ones(n)),
        lambda n: {"label": [torch.ones(n)], "x": torch.ones(n, DIMENSIONS)},
        Batch,
    ):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        watch = attach(model, optimizer, policy(steps={"target": 6}))
        lasts = [micro.last for micro in _used(watch, model, [make(3), make(3), make(6)])]
        assert lasts == [False, True, True]
        watch.close()


def _used(watch, model, batches, **options):
    for micro in watch.micro_batches(batches, **options):
        with micro:
            micro.scale(model(torch.ones(1, DIMENSIONS)).mean()).backward()
        yield micro
        if micro.last:
            watch._optimizer.step()
            watch._optimizer.zero_grad()


def test_samples_that_cannot_be_counted_are_asked_for(attach):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, policy(steps={"target": 6}))
    with pytest.raises(gradwatch.PolicyError, match=r"type str holds no array. Pass watch"):
        list(watch.micro_batches(["text"]))
    lasts = [m.last for m in _used(watch, model, ["three", "three"], samples=len)]
    assert lasts == [False, True]


def test_a_target_needs_marked_micro_batches(attach):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, policy(steps={"target": 6}))
    with pytest.raises(gradwatch.PolicyError, match=r"counts samples.*Use watch.micro_batches"):
        unchanged(None, model, optimizer, [torch.ones(1, DIMENSIONS)])
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(gradwatch.PolicyError, match=r"counts samples, which drive: loop"):
        attach(model, other, policy(steps={"target": 6}, drive="loop"))


@pytest.mark.parametrize(("before", "after"), [(16, 1), (1, 16)])
def test_limits_are_told_when_windows_change_their_length(attach, before, after):
    """Noise goes with 1/sqrt(B): without that the first steps of shorter windows were clipped."""
    draw = torch.Generator().manual_seed(0)
    steps, warmup = 60, 20
    count = steps * before + steps * after
    batches = [torch.randn(1, DIMENSIONS, generator=draw) for _ in range(count)]
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = {"limit": {"z": 4, "warmup": warmup}}
    watch = attach(model, optimizer, {**policy(steps={0: before, steps: after}), "clip": [rule]})
    marked(watch, model, optimizer, batches, weight=lambda batch: 1)
    records = watch.history(200)
    assert [r.micro_batches for r in records] == [before] * steps + [after] * steps
    assert not any(r.clipped for r in records)
    limits = [r.limits["global"] for r in records]
    growth = max(1.0, math.sqrt(before / after))
    assert limits[steps] == pytest.approx(limits[steps - 1] * growth, rel=0.2)
    assert limits[steps + warmup - 1] == limits[steps]
    level = records[-1].total_norm
    assert limits[steps + warmup] < 3 * level


def test_the_position_in_a_schedule_of_windows_outlives_a_checkpoint(attach):
    model = model_of()
    batches = [torch.ones(1, DIMENSIONS)] * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = {"limit": {"z": 4, "warmup": 2}}
    first = attach(model, optimizer, {**policy(steps=1), "clip": [rule]})
    marked(first, model, optimizer, batches, weight=lambda batch: 1)
    state = first.state_dict()
    first.close()
    second = attach(model, optimizer, {**policy(steps=2), "clip": [rule]})
    second.load_state_dict(state)
    marked(second, model, optimizer, batches, weight=lambda batch: 1)
    assert second.history(2)[0].limits == first.latest.limits
