"""What norms do not tell, sampled in some steps, against all elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.records import SAMPLES
from gradwatch.torch.gradients import gather
from gradwatch.torch.sampling import BUDGET, WIDTH, Sampler


def sample(parameters, change, loss_scale=math.nan):
    """By name [P]: what a sampler says of a step that `change` makes."""
    sampler = Sampler(parameters)
    sampler.before(gather(parameters), loss_scale)
    change()
    return dict(zip(SAMPLES, sampler.after().tolist(), strict=True))


def parameters(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def moved(params, by):
    def change():
        with torch.no_grad():
            for parameter in params:
                parameter += by * parameter.grad

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_tensors_are_taken_whole(dtype):
    params = parameters((3, 4), (7,), (), dtype=dtype)
    params[0].grad[0] = 0
    params[1].grad[:6] = 0
    before = [p.detach().double().clone() for p in params]
    found = sample(params, moved(params, 0.1))
    assert found["zero_share"] == pytest.approx([1 / 3, 6 / 7, 0.0])
    assert found["weight_norm"] == pytest.approx([float(w.norm()) for w in before], rel=1e-6)
    change = [(p.detach().double() - w).norm() for p, w in zip(params, before, strict=True)]
    assert found["update_norm"] == pytest.approx([float(c) for c in change], rel=1e-5)
    assert found["unchanged_share"] == [0.0, 0.0, 0.0]
    assert np.isnan(found["flushed_share"]).all()


@pytest.mark.parametrize("shape", [(300, 1000), (64, 32, 3, 3), (1_000_000,), (1024, 1024)])
def test_large_tensors_are_estimated_from_a_sample(shape):
    (param,) = params = parameters(shape)
    param.grad[torch.rand(shape) < 0.4] = 0
    before = param.detach().clone()
    found = sample(params, moved(params, 0.01))
    assert found["zero_share"][0] == pytest.approx(0.4, abs=0.06)
    assert found["weight_norm"][0] == pytest.approx(float(before.norm()), rel=0.1)
    assert found["update_norm"][0] == pytest.approx(
        float((param.detach() - before).norm()), rel=0.1
    )


def test_a_column_that_is_zero_is_not_all_that_is_looked_at():
    (param,) = params = parameters((4096, 512))
    param.grad[:, 1:] = 0
    assert sample(params, lambda: None)["zero_share"][0] > 0.99
    param.grad[:, 0] = 0
    param.grad[:, 1:] = 1
    assert sample(params, lambda: None)["zero_share"][0] < 0.01


def test_weights_whose_precision_swallows_the_update_are_counted():
    params = parameters((64, 64), dtype=torch.bfloat16)
    params[0].grad[32:] = 0
    with torch.no_grad():
        params[0].fill_(1.0)
        params[0].grad[:32] = 1.0
        params[0].grad[:8] = 100.0
    found = sample(params, moved(params, 1e-4))
    assert found["unchanged_share"] == pytest.approx(
        [0.75], abs=0.01
    )  # 24 of the 32 rows with a gradient


def test_what_float16_would_flush_is_counted_at_the_loss_scale():
    (param,) = params = parameters((100,))
    param.grad.fill_(1e-9)
    param.grad[:25] = 1e-3
    param.grad[25:50] = 0.0
    assert sample(params, lambda: None, 1.0)["flushed_share"] == pytest.approx([0.75])
    assert sample(params, lambda: None, 2.0**16)["flushed_share"] == [0.25]


def test_a_gradient_that_is_laid_out_otherwise_is_compared_with_its_own_weights():
    (param,) = params = parameters((8, 6, 4, 4))
    param.grad = torch.zeros(8, 6, 4, 4).to(memory_format=torch.channels_last)
    param.grad[0] = 1.0

    def change():
        with torch.no_grad():
            param[0] += 1.0

    assert sample(params, change)["unchanged_share"] == [0.0]


def test_nothing_is_said_of_a_parameter_without_a_gradient_or_with_a_sparse_one():
    params = parameters((3, 3), (3, 3))
    params[0].grad = None
    embedding = torch.nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    found = sample([*params, embedding.weight], lambda: None)
    for values in found.values():
        assert math.isnan(values[0])
        assert math.isnan(values[2])
    assert found["zero_share"][1] == 0.0


def test_empty_complex_and_strided_parameters_are_no_trouble():
    params = parameters((0, 3), (4, 4))
    params.append(torch.nn.Parameter(torch.randn(5, dtype=torch.complex64)))
    params[2].grad = torch.ones_like(params[2]).conj()
    params.append(torch.nn.Parameter(torch.randn(8, 8)[::2, ::2]))
    params[3].grad = torch.ones(4, 4)
    found = sample(params, moved(params[1:], 0.5))
    assert math.isnan(found["zero_share"][0])
    assert found["zero_share"][2] == pytest.approx(0.5)  # imaginary parts
    assert found["update_norm"][3] == pytest.approx(2.0)


def test_a_sample_that_fails_costs_nothing_else(task, attach, monkeypatch):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 1e-3}]})
    monkeypatch.setattr(watch._backend, "sample", lambda *_: 1 / 0)
    task.gradient(0)
    optimizer.step()
    assert watch.latest.total_norm_clipped == pytest.approx(1e-3, rel=1e-2)
    errors = watch.pipeline.tally.snapshot().labelled["hook_errors_total"]
    assert errors["measure",] == 1


def test_many_tensors_share_what_is_taken():
    params = parameters(*[(40, 50)] * 2000)
    sampler = Sampler(params)
    assert sampler._gradient.numel() <= BUDGET
    assert Sampler(params[:2])._gradient.shape[1] <= WIDTH


def test_weights_that_are_moved_to_other_memory_are_followed():
    params = parameters((4, 4))
    sampler = Sampler(params)
    for _ in range(2):
        sampler.before(gather(params), math.nan)
        moved(params, 1.0)()
        assert sampler.after()[3].item() == pytest.approx(float(params[0].grad.norm()), rel=1e-5)
        params[0].data = params[0].data.clone()


def test_a_record_of_every_tenth_step_holds_a_sample(task, attach, tmp_path):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, recording=tmp_path)
    before, expected = task.parameters(), {}
    for step in range(25):
        task.gradient(step)
        optimizer.step()
        after = task.parameters()
        if step % 10 == 0:
            expected[step] = [float((b - a).norm()) for a, b in zip(before, after, strict=True)]
        before = after
    watch.close()
    with gradwatch.open_recording(tmp_path) as recording:
        records = list(recording)
    assert {r.step for r in records if r.samples} == {0, 10, 20}
    for step, norms in expected.items():
        assert records[step].samples["update_norm"].tolist() == pytest.approx(norms, rel=1e-4)
        assert records[step].update_ratios.shape == (len(records[step].layers),)


def test_a_step_that_is_skipped_has_no_sample(task, attach):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, {"version": 1, "detect": {"every": 1}})
    for step in range(4):
        task.gradient(step)
        if step == 2:
            task.model.head.bias.grad[0] = math.nan
        optimizer.step()
    watch.flush()
    handled = watch.pipeline.consumer.finished()
    assert [bool(handled[step].samples) for step in range(4)] == [True, True, False, True]


def test_without_a_detector_that_needs_one_no_sample_is_taken(task, attach):
    kinds = ("dead", "stalled_update", "oversized_update", "underflow", "swallowed_update")
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    policy = {"version": 1, "detect": dict.fromkeys(kinds, "none")}
    watch = attach(task.model, optimizer, policy)
    task.gradient(0)
    optimizer.step()
    assert watch._backend._sampler is None


def test_sampling_leaves_training_bit_identical(task, attach):
    ours, theirs = task, task.copy()
    optimizers = [torch.optim.AdamW(t.model.parameters(), lr=1e-2) for t in (ours, theirs)]
    attach(ours.model, optimizers[0], {"version": 1, "detect": {"every": 1}})
    for step in range(20):
        for t, optimizer in zip((ours, theirs), optimizers, strict=True):
            t.gradient(step)
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("device", ["meta"])
def test_no_sample_waits_for_a_device(device):
    params = [torch.nn.Parameter(torch.empty(3, 4, device=device))]
    params[0].grad = torch.empty(3, 4, device=device)
    sampler = Sampler(params)
    sampler.before(gather(params), 8.0)
    assert sampler.after().device.type == device
