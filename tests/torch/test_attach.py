"""Attaching to real loops: what is seen, what is refused, what is left behind."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import time
import weakref

import pytest
import torch

import gradwatch

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


def sgd(task):
    return torch.optim.SGD(task.model.parameters(), lr=0.1)


def true_norm(model) -> float:
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def test_the_norm_is_that_of_the_gradient_before_clipping(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0, 50.0)
    expected = true_norm(task.model)
    optimizer.step()
    record = watch.latest
    assert record.total_norm == pytest.approx(expected, rel=1e-6)
    assert record.total_norm_clipped == pytest.approx(1.0, rel=1e-5)
    assert record.clip_coef == pytest.approx(1 / expected, rel=1e-5)
    assert record.clipped
    assert record.fired == ("global",)
    assert true_norm(task.model) == pytest.approx(1.0, rel=1e-5)


def test_layers_are_modules_and_their_norms_combine_their_tensors(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    task.gradient(0)
    expected = [true_norm(module) for module in task.model.children()]
    optimizer.step()
    assert watch.latest.layers == ("embed", "conv", "norm", "head")
    assert watch.latest.grad_norms.tolist() == pytest.approx(expected, rel=1e-6)


def test_steps_are_counted_from_zero_and_skipped_ones_count(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    for step in range(5):
        task.gradient(step)
        if step == 2:
            task.model.head.bias.grad[0] = torch.inf
        optimizer.step()
    assert [record.step for record in watch.history(10)] == [0, 1, 2, 3, 4]
    assert [record.skipped for record in watch.history(10)] == [
        None, None, "nonfinite", None, None,
    ]  # fmt: skip


def test_parameter_groups_are_told_apart_by_a_policy(task, attach):
    body = [p for name, p in task.model.named_parameters() if not name.startswith("head")]
    groups = [{"params": body}, {"params": task.model.head.parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    watch = attach(task.model, optimizer, {"version": 1, "clip": [{"groups": [1], "limit": 1e-3}]})
    task.gradient(0)
    expected = true_norm(task.model.head)
    optimizer.step()
    assert watch.latest.coefs.tolist() == pytest.approx([1, 1, 1, 1e-3 / expected], rel=1e-5)


def test_per_group_clips_each_group_as_one_vector(task, attach):
    body = [p for name, p in task.model.named_parameters() if not name.startswith("head")]
    optimizer = torch.optim.SGD(
        [{"params": body}, {"params": task.model.head.parameters()}], lr=0.1
    )
    attach(task.model, optimizer, {"version": 1, "clip": [{"per": "group", "limit": 0.01}]})
    task.gradient(0, 100.0)
    optimizer.step()
    assert true_norm(task.model.head) == pytest.approx(0.01, rel=1e-5)
    assert true_norm(task.model) == pytest.approx(0.01 * 2**0.5, rel=1e-5)


def test_a_frozen_layer_keeps_its_label_and_has_no_gradient(task, attach):
    task.model.conv.requires_grad_(False)
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    task.gradient(0)
    optimizer.step()
    assert watch.latest.layers == ("embed", "conv", "norm", "head")
    assert watch.latest.present_L.tolist() == [True, False, True, True]
    assert watch.latest.grad_norms[1] == 0


def test_a_tied_parameter_is_counted_once_and_answers_to_both_names(attach):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 3)
            self.head = torch.nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = {"version": 1, "clip": [{"params": "head.*", "limit": 1e-4}]}
    watch = attach(model, optimizer, policy)
    model(torch.tensor([1, 2])).square().sum().backward()
    expected = float(model.embed.weight.grad.norm())
    optimizer.step()
    assert watch.latest.layers == ("embed",)
    assert watch.latest.total_norm == pytest.approx(expected)
    assert watch.latest.total_norm_clipped == pytest.approx(1e-4, rel=1e-4)


def test_a_learning_rate_schedule_works_as_before(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(3):
        task.gradient(step)
        optimizer.step()
        schedule.step()
    assert [r.learning_rate for r in watch.history(3)] == pytest.approx([0.1, 0.05, 0.025])


def test_a_closure_is_watched_after_it_ran(task, attach):
    other = task.copy()
    optimizer, plain = sgd(task), sgd(other)
    watch = attach(task.model, optimizer, CLIP)
    for step in range(3):
        optimizer.step(lambda step=step: task.gradient(step, 30.0))
        other.gradient(step, 30.0)
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        plain.step()
    assert len(watch.history(10)) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True)
    )


def test_a_subclass_that_calls_super_step_is_watched_once(task, attach):
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Noisy(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, CLIP)
    for step in range(3):
        task.gradient(step)
        optimizer.step()
    assert [record.step for record in watch.history(10)] == [0, 1, 2]


def test_after_a_step_that_raised_the_next_one_is_watched(task, attach):
    class Failing(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("no")
            return super().step(closure)

    optimizer = Failing(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, CLIP)
    for step, fail in enumerate([False, True, False, False]):
        task.gradient(step)
        optimizer.fail = fail
        if fail:
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step()
        else:
            optimizer.step()
    assert len(watch.history(10)) == 4


def test_micro_batches_are_the_backward_passes_of_a_step(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    zero_grad = task.model.zero_grad
    for micro_batches in (1, 3, 2):
        zero_grad()
        task.model.zero_grad = lambda: None
        for i in range(micro_batches):
            task.gradient(i)
        task.model.zero_grad = zero_grad
        optimizer.step()
    assert [record.micro_batches for record in watch.history(3)] == [1, 3, 2]


def test_a_second_watch_on_one_optimizer_is_refused(task, attach):
    optimizer = sgd(task)
    first = attach(task.model, optimizer)
    with pytest.raises(gradwatch.AttachError, match="watched already"):
        attach(task.model, optimizer)
    first.close()
    attach(task.model, optimizer)


def test_other_objects_are_refused_with_the_way_out(task, attach):
    with pytest.raises(
        gradwatch.AttachError, match=r"expected a torch.optim.Optimizer. Received: str"
    ):
        attach(task.model, "sgd")
    with pytest.raises(gradwatch.AttachError, match=r"expected a torch.nn.Module"):
        attach([1, 2], sgd(task))


def test_a_policy_that_does_not_fit_the_model_is_refused_before_the_first_step(task, attach):
    policy = {"version": 1, "clip": [{"params": "haed.*", "limit": 1}]}
    with pytest.raises(gradwatch.PolicyError, match=r"haed\.\*.*head"):
        attach(task.model, sgd(task), policy)


def test_model_and_optimizer_stay_picklable_and_copyable_with_clean_state(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters())
    keys = set(task.model.state_dict()), set(optimizer.state_dict())
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0)
    optimizer.step()
    for made in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        model, other = made(task.model), made(optimizer)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), task.parameters(), strict=True)
        )
        other.step()
    assert (set(task.model.state_dict()), set(optimizer.state_dict())) == keys
    assert len(watch.history(10)) == 1, "a copied optimizer is not watched"


def test_after_close_nothing_of_the_watch_is_left_on_the_loop(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0)
    optimizer.step()
    watch.close()
    watch.close()
    task.gradient(1, 100.0)
    norm = true_norm(task.model)
    optimizer.step()
    assert true_norm(task.model) == norm
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in task.model.parameters())
    assert not [t for t in threading.enumerate() if t.name == "gradwatch-consumer"]


def test_a_watch_that_is_forgotten_ends_its_thread(task):
    optimizer = sgd(task)
    watch = gradwatch.attach(task.model, optimizer, port=None, recording=None)
    forgotten = weakref.ref(watch)
    del watch, optimizer
    gc.collect()
    assert forgotten() is None
    deadline = time.monotonic() + 5
    while any(t.name == "gradwatch-consumer" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_loop_that_owns_the_step_calls_process(task, attach):
    watch = attach(task.model, policy=CLIP)
    task.gradient(0, 50.0)
    watch.process()
    assert true_norm(task.model) == pytest.approx(1.0, rel=1e-5)
    assert watch.latest.clipped


@pytest.mark.parametrize("place", ["after forward", "after backward", "after step"])
def test_a_logged_loss_belongs_to_its_step(task, attach, place):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    for step in range(6):
        loss = torch.tensor(float(step))
        if place == "after forward":
            watch.log(loss=loss)
        task.gradient(step)
        if place == "after backward":
            watch.log(loss=loss)
        optimizer.step()
        if place == "after step":
            watch.log(loss=loss)
    assert [record.scalars["loss"] for record in watch.history(6)] == [0, 1, 2, 3, 4, 5]


def test_what_is_no_number_is_left_out_of_the_log_with_one_warning(task, attach, caplog):
    watch = attach(task.model, sgd(task))
    with caplog.at_level(logging.WARNING, "gradwatch"):
        watch.log(loss=torch.ones(3), good=2)
        watch.log(loss="much", good=2)
    (said,) = [r.message for r in caplog.records if "watch.log" in r.message]
    assert said.startswith("watch.log: loss must be one number. Received: a Tensor (")


def test_repr_says_how_the_run_is(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    assert repr(watch) == "Watch(4 layers, no step yet)"
    for step in range(4):
        task.gradient(step, 100.0 if step else 0.01)
        optimizer.step()
    norm = watch.latest.total_norm
    assert repr(watch) == (
        f"Watch(4 layers, step 3, total_norm {norm:.3g}, clipped 3 of last 4, no anomaly)"
    )


def test_an_anomaly_is_called_back_and_logged_once_an_episode(task, attach, caplog):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    heard = []
    watch.on_anomaly(lambda anomaly: 1 / 0)
    watch.on_anomaly(heard.append)
    with caplog.at_level(logging.INFO, "gradwatch"):
        for step in range(6):
            task.gradient(step)
            if step >= 2:
                task.model.head.bias.grad[0] = torch.nan
            optimizer.step()
        watch.flush()
    assert [(a.kind, a.level, a.step, a.layer) for a in heard] == [
        ("nonfinite", "alert", 2, "head")
    ]
    assert len([r for r in caplog.records if "step 2: nonfinite" in r.message]) == 1
    assert "ZeroDivisionError" in caplog.text
    assert "nonfinite" in repr(watch)
    assert [len(record.anomalies) for record in watch.history(6)] == [0, 0, 1, 0, 0, 0]


def test_a_rule_that_warns_says_so_once_while_it_lasts(task, attach, caplog):
    optimizer = sgd(task)
    policy = {"version": 1, "clip": [{"limit": 1.0, "then": "warn", "name": "tall"}]}
    watch = attach(task.model, optimizer, policy)
    with caplog.at_level(logging.WARNING, "gradwatch"):
        for step, gain in enumerate([100, 100, 0.001, 100]):
            task.gradient(step, gain)
            optimizer.step()
    said = [r.message for r in caplog.records if "rule tall" in r.message]
    assert [m[:6] for m in said] == ["step 0", "step 3"]
    assert [record.fired for record in watch.history(4)] == [("tall",), ("tall",), (), ("tall",)]
    assert not any(record.clipped for record in watch.history(4))


def test_a_skipping_rule_drops_the_step_and_names_itself(task, attach):
    optimizer = sgd(task)
    policy = {"version": 1, "clip": [{"limit": 10.0, "then": "skip", "name": "too-tall"}]}
    watch = attach(task.model, optimizer, policy)
    before = task.parameters()
    task.gradient(0, 1000.0)
    optimizer.step()
    assert watch.skipped == "too-tall"
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert watch.latest.skipped == "too-tall"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"guard": {"nonfinite": "stop"}}, "the gradient is not finite"),
        ({"guard": {"patience": 2}}, "3 steps skipped in a row"),
        ({"guard": {"budget": "2/100"}}, "3 of the last 100 steps skipped"),
        ({"clip": [{"limit": 1e-9, "then": "stop", "name": "enough"}]}, "rule enough is over"),
    ],
    ids=["guard", "patience", "budget", "rule"],
)
def test_stop_raises_before_the_update_and_is_recorded(task, attach, policy, reason):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, {"version": 1, **policy})
    before = task.parameters()

    def train() -> None:
        for step in range(5):
            task.gradient(step)
            task.model.head.bias.grad[0] = torch.nan
            optimizer.step()

    with pytest.raises(gradwatch.TrainingStopped, match=reason) as stopped:
        train()
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert watch.latest.step == stopped.value.step


def test_shadow_mode_decides_and_touches_nothing(task, attach):
    other = task.copy()
    optimizer, plain = sgd(task), sgd(other)
    policy = {"version": 1, "mode": "shadow", "clip": [{"limit": 1.0}]}
    watch = attach(task.model, optimizer, policy)
    for step in range(5):
        task.gradient(step, 50.0)
        optimizer.step()
        other.gradient(step, 50.0)
        plain.step()
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True)
    )
    assert all(record.clipped for record in watch.history(5))
    assert not watch.enforcing


def test_gradients_beyond_float32_are_clipped_not_lost(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0)
    for parameter in task.model.parameters():
        parameter.grad.mul_(1e22)
    optimizer.step()
    assert watch.skipped is None
    assert true_norm(task.model) == pytest.approx(1.0, rel=1e-5)
