"""A saved and restored run equals the one that was never interrupted."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

import gradwatch

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
        {"name": "scheduled", "limit": {0: 10, 40: 1}},
    ],
}  # fmt: skip


def adam(task):
    return torch.optim.AdamW(task.model.parameters(), lr=1e-2)


def run(task, optimizer, steps: range) -> None:
    for step in steps:
        task.gradient(step, 200.0 if step in (13, 33) else 1.0)
        if step in (17, 31):
            task.model.head.bias.grad[0] = math.nan
        optimizer.step()


def test_a_restored_run_goes_on_to_the_bit(task, attach):
    other = task.copy()
    whole, part = adam(task), adam(other)
    watch = attach(task.model, whole, POLICY)
    run(task, whole, range(50))

    first = attach(other.model, part, POLICY)
    run(other, part, range(25))
    checkpoint = io.BytesIO()
    parts = {"model": other.model, "optimizer": part, "gradwatch": first}
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    first.close()
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    fresh = task.copy()
    fresh.model.load_state_dict(saved["model"])
    resumed = adam(fresh)
    resumed.load_state_dict(saved["optimizer"])
    second = attach(fresh.model, resumed, POLICY)
    second.load_state_dict(saved["gradwatch"])
    run(fresh, resumed, range(25, 50))

    pairs = zip(task.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for record, expected in zip(second.history(25), watch.history(25), strict=True):
        assert record.step == expected.step
        assert record.limits == expected.limits
        assert (record.fired, record.skipped) == (expected.fired, expected.skipped)
    assert any(record.clipped for record in second.history(25))
    assert {record.skipped for record in watch.history(50)} == {None, "nonfinite", "spikes"}


def test_the_state_is_plain_values_and_arrays(task, attach):
    optimizer = adam(task)
    watch = attach(task.model, optimizer, POLICY)
    run(task, optimizer, range(15))

    def leaves(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for one in value.values():
                yield from leaves(one)
        elif isinstance(value, list):
            for one in value:
                yield from leaves(one)
        else:
            yield value

    kinds = {type(leaf) for leaf in leaves(watch.state_dict())}
    assert kinds <= {int, float, str, bool, torch.Tensor}


def test_histories_are_found_again_by_the_names_of_rules_and_units(task, attach, caplog):
    optimizer = adam(task)
    watch = attach(task.model, optimizer, POLICY)
    run(task, optimizer, range(20))
    state = watch.state_dict()
    watch.close()
    rules = [{**POLICY["clip"][1]}, {"name": "new", "limit": {"z": 3}}, {**POLICY["clip"][0]}]
    second = attach(task.model, adam(task), {"version": 1, "clip": rules})
    second.load_state_dict(state)
    assert "the histories of new were not saved" in caplog.text
    task.gradient(21)
    second.process()
    limits = second.latest.limits
    assert limits["layers"] < math.inf
    assert limits["adaptive"] < math.inf
    assert limits["new"] == math.inf


@pytest.mark.parametrize("per", ["all", "group", "layer", "tensor"])
def test_a_scope_of_one_unit_learns_like_the_whole(attach, per):
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = {"version": 1, "clip": [{"per": per, "limit": {"z": 4, "warmup": 3}}]}
    watch = attach(model, optimizer, policy)
    for norm in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        model.weight.grad = torch.full((1, 4), norm / 2)
        optimizer.step()
    assert [record.clipped for record in watch.history(9)] == [False] * 4 + [True, False]
    state = watch.state_dict()
    watch.close()
    second = attach(model, optimizer, policy)
    second.load_state_dict(state)
    model.weight.grad = torch.full((1, 4), 25.0)
    optimizer.step()
    assert second.latest.clipped


def test_a_callback_may_save_the_state(task, attach):
    optimizer = adam(task)
    watch = attach(task.model, optimizer, POLICY)
    saved: list[dict] = []
    watch.on_anomaly(lambda _: saved.append(watch.state_dict()))
    run(task, optimizer, range(20))
    watch.flush()
    assert saved[0]["version"] == 1


def test_a_state_of_another_version_is_refused(task, attach):
    watch = attach(task.model, adam(task), POLICY)
    with pytest.raises(gradwatch.GradwatchError, match=r"must be of version 1\. Received: 7"):
        watch.load_state_dict({"version": 7})


def test_a_checkpoint_in_the_middle_of_a_window_is_refused(task, attach):
    optimizer = adam(task)
    watch = attach(task.model, optimizer, {"version": 1, "accumulate": {"steps": 4}})
    task.gradient(0)
    optimizer.step()
    with pytest.raises(gradwatch.GradwatchError, match="1 of 4 micro-batches are accumulated"):
        watch.state_dict()


def test_the_limit_that_was_in_force_is_recorded_and_holds(task, attach):
    optimizer = adam(task)
    watch = attach(
        task.model, optimizer, {"version": 1, "clip": [{"limit": {"z": 4, "warmup": 10}}]}
    )
    run(task, optimizer, range(13))
    task.gradient(13, 500.0)
    optimizer.step()
    record = watch.latest
    assert record.clipped
    assert record.total_norm_clipped == pytest.approx(record.limits["global"], rel=1e-6)
    assert record.total_norm > 50 * record.total_norm_clipped


def test_making_an_optimizer_ready_for_a_checkpoint_is_no_step(task, attach):
    """Of no micro-batch either: the state that is to be loaded into must be there."""
    optimizer = adam(task)
    watch = attach(task.model, optimizer, {"version": 1, "accumulate": {"steps": 4}})
    _, state = get_state_dict(task.model, optimizer)
    assert watch.latest is None
    assert set(state["state"]) == {name for name, _ in task.model.named_parameters()}
    for step in range(4):
        task.gradient(step)
        optimizer.step()
    assert watch.latest.step == 0
    assert watch.latest.micro_batches == 4
