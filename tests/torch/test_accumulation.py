"""Accumulation against one big batch, however the loop is written."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch

import gradwatch
from gradwatch.accumulation import Window
from gradwatch.policy import load_policy

FEATURES, STEPS = 12, 4
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )


def batches(sizes: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, FEATURES, generator=generator),
            torch.randn(size, 1, generator=generator),
        )
        for size in sizes
    ]


def joined(group):
    return torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])


def loss_of(model, batch, gain: float = 30.0) -> torch.Tensor:
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y) * gain


def windows(data: list, count: int) -> Iterator[list]:
    for start in range(0, len(data), count):
        yield data[start : start + count]


def big_batch_training(data, count: int, make, limit: float | None, gain=30.0, weights=None):
    """Each window as one batch (equal sizes), or as an explicit weighted mean; clipped by torch."""
    model = make_model()
    optimizer = make(model.parameters())
    norms = []
    for group in windows(data, count):
        optimizer.zero_grad()
        if weights is None:
            sizes = {len(x) for x, _ in group}
            assert len(sizes) == 1
            loss_of(model, joined(group), gain).backward()
        else:
            total = sum(weights(batch) for batch in group)
            sum(loss_of(model, batch, gain) * weights(batch) / total for batch in group).backward()
        wide = [p.grad.double().norm() for p in model.parameters()]
        norms.append(float(torch.stack(wide).norm()))
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    return model, norms


def difference(model, other) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def out_of_memory() -> None:
    raise MemoryError


def policy(**accumulate) -> dict:
    return {"version": 1, "accumulate": {"steps": STEPS, **accumulate}, "clip": [{"limit": 1.0}]}


def marked_loop(watch, model, optimizer, data, weight=lambda batch: 1.0) -> None:
    for micro in watch.micro_batches(data):
        with micro:
            micro.scale(loss_of(model, micro.batch), weight(micro.batch)).backward()
        if micro.last:
            optimizer.step()
            optimizer.zero_grad()


def unchanged_loop(model, optimizer, data) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [16, 14])
def test_micro_batches_equal_one_big_batch(attach, name, count):
    """14 of them end in a window of two."""
    data = batches([8] * count)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch = attach(model, optimizer, policy())
    marked_loop(watch, model, optimizer, data)
    other, norms = big_batch_training(data, STEPS, OPTIMIZERS[name], 1.0)
    assert difference(model, other) < 1e-6
    records = watch.history(10)
    assert [record.total_norm for record in records] == pytest.approx(norms, rel=1e-6)
    assert [record.micro_batches for record in records] == [4, 4, 4, 4 if count == 16 else 2]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [16, 13])
def test_token_weights_equal_one_big_batch_also_when_they_are_uneven(attach, name, count):
    """The mean over tokens, not the mean of means; the last window may be a single batch."""
    sizes = [3, 9, 1, 17, 8, 2, 30, 5, 4, 4, 21, 1, 6, 11, 2, 2][:count]
    data = batches(sizes)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch = attach(model, optimizer, policy(weigh="weight"))
    marked_loop(watch, model, optimizer, data, weight=lambda batch: len(batch[0]))
    reference, norms = big_batch_training(
        data, STEPS, OPTIMIZERS[name], 1.0, weights=lambda batch: len(batch[0])
    )
    assert difference(model, reference) < 1e-6
    records = watch.history(10)
    assert [record.total_norm for record in records] == pytest.approx(norms, rel=1e-6)
    assert [record.weight for record in records] == [sum(w) for w in windows(sizes, STEPS)]


def test_a_sum_is_the_plain_sum_of_the_gradients(attach):
    data = batches([8] * 6)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, policy(weigh="sum"))
    marked_loop(watch, model, optimizer, data)
    other = make_model()
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for group in windows(data, STEPS):
        plain.zero_grad()
        for batch in group:
            loss_of(other, batch).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        plain.step()
    assert difference(model, other) == 0


def test_full_windows_are_those_of_the_loop_written_by_hand_to_the_bit(attach):
    data = batches([8] * 12)
    model, other = make_model(), make_model()
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, other))
    watch = attach(model, optimizer, {**policy(), "accumulate": {"steps": 3}})
    marked_loop(watch, model, optimizer, data)
    for group in windows(data, 3):
        plain.zero_grad()
        for batch in group:
            (loss_of(other, batch) / 3).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        plain.step()
    assert difference(model, other) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unchanged_loop_accumulates(attach, name):
    data = batches([8] * 16)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch = attach(model, optimizer, policy())
    unchanged_loop(model, optimizer, data)
    other, norms = big_batch_training(data, STEPS, OPTIMIZERS[name], 1.0)
    assert difference(model, other) < 1e-6
    records = watch.history(20)
    assert [record.total_norm for record in records] == pytest.approx(norms, rel=1e-6)
    assert {record.micro_batches for record in records} == {4}


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_the_last_window_of_an_unchanged_loop_can_be_ended(attach, when):
    data = batches([8] * 6)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = attach(model, optimizer, policy())
    for i, batch in enumerate(data):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if when == "before the step" and i == len(data) - 1:
            watch.end_window()
        optimizer.step()
    if when == "after the step":
        optimizer.zero_grad()
        watch.end_window()
        watch.end_window()  # nothing is left: nothing happens
    other, _ = big_batch_training(data, STEPS, lambda p: torch.optim.AdamW(p, lr=1e-3), 1.0)
    assert difference(model, other) < 1e-6
    assert [record.micro_batches for record in watch.history(9)] == [4, 2]


def test_an_unfinished_window_is_said_when_the_watch_closes(attach, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, policy())
    unchanged_loop(model, optimizer, batches([8] * 6))
    with caplog.at_level(logging.WARNING, "gradwatch"):
        watch.close()
    assert "2 micro-batches of an unfinished window were dropped" in caplog.text


@pytest.mark.parametrize("order", ["zero first", "zero last", "zero in place"])
def test_the_order_of_an_unchanged_loop_does_not_matter(attach, order):
    data = batches([8] * 8)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, policy())
    for batch in data:
        if order == "zero first":
            optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        if order == "zero last":
            model.zero_grad()
        if order == "zero in place":
            optimizer.zero_grad(set_to_none=False)
    other, _ = big_batch_training(data, STEPS, lambda p: torch.optim.SGD(p, lr=0.1), 1.0)
    assert difference(model, other) < 1e-6


def test_a_loop_that_accumulates_by_itself_is_caught_before_the_first_update(attach):
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, policy())
    for batch in batches([8] * 2):
        loss_of(model, batch).backward()
    with pytest.raises(gradwatch.PolicyError, match="needs drive: loop"):
        optimizer.step()
    assert difference(model, before) == 0


@pytest.mark.parametrize("count", [16, 14])
def test_a_loop_that_divides_by_itself_is_repaired_and_never_divided_twice(attach, count):
    data = batches([8] * count)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = attach(model, optimizer, policy(drive="loop"))
    for group in windows(data, STEPS):
        optimizer.zero_grad()
        for batch in group:
            (loss_of(model, batch) / STEPS).backward()
        optimizer.step()
    other, norms = big_batch_training(data, STEPS, lambda p: torch.optim.AdamW(p, lr=1e-3), 1.0)
    assert difference(model, other) < 1e-6
    assert [r.total_norm for r in watch.history(9)] == pytest.approx(norms, rel=1e-6)
    assert watch.latest.micro_batches == (4 if count == 16 else 2)


def looped(attach, sizes: list[int], **changed):
    """A loop of windows of these sizes that divides by each one's own."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, {**policy(drive="loop"), **changed})
    for size in sizes:
        optimizer.zero_grad()
        for batch in batches([8] * size):
            (loss_of(model, batch) / size).backward()
        optimizer.step()
    return watch


def warnings_of_windows(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "accumulate.steps is" in r.getMessage()]


def test_a_loop_whose_windows_are_all_shorter_than_the_policy_says_is_warned_of_once(
    attach, caplog
):
    watch = looped(attach, [2] * 8)
    _, (mean,) = big_batch_training(batches([8] * 2), 2, lambda p: torch.optim.SGD(p, lr=0.0), None)
    assert [r.total_norm for r in watch.history(9)] == pytest.approx([2 * mean] * 8, rel=1e-6)
    (said,) = warnings_of_windows(caplog)
    assert "the first 3 windows of this loop had 2, 2, 2 micro-batches" in said
    assert "accumulate.steps is 4" in said
    assert "gradients of a window of 2 are multiplied by 2" in said
    assert "needs accumulate: {steps: 2, drive: loop}" in said


def test_a_shadow_policy_multiplies_no_short_window_and_warns_of_none(attach, caplog):
    watch = looped(attach, [2] * 4, mode="shadow")
    _, (mean,) = big_batch_training(batches([8] * 2), 2, lambda p: torch.optim.SGD(p, lr=0.0), None)
    assert watch.latest.total_norm == pytest.approx(mean, rel=1e-6)
    assert not warnings_of_windows(caplog)


@pytest.mark.parametrize("sizes", [[4, 2, 2, 2, 2], [2, 2, 4, 2, 2, 2], [2, 2], [8, 2, 2, 2]])
def test_short_windows_beside_a_full_one_are_not_warned_of(attach, caplog, sizes):
    looped(attach, sizes)
    assert not warnings_of_windows(caplog)


def test_short_windows_of_a_sum_are_left_as_they_are_and_not_warned_of(attach, caplog):
    looped(attach, [2] * 4, accumulate={"steps": STEPS, "drive": "loop", "weigh": "sum"})
    assert not warnings_of_windows(caplog)


def test_micro_batches_under_a_loop_that_divides_are_refused(attach):
    model = make_model()
    watch = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), policy(drive="loop"))
    with pytest.raises(gradwatch.PolicyError, match="divides the loss"):
        watch.micro_batches([])


def test_weights_that_nobody_can_see_are_refused(attach):
    model = make_model()
    with pytest.raises(gradwatch.PolicyError, match="weight of each loss"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1),
               policy(drive="loop", weigh="weight"))  # fmt: skip


def test_a_micro_batch_whose_loss_was_not_scaled_is_an_error_at_once(attach):
    model = make_model()
    watch = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), policy())
    (micro, *_) = watch.micro_batches(batches([8] * 4))
    with pytest.raises(gradwatch.GradwatchError, match="was not scaled"), micro:
        loss_of(model, micro.batch).backward()


def test_several_losses_of_one_micro_batch_count_once(attach):
    data = batches([8] * 4)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, policy())
    for micro in watch.micro_batches(data):
        with micro:
            half = loss_of(model, micro.batch, 15.0)
            micro.scale(half).backward(retain_graph=True)
            micro.scale(half).backward()
        if micro.last:
            optimizer.step()
    other, _ = big_batch_training(data, STEPS, lambda p: torch.optim.SGD(p, lr=0.1), 1.0)
    assert difference(model, other) < 1e-6
    assert watch.latest.weight == 4


@pytest.mark.parametrize("partial", ["step", "drop", "carry"])
def test_a_last_shorter_window_steps_is_dropped_or_is_carried_over(attach, partial):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, policy(partial=partial))
    for epoch in range(2):
        marked_loop(watch, model, optimizer, batches([8] * 6, seed=epoch))
    expected = {"step": [4, 2, 4, 2], "drop": [4, 4], "carry": [4, 4, 4]}[partial]
    assert [record.micro_batches for record in watch.history(9)] == expected


def test_the_number_of_steps_follows_its_schedule(attach):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stairs = {"version": 1, "accumulate": {"steps": {0: 1, 2: 3}}}
    watch = attach(model, optimizer, stairs)
    marked_loop(watch, model, optimizer, batches([8] * 8))
    assert [record.micro_batches for record in watch.history(9)] == [1, 1, 3, 3]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = attach(model, optimizer, stairs)
    unchanged_loop(model, optimizer, batches([8] * 8))
    assert [record.micro_batches for record in watch.history(9)] == [1, 1, 3, 3]


def scaled_training(model, optimizer, scaler, data, count, *, marked=None, poison=()):
    """A GradScaler loop; poisoned batches overflow."""
    position = 0
    if marked is not None:
        for micro in marked.micro_batches(data):
            with micro:
                loss = micro.scale(loss_of(model, micro.batch))
                scaler.scale(loss * (float("inf") if position in poison else 1.0)).backward()
            position += 1
            if micro.last:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return
    for group in windows(data, count):
        optimizer.zero_grad()
        for batch in group:
            loss = loss_of(model, batch) / len(group)
            scaler.scale(loss * (float("inf") if position in poison else 1.0)).backward()
            position += 1
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("poison", [(), (5,)])
@pytest.mark.parametrize("name", ["adamw", "fused"])
def test_micro_batches_with_a_grad_scaler(attach, name, poison):
    data = batches([8] * 14)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) for _ in range(2)]
    model, other = make_model(), make_model()
    optimizer, plain = (OPTIMIZERS[name](m.parameters()) for m in (model, other))
    watch = attach(model, optimizer, policy(), scaler=scalers[0])
    scaled_training(model, optimizer, scalers[0], data, STEPS, marked=watch, poison=poison)
    scaled_training(other, plain, scalers[1], data, STEPS, poison=poison)
    assert difference(model, other) < 1e-6
    assert scalers[0].get_scale() == scalers[1].get_scale()
    reasons = [record.skipped for record in watch.history(9)]
    assert reasons == ([None, "overflow", None, None] if poison else [None] * 4)
    assert [record.step for record in watch.history(9)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["adamw", "fused"])
def test_an_unchanged_loop_with_a_grad_scaler(attach, name):
    data = batches([8] * 12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    watch = attach(model, optimizer, policy(), scaler=scaler)
    for batch in data:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    other, norms = big_batch_training(data, STEPS, OPTIMIZERS[name], 1.0)
    assert difference(model, other) < 1e-6
    assert [r.total_norm for r in watch.history(9)] == pytest.approx(norms, rel=1e-6)


def test_gradients_that_are_views_of_a_bucket_are_copied_before_it_is_written_to_again(attach):
    """As under DistributedDataParallel(gradient_as_bucket_view=True)."""
    data = batches([8] * 8)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, policy())
    parameters = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in parameters))
    for batch in data:
        grads = torch.autograd.grad(loss_of(model, batch), parameters)
        offset = 0
        for parameter, grad in zip(parameters, grads, strict=True):
            view = bucket[offset : offset + grad.numel()].view_as(grad)
            view.copy_(grad)
            parameter.grad = view
            offset += grad.numel()
        optimizer.step()
    other, _ = big_batch_training(data, STEPS, lambda p: torch.optim.SGD(p, lr=0.1), 1.0)
    assert difference(model, other) < 1e-6


def test_sparse_gradients_accumulate(attach):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4, sparse=True)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    attach(model, optimizer, {"version": 1, "accumulate": {"steps": 2}})
    rows = [torch.tensor([1, 2, 2]), torch.tensor([2, 5])]
    for row in rows:
        optimizer.zero_grad()
        model(row).square().sum().backward()
        optimizer.step()
    sum(other(row).square().sum() / 2 for row in rows).backward()
    plain.step()
    assert difference(model, other) < 1e-6


def test_shadow_mode_does_not_accumulate(attach):
    data = batches([8] * 8)
    model, other = make_model(), make_model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    watch = attach(model, optimizer, {**policy(), "mode": "shadow"})
    unchanged_loop(model, optimizer, data)
    unchanged_loop(other, plain, data)
    assert difference(model, other) == 0
    assert len(watch.history(20)) == 8


def test_accumulation_that_breaks_stops_the_run_or_ends(attach, monkeypatch, caplog):
    for on_error in ("stop", "observe"):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = attach(model, optimizer, {**policy(), "guard": {"on_error": on_error}})

        def broken(*_: object) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(watch._unchanged._stash, "take", broken)
        if on_error == "stop":
            loss_of(model, batches([8])[0]).backward()
            with pytest.raises(gradwatch.TrainingStopped, match="failed to accumulate"):
                optimizer.step()
        else:
            unchanged_loop(model, optimizer, batches([8] * 3))
            assert "each call of step() is a step from now on" in caplog.text


class TestWindow:
    def window(self, **accumulate) -> Window:
        return Window(load_policy({"version": 1, "accumulate": accumulate}).accumulate)

    def test_a_window_without_weight_is_not_divided_by_zero(self):
        window = self.window(steps=2, weigh="weight")
        assert window.add(0.0) == float("inf")
        window.add(0.0)
        assert window.close().factor == 1.0

    def test_the_first_weight_may_be_zero(self):
        window = self.window(steps=2, weigh="weight")
        divisors = [window.add(0.0), window.add(6.0)]
        closed = window.close()
        assert [6.0 / d * closed.factor / 6.0 for d in divisors] == pytest.approx([0.0, 1.0])


class TestWhatLoopsDo:
    """Loops as they are: broken off, overflowing, mixed."""

    def norms(self, watch) -> list[float]:
        return [r.total_norm for r in watch.history(20) if r.skipped is None]

    def test_dividing_windows_of_any_length_are_exact_where_the_scaler_drops_one(self, attach):
        data = batches([8] * 10)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        watch = attach(model, optimizer, policy(drive="loop"), scaler=scaler)
        groups = [data[:4], data[4:6], data[6:]]
        expected = []
        for k, group in enumerate(groups):
            optimizer.zero_grad()
            for batch in group:
                gain = float("inf") if k == 1 else 1.0
                scaler.scale(loss_of(model, batch) / STEPS * gain).backward()
            scaler.step(optimizer)
            scaler.update()
            if k != 1:
                whole = loss_of(model, joined(group))
                grads = torch.autograd.grad(whole, list(model.parameters()))
                expected.append(float(torch.stack([g.norm() for g in grads]).norm()))
        assert self.norms(watch) == pytest.approx(expected, rel=1e-6)
        assert [r.skipped for r in watch.history(9)] == [None, "overflow", None]

    def test_a_scaler_that_backs_off_for_another_optimizer_changes_no_window(self, attach):
        data = batches([8] * 12)
        model, other = make_model(), make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        second = torch.optim.AdamW(other.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        watch = attach(model, optimizer, policy(drive="loop"), scaler=scaler)
        for k, group in enumerate(windows(data, STEPS)):
            optimizer.zero_grad()
            second.zero_grad()
            for batch in group:
                scaler.scale(loss_of(model, batch) / STEPS).backward()
            gain = float("inf") if k == 1 else 1.0
            scaler.scale(loss_of(other, group[0]) * gain).backward()
            scaler.step(optimizer)
            scaler.step(second)
            scaler.update()
        records = watch.history(9)
        assert [(r.skipped, r.micro_batches) for r in records] == [(None, 4)] * 3

    def test_passes_that_nobody_counted_are_not_repaired(self, attach):
        data = batches([8] * 8)
        model = make_model()
        optimizer = torch.optim.SGD(list(model.parameters())[:1], lr=0.0)
        watch = attach(model, optimizer, {**policy(drive="loop"), "clip": []})
        model[0].weight.requires_grad_(False)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        for group in windows(data, STEPS):
            optimizer.zero_grad()
            for batch in group:
                (loss_of(model, batch) / STEPS).backward()
            before = [p.grad.clone() for p in model[2].parameters()]
            optimizer.step()
            after = [p.grad for p in model[2].parameters()]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert len(watch.history(9)) == 2

    @pytest.mark.parametrize("poison", [0, 5])
    def test_an_unchanged_loop_leaves_an_overflowed_micro_batch_out(self, attach, poison):
        data = batches([8] * 9)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        watch = attach(model, optimizer, policy(), scaler=scaler)
        for i, batch in enumerate(data):
            optimizer.zero_grad()
            gain = float("inf") if i == poison else 1.0
            scaler.scale(loss_of(model, batch) * gain).backward()
            scaler.step(optimizer)
            scaler.update()
        kept = [batch for i, batch in enumerate(data) if i != poison]
        other, norms = big_batch_training(kept, STEPS, OPTIMIZERS["adamw"], 1.0)
        assert self.norms(watch) == pytest.approx(norms, rel=1e-6)
        assert difference(model, other) < 1e-6

    def test_ending_a_window_that_is_complete_changes_nothing(self, attach):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = attach(model, optimizer, policy())
        for _ in range(2):
            unchanged_loop(model, optimizer, batches([8] * 8))
            watch.end_window()
        assert [record.micro_batches for record in watch.history(9)] == [4, 4, 4, 4]

    @pytest.mark.parametrize("position", [1, 3])
    def test_a_micro_batch_that_raises_has_no_part_in_its_window(self, attach, position):
        data = batches([8] * 9)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = attach(model, optimizer, policy())
        for i, micro in enumerate(watch.micro_batches(data)):
            try:
                with micro:
                    loss = micro.scale(loss_of(model, micro.batch))
                    (out_of_memory if i == position else loss.backward)()
            except MemoryError:
                continue
            if micro.last:
                optimizer.step()
                optimizer.zero_grad()
        kept = [batch for i, batch in enumerate(data) if i != position]
        other, norms = big_batch_training(kept, STEPS, lambda p: torch.optim.SGD(p, lr=0.1), 1.0)
        assert self.norms(watch) == pytest.approx(norms, rel=1e-6)
        assert difference(model, other) < 1e-6

    @pytest.mark.parametrize("partial", ["step", "drop", "carry"])
    def test_a_marked_loop_that_is_left_early_begins_with_a_whole_window(
        self, attach, partial, caplog
    ):
        data = batches([8] * 8)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = attach(model, optimizer, policy(partial=partial))
        for i, micro in enumerate(watch.micro_batches(data)):
            with micro:
                micro.scale(loss_of(model, micro.batch)).backward()
            if i == 1:
                break
        optimizer.zero_grad()
        marked_loop(watch, model, optimizer, data)
        _, norms = big_batch_training(data, STEPS, lambda p: torch.optim.SGD(p, lr=0.1), 1.0)
        assert self.norms(watch) == pytest.approx(norms, rel=1e-6)
        assert "2 micro-batches of a window that was not finished were dropped" in caplog.text

    def test_unchanged_and_marked_loops_may_follow_each_other(self, attach):
        data = batches([8] * 8)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        watch = attach(model, optimizer, policy())
        unchanged_loop(model, optimizer, data[:6])  # two are left over, and dropped
        optimizer.zero_grad()
        marked_loop(watch, model, optimizer, data)
        unchanged_loop(model, optimizer, data)
        assert [record.micro_batches for record in watch.history(9)] == [4, 4, 4, 4, 4]
        _, norms = big_batch_training(data, STEPS, lambda p: torch.optim.SGD(p, lr=0.0), None)
        assert self.norms(watch) == pytest.approx([norms[0], *norms, *norms], rel=1e-6)

    def test_weights_of_an_unchanged_loop_are_refused(self, attach):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer, policy(weigh="weight"))
        loss_of(model, batches([8])[0]).backward()
        with pytest.raises(gradwatch.PolicyError, match="Use watch"):
            optimizer.step()

    def test_in_shadow_each_marked_micro_batch_is_a_step(self, attach):
        data = batches([8] * 4)
        model, other = make_model(), make_model()
        optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
        watch = attach(model, optimizer, {**policy(), "mode": "shadow"})
        marked_loop(watch, model, optimizer, data)
        unchanged_loop(other, plain, data)
        assert difference(model, other) == 0
        assert [record.micro_batches for record in watch.history(9)] == [1] * 4


@pytest.mark.parametrize(
    ("steps", "begun", "batches", "partial", "expected"),
    [
        (3, 0, 7, "step", 3),
        (3, 0, 7, "carry", 2),
        (3, 0, 7, "drop", 2),
        (3, 2, 7, "carry", 3),
        (3, 0, 0, "step", 0),
        ({0: 1, 3: 4}, 0, 9, "step", 5),
        ({0: 1, 3: 4}, 0, 9, "carry", 4),
    ],
)
def test_the_steps_of_a_loader_are_known_before_it_is_read(
    steps, begun, batches, partial, expected
):
    policy = load_policy({"version": 1, "accumulate": {"steps": steps}})
    window = Window(policy.accumulate)
    for _ in range(begun):
        window.add()
    assert window.steps_of(batches, partial=partial) == expected
