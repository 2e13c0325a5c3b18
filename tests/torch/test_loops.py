"""Every kind of loop and parameter, and what is refused with the way out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradwatch

CLIP = {"version": 1, "clip": [{"limit": 0.5, "eps": 0}]}


def reference(parameters) -> float:
    """The norm of all gradients in float64."""
    grads = [p.grad for p in parameters if p.grad is not None]
    dense = [g.to_dense() if g.layout != torch.strided else g for g in grads]
    wide = [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in dense]
    return math.sqrt(sum(float(g.abs().square().sum()) for g in wide))


def module_of(*tensors: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_parameter(f"w{i}", torch.nn.Parameter(tensor))
    return module


class TestClosures:
    def test_lbfgs_is_observed_at_the_gradient_that_each_step_begins_with(self, task, attach):
        other = task.copy()
        optimizer = torch.optim.LBFGS(task.model.parameters(), max_iter=5)
        plain = torch.optim.LBFGS(other.model.parameters(), max_iter=5)
        watch = attach(task.model, optimizer)
        firsts: list[float] = []

        def closure(one, seen: list[float]) -> Callable[[], torch.Tensor]:
            def evaluate() -> torch.Tensor:
                loss = one.gradient(0)
                seen.append(reference(one.model.parameters()))
                return loss

            return evaluate

        for _ in range(3):
            seen: list[float] = []
            optimizer.step(closure(task, seen))
            plain.step(closure(other, []))
            assert len(seen) > 1
            firsts.append(seen[0])
            watch.log(index=len(firsts) - 1)
        assert [r.total_norm for r in watch.history(9)] == pytest.approx(firsts, rel=1e-6)
        assert [r.micro_batches for r in watch.history(9)] == [1, 1, 1]
        assert [r.scalars for r in watch.history(9)] == [{"index": i} for i in range(3)]
        pairs = zip(task.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_a_policy_that_would_change_its_line_search_is_refused(self, task, attach):
        optimizer = torch.optim.LBFGS(task.model.parameters())
        with pytest.raises(gradwatch.AttachError, match="mode: shadow"):
            attach(task.model, optimizer, CLIP)
        attach(task.model, optimizer, {**CLIP, "mode": "shadow"})

    @pytest.mark.parametrize("by_name", [True, False])
    def test_a_closure_is_clipped_after_its_backward(self, task, attach, by_name):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
        watch = attach(task.model, optimizer, CLIP)
        evaluate = lambda: task.gradient(0, 100.0)  # noqa: E731
        optimizer.step(closure=evaluate) if by_name else optimizer.step(evaluate)
        assert reference(task.model.parameters()) == pytest.approx(0.5, rel=1e-6)
        assert watch.latest.clipped


class TestSeveralOptimizers:
    def test_each_has_a_watch_of_its_own_parameters(self, task, attach):
        encoder = [*task.model.embed.parameters(), *task.model.conv.parameters()]
        decoder = [*task.model.norm.parameters(), *task.model.head.parameters()]
        first, second = torch.optim.SGD(encoder, lr=0.1), torch.optim.AdamW(decoder)
        watches = attach(task.model, first, CLIP), attach(task.model, second)
        for step in range(3):
            task.gradient(step, 100.0)
            expected = reference(encoder), reference(decoder)
            first.step()
            second.step()
            found = tuple(watch.latest.total_norm for watch in watches)
            assert found == pytest.approx(expected, rel=1e-6)
        assert watches[0].info.layout.layers == ("embed", "conv")
        assert watches[1].info.layout.layers == ("norm", "head")

    def test_an_optimizer_inside_a_wrapper_is_found(self, task, attach):
        class Wrapper:
            def __init__(self, optimizer):
                self.optimizer = optimizer

            def step(self):
                self.optimizer.step()

        wrapper = Wrapper(Wrapper(torch.optim.SGD(task.model.parameters(), lr=0.1)))
        watch = attach(task.model, wrapper, CLIP)
        task.gradient(0)
        wrapper.step()
        assert watch.latest.step == 0


KINDS = {
    "float64": lambda: (torch.randn(8, dtype=torch.float64), torch.float64),
    "float16": lambda: (torch.randn(8).half() * 100, torch.float16),
    "bfloat16": lambda: (torch.randn(8).bfloat16(), torch.bfloat16),
    "complex64": lambda: (torch.randn(8, dtype=torch.complex64), torch.complex64),
    "conjugated": lambda: (torch.randn(8, dtype=torch.complex64).conj(), torch.complex64),
    "0-d": lambda: (torch.randn(()), torch.float32),
    "strided": lambda: (torch.randn(8, 8).t(), torch.float32),
    "channels last": lambda: (
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.float32,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_any_kind_is_measured_and_clipped(attach, kind):
    torch.manual_seed(0)
    grad, dtype = KINDS[kind]()
    model = module_of(torch.zeros(grad.shape, dtype=dtype), torch.zeros(4), torch.zeros(0))
    for parameter, value in zip(
        model.parameters(), (grad, torch.randn(4), torch.zeros(0)), strict=True
    ):
        parameter.grad = value
    before = reference(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, {"version": 1, "clip": [{"limit": before / 3, "eps": 0}]})
    optimizer.step()
    coarse = {"float16": 1e-3, "bfloat16": 1e-2}.get(kind, 1e-6)  # the grain of the dtype
    assert watch.latest.total_norm == pytest.approx(before, rel=1e-6)
    assert reference(model.parameters()) == pytest.approx(before / 3, rel=coarse)


def test_a_half_precision_norm_beyond_its_dtype_is_finite(attach):
    model = module_of(torch.zeros(100, dtype=torch.float16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer)
    model.w0.grad = torch.full((100,), 60000.0, dtype=torch.float16)
    optimizer.step()
    assert watch.latest.total_norm == pytest.approx(60000 * 10, rel=1e-6)


class Sparse(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4, sparse=True)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)).sum()


def train_sparse(model: Sparse, optimizer: torch.optim.Optimizer) -> None:
    for step in range(20):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randint(0, 10, (30,))).backward()
        optimizer.step()


def sparse_pair() -> tuple[Sparse, Sparse]:
    torch.manual_seed(0)
    first, second = Sparse(), Sparse()
    second.load_state_dict(first.state_dict())
    return first, second


def test_a_sparse_gradient_is_clipped_by_its_true_norm(attach):
    model, _ = sparse_pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = attach(model, optimizer, CLIP)
    model(torch.tensor([1, 1, 1, 2])).backward()
    before = reference(model.parameters())
    optimizer.step()
    assert watch.latest.total_norm == pytest.approx(before, rel=1e-6)
    assert reference(model.parameters()) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("policy", [None, {**CLIP, "mode": "shadow"}])
def test_looking_at_sparse_gradients_changes_no_bit_of_training(attach, policy):
    watched, plain = sparse_pair()
    optimizer = torch.optim.SGD(watched.parameters(), lr=0.1, momentum=0.9)
    attach(watched, optimizer, policy)
    train_sparse(watched, optimizer)
    train_sparse(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    pairs = zip(watched.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class TestParametersThatComeAndGo:
    def test_a_layer_that_is_frozen_and_thawed_keeps_its_label(self, task, attach):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        watch = attach(task.model, optimizer, CLIP)
        for step in range(6):
            task.model.embed.requires_grad_(step not in (2, 3))
            optimizer.zero_grad()
            task.model.zero_grad = lambda: None
            task.gradient(step)
            optimizer.step()
        present = [bool(record.present_P[0]) for record in watch.history(6)]
        assert present == [True, True, False, False, True, True]
        assert {record.micro_batches for record in watch.history(6)} == {1}

    def test_a_parameter_that_is_added_is_clipped_and_skipped_with_the_others(
        self, task, attach, caplog
    ):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        policy = {"version": 1, "clip": [{"limit": 1.0, "eps": 0}]}
        watch = attach(task.model, optimizer, policy)
        task.gradient(0)
        optimizer.step()
        task.model.extra = torch.nn.Linear(2, 1, bias=False)
        optimizer.add_param_group({"params": task.model.extra.parameters()})
        task.gradient(1)
        task.model.extra.weight.grad = torch.full((1, 2), 1e6)
        before = reference(task.model.parameters())
        optimizer.step()
        assert watch.latest.total_norm == pytest.approx(before, rel=1e-6)
        assert reference(task.model.parameters()) == pytest.approx(1.0, rel=1e-6)
        assert len(watch.latest.tensor_norms_P) == 7
        assert caplog.text.count("were added to the optimizer, extra.weight first") == 1

        task.gradient(2)
        task.model.extra.weight.grad = torch.full((1, 2), math.nan)
        kept = task.parameters()
        optimizer.step()
        assert watch.skipped == "nonfinite"
        assert all(torch.equal(a, b) for a, b in zip(kept, task.parameters(), strict=True))

    def test_gradients_that_are_zeroed_in_place_are_zeros(self, task, attach):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        watch = attach(task.model, optimizer)
        task.gradient(0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        task.model.head.weight.grad.fill_(1.0)
        optimizer.step()
        assert watch.latest.total_norm == pytest.approx(math.sqrt(80))
        assert watch.latest.present_P.all()

    def test_a_step_without_any_gradient_is_a_step(self, task, attach):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        watch = attach(task.model, optimizer, CLIP)
        optimizer.step()
        assert watch.latest.total_norm == 0
        assert not watch.latest.present_P.any()


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant).relu()
        return x.sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_measured_once(attach, reentrant):
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8, requires_grad=True)).backward()
        before = reference(model.parameters())
        optimizer.step()
        assert watch.latest.total_norm == pytest.approx(before, rel=1e-6)
    assert [record.micro_batches for record in watch.history(2)] == [1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_and_a_compiled_step_are_measured_under_plain_names(task, attach):
    model = torch.compile(task.model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = attach(model, optimizer, CLIP)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for i in range(3):
        task.model.zero_grad()
        model(torch.randint(0, 20, (8, 6))).sum().backward()
        before = reference(task.model.parameters())
        step()
        assert watch.latest.total_norm == pytest.approx(before, rel=1e-6)
        assert watch.latest.step == i
    assert watch.info.layout.layers == ("embed", "conv", "norm", "head")


def test_a_step_on_another_thread_is_a_step(task, attach):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert watch.latest.step == 0


@pytest.mark.parametrize("rate", [None, "auto", torch.ones(3)])
def test_an_optimizer_that_finds_its_own_learning_rate_is_watched(task, attach, rate):
    watch = attach(task.model, None, CLIP)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch._optimizer = optimizer
    optimizer.param_groups[0]["lr"] = rate
    watch._num_known = 7
    task.gradient(0)
    watch.process()
    assert math.isnan(watch.latest.learning_rate)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_a_gradient_of_zeros_changes_no_bit_of_clipping(task, attach, optimizer):
    other = task.copy()
    make = getattr(torch.optim, optimizer)
    ours, theirs = make(task.model.parameters()), make(other.model.parameters())
    attach(task.model, ours, {"version": 1, "clip": [{"limit": 1.0}]})
    for step in range(20):
        for one in (task, other):
            one.gradient(step, 10.0)
            one.model.norm.bias.grad.zero_()
        ours.step()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        theirs.step()
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class TestRefused:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_an_optimizer_inside_the_backward_pass(self, task, attach):
        from torch.distributed.optim import _apply_optimizer_in_backward

        _apply_optimizer_in_backward(torch.optim.SGD, task.model.parameters(), {"lr": 0.1})
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        with pytest.raises(
            gradwatch.AttachError, match=r"embed\.weight is updated inside the back"
        ):
            attach(task.model, optimizer)

    def test_what_is_left_on_the_meta_device(self, attach):
        model = torch.nn.Linear(2, 2, device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(gradwatch.AttachError, match="weight is on the meta device"):
            attach(model, optimizer)

    def test_parameters_without_a_shape(self, attach):
        model = torch.nn.LazyLinear(2)
        with pytest.raises(gradwatch.AttachError, match="Run one batch through the model first"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def test_an_engine_with_flat_buffers(self, attach):
        engine = type("DeepSpeedEngine", (torch.nn.Linear,), {"__module__": "deepspeed.runtime"})
        model = engine(2, 2)
        with pytest.raises(gradwatch.AttachError, match="deepspeed's DeepSpeedEngine keeps grad"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def test_a_flat_parameter(self, attach):
        flat = type("FlatParameter", (torch.nn.Parameter,), {})
        model = torch.nn.Module()
        model.register_parameter("flat", flat(torch.zeros(4)))
        with pytest.raises(gradwatch.AttachError, match="Use fully_shard"):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def test_more_rules_than_a_recording_can_tell_apart(self, task, attach):
        rules = [{"limit": 1.0, "then": "warn"}] * 64
        with pytest.raises(gradwatch.PolicyError, match="at most 63 rules"):
            attach(task.model, None, {"version": 1, "clip": rules})
        watch = attach(task.model, None, {"version": 1, "clip": rules[:63]})
        task.gradient(0, 1e3)
        watch.process()
        assert len(watch.latest.fired) == 63
        assert np.isfinite(watch.latest.total_norm)


@pytest.mark.parametrize("on_error", ["stop", "observe"])
def test_an_added_parameter_that_cannot_be_watched_is_a_failure_of_ours(
    task, attach, on_error, caplog
):
    policy = {"version": 1, "guard": {"on_error": on_error}, "clip": [{"limit": 1.0}]}
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, policy)
    task.model.extra = torch.nn.Linear(2, 2, device="meta")
    task.gradient(0)
    optimizer.add_param_group({"params": task.model.extra.parameters()})
    if on_error == "stop":
        with pytest.raises(gradwatch.TrainingStopped, match=r"extra.weight is on the meta device"):
            optimizer.step()
        return
    optimizer.step()
    assert "they are neither watched nor clipped" in caplog.text
    assert watch.latest.step == 0
