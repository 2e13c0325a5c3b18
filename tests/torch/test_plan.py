"""What a decision costs: each row of the plan, and that the rows without a read read nothing.

On the meta device there are no values, so whatever reads one raises. What would arrive from an
accelerator is injected.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.backend import Agreed, StepContext
from gradwatch.engine import Engine
from gradwatch.errors import TrainingStopped
from gradwatch.policy import load_policy
from gradwatch.recorder import Recorder
from gradwatch.recording.ring import Ring
from gradwatch.records import Layout, Parameter, RunInfo
from gradwatch.rules.chain import measures_of
from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.plan import Plan, plan_for
from gradwatch.torch.readback import Readback

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)}
LAYOUT = Layout.of([Parameter(name=name, shape=shape) for name, shape in SHAPES.items()])
FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
CLIP = [{"limit": 1.0}]
SKIP = [{"limit": 1.0}, {"limit": 50.0, "then": "skip", "name": "spike"}]
LEARNING = [
    {"limit": {"z": 4, "warmup": 2}},
    {"limit": {"z": 3, "space": "raw", "warmup": 1, "to": "reciprocal"}, "name": "nearer"},
    {"per": "layer", "limit": {"ratio": 2, "warmup": 1}},
    {"limit": {"quantile": 0.9, "window": 4, "warmup": 2}, "then": "warn", "name": "told"},
]
PER_UNIT = [
    {"per": "unit", "measure": "weight", "limit": 0.1, "floor": 0.5},
    {"per": "unit", "limit": {"ratio": 1.5, "warmup": 2}, "name": "learning"},
    {"per": "tensor", "measure": "weight", "limit": 1.0, "floor": 0.2},
    {"measure": "update", "limit": 1e9, "then": "warn", "name": "told"},
    {"measure": "loss", "limit": 1e9, "then": "skip", "name": "loss"},
]
PER_LAYER = [{"limit": 1.0, "per": "layer"}, {"per": "element", "limit": 0.1}]


def policy(clip, **guard):
    return load_policy({"version": 1, "clip": clip, "guard": {"nonfinite": "none", **guard}})


def parameters(device: str = "meta") -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in SHAPES.values()]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


class Injected:
    """A readback that is told what arrives, and keeps it for `lag` steps."""

    def __init__(self, lag: int = 1) -> None:
        self.sent: list[torch.Tensor] = []
        self.lag = lag
        self._under_way: deque = deque()

    def send(self, vector, what) -> None:
        self.sent.append(vector)
        real = np.ones(vector.shape) if vector.device.type == "meta" else vector.numpy().copy()
        self._under_way.append((real, what))

    def arrived(self, *, wait: bool):
        while self._under_way and (wait or len(self._under_way) > self.lag):
            yield self._under_way.popleft()


def engine_on(tensors, optimizer, a_policy, readback, plan: Plan | None = None):
    plan = plan or plan_for(a_policy, LAYOUT, optimizer, tensors)
    backend = TorchBackend(tensors, optimizer, plan, readback)
    info = RunInfo(
        run="r",
        layout=LAYOUT,
        rules=tuple(rule.name for rule in a_policy.clip),
        measures=measures_of(a_policy),
    )
    failures: list[str] = []
    recorder = Recorder(Ring(info, None), lambda: None)
    engine = Engine(info, a_policy, backend, recorder, failures.append)
    return engine, backend, failures


ROWS = {
    "observing": (None, "adamw", (False, False)),
    "fused, one scale": (policy(CLIP, nonfinite="skip"), "adamw", (False, True)),
    "fused, one scale, a rule skips": (policy(SKIP, nonfinite="skip"), "momentum", (False, True)),
    "fused, a scale for each": (policy(PER_LAYER, nonfinite="skip"), "adamw", (False, True)),
    "fused, limits that learn": (policy(LEARNING, nonfinite="skip"), "adamw", (False, True)),
    "fused, units, weights, updates and losses": (
        policy(PER_UNIT, nonfinite="skip"), "adamw", (False, True),
    ),
    "fused, all of a history": (
        policy([{"limit": {"quantile": 0.9, "window": "all"}}], nonfinite="skip"),
        "adamw",
        (True, True),
    ),
    "not fused, nothing needs the host": (policy(CLIP), None, (False, False)),
    "not fused, a scale for each": (policy(PER_LAYER), None, (False, False)),
    "not fused, with skip": (policy(CLIP, nonfinite="skip"), None, (True, False)),
    "not fused, a rule skips": (policy(SKIP), None, (True, False)),
    "fused, with stop": (policy(CLIP, nonfinite="stop"), "adamw", (True, True)),
    "fused, a rule stops": (
        policy([{"limit": 1.0, "then": "stop"}], nonfinite="skip"), "adamw", (True, True),
    ),
    "fused, with zero": (policy(CLIP, nonfinite="zero"), "adamw", (True, True)),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_the_plan_of_each_row_on_an_accelerator(row):
    a_policy, name, (reads, fused) = ROWS[row]
    tensors = parameters()
    optimizer = FUSED[name](tensors) if name else torch.optim.RMSprop(tensors)
    plan = plan_for(a_policy or load_policy(None), LAYOUT, optimizer, tensors)
    assert (plan.reads_host, plan.fused) == (reads, fused)
    assert plan.on_accelerator
    assert bool(plan.reason) is reads


@pytest.mark.parametrize("row", [row for row, (_, _, (reads, _)) in ROWS.items() if not reads])
def test_measuring_deciding_and_applying_read_nothing(row):
    a_policy, name, _ = ROWS[row]
    tensors = parameters()
    optimizer = FUSED[name](tensors) if name else torch.optim.RMSprop(tensors)
    readback = Injected()
    engine, backend, failures = engine_on(
        tensors, optimizer, a_policy or load_policy(None), readback
    )
    engine.samples.every = 1
    for _ in range(3):
        with torch.no_grad():
            engine.step(StepContext())
        backend.disarm()
        engine.stepped()
    assert failures == []
    assert len(readback.sent) == 6  # a decision and a sample each
    assert {vector.device.type for vector in readback.sent} == {"meta"}
    engine.catch_up(wait=True)
    assert [record.step for record in engine._recorder.newest(9)] == [0, 1, 2]


def test_with_a_loss_scale_that_is_on_the_device_nothing_is_read_either():
    tensors = parameters()
    optimizer = FUSED["adamw"](tensors)
    optimizer.grad_scale = torch.ones((), device="meta")
    optimizer.found_inf = torch.ones((), device="meta")
    readback = Injected()
    engine, _, failures = engine_on(tensors, optimizer, policy(SKIP, nonfinite="skip"), readback)
    with torch.no_grad():
        engine.step(StepContext(factor=1.5))
    assert failures == []
    assert len(readback.sent) == 1


def test_a_read_on_the_meta_device_is_noticed():
    """The proof above can fail."""
    tensors = parameters()
    plan = Plan(reads_host=True, fused=False, one_scale=True, on_accelerator=True, reason="test")
    engine, _, failures = engine_on(tensors, None, policy(CLIP), Injected(), plan)
    with torch.no_grad():
        engine.step(StepContext())
    assert failures


def unread(fused: bool, one_scale: bool = True) -> Plan:
    return Plan(reads_host=False, fused=fused, one_scale=one_scale, on_accelerator=True)


def gradients_of(seed: int, gain: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * gain for shape in SHAPES.values()]


STEPS = [(0, 0.1), (1, 10.0), (2, 1e3), (3, math.nan), (4, 1.0), (5, 20.0), (6, 0.2)]


@pytest.mark.parametrize("lag", [0, 1, 2, 9])
@pytest.mark.parametrize("clip", ["CLIP", "SKIP", "PER_LAYER", "LEARNING", "PER_UNIT"])
@pytest.mark.parametrize("name", FUSED)
def test_deciding_unread_does_what_deciding_on_the_host_does(name, clip, lag):
    """The same steps on both ways: same parameters, same records, in order."""
    rules = globals()[clip]
    if name == "momentum":  # it has no second moments
        rules = [rule for rule in rules if rule.get("measure") != "update"]
    a_policy = policy(rules, nonfinite="skip")
    runs = []
    for plan in (unread(True, one_scale=clip in ("CLIP", "SKIP")), None):
        tensors = parameters("cpu")
        optimizer = FUSED[name](tensors)
        engine, backend, failures = engine_on(tensors, optimizer, a_policy, Injected(lag), plan)
        engine.samples.every = 2
        for seed, gain in STEPS:
            for parameter, grad in zip(tensors, gradients_of(seed, gain), strict=True):
                parameter.grad = grad
            with torch.no_grad():
                engine.step(StepContext())
            optimizer.step()
            backend.disarm()
            engine.stepped()
        engine.catch_up(wait=True)
        assert failures == []
        runs.append((tensors, engine._recorder.newest(99), dict(engine._recorder.samples)))
    (ours, unread_records, samples), (theirs, read_records, expected) = runs
    assert list(samples) == [0, 2, 4, 6]
    # Unread a skipped step is sampled too; the consumer drops that sample by its record.
    assert list(expected) == [step for step in samples if read_records[step].skipped is None]
    for step, values in expected.items():
        np.testing.assert_allclose(samples[step], values, rtol=1e-4, atol=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert [r.step for r in unread_records] == list(range(len(STEPS)))
    for mine, other in zip(unread_records, read_records, strict=True):
        assert mine.skipped == other.skipped
        assert mine.fired == other.fired
        assert mine.clipped == other.clipped
        assert mine.limits == pytest.approx(other.limits, rel=1e-6)
        np.testing.assert_allclose(mine.tensor_coefs_P, other.tensor_coefs_P, rtol=1e-6)
        np.testing.assert_allclose(mine.tensor_norms_P, other.tensor_norms_P, rtol=1e-6)
        assert mine.measures.keys() == other.measures.keys()
        for name, values in mine.measures.items():
            np.testing.assert_allclose(values, other.measures[name], rtol=1e-6, err_msg=name)


def test_a_norm_that_leaves_float32_is_skipped_where_the_host_cannot_look_again():
    tensors = parameters("cpu")
    optimizer = FUSED["adamw"](tensors)
    a_policy = policy(CLIP, nonfinite="skip")
    engine, backend, _ = engine_on(tensors, optimizer, a_policy, Injected(), unread(True))
    for parameter in tensors:
        parameter.grad = torch.full_like(parameter, 1e30)
    with torch.no_grad():
        engine.step(StepContext())
    optimizer.step()
    backend.disarm()
    assert engine.skipped == "nonfinite"
    assert not any(parameter.any() for parameter in tensors)


def test_without_a_fused_optimizer_one_multiplication_a_step_is_applied_unread():
    tensors = parameters("cpu")
    engine, _, failures = engine_on(tensors, None, policy(CLIP), Injected(), unread(False))
    for parameter, grad in zip(tensors, gradients_of(0, 100.0), strict=True):
        parameter.grad = grad
    with torch.no_grad():
        engine.step(StepContext())
    assert failures == []
    total = torch.stack([parameter.grad.norm() for parameter in tensors]).norm()
    assert float(total) == pytest.approx(1.0, rel=1e-6)


def test_patience_holds_a_few_steps_late():
    tensors = parameters("cpu")
    optimizer = FUSED["adamw"](tensors)
    a_policy = policy(CLIP, nonfinite="skip", patience=2)
    engine, _, _ = engine_on(tensors, optimizer, a_policy, Injected(lag=1), unread(True))
    for parameter in tensors:
        parameter.grad = torch.full_like(parameter, math.nan)
    for _ in range(4):
        engine.step(StepContext())
    engine.catch_up(wait=True)
    assert engine.is_stopping
    with pytest.raises(gradwatch.TrainingStopped, match="3 steps skipped in a row") as stopped:
        engine.step(StepContext())
    assert stopped.value.step == 2


def test_a_non_fused_optimizer_on_an_accelerator_is_told_once_what_it_costs():
    plan = plan_for(policy(SKIP), LAYOUT, torch.optim.SGD(parameters(), lr=0.1), parameters())
    assert str(plan) == (
        "reads the accelerator once a step: spike skips, and only a fused optimizer (fused=True) "
        "skips by itself"
    )


def test_fused_momentum_with_dampening_is_read_since_it_cannot_skip_its_first_step():
    tensors = parameters()
    optimizer = torch.optim.SGD(tensors, lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    assert "dampening" in plan_for(policy(SKIP), LAYOUT, optimizer, tensors).reason


class LateEvent:
    """Is done after it was asked so many times."""

    def __init__(self, asks: int) -> None:
        self.asks, self.waited = asks, False

    def record(self) -> None: ...

    def query(self) -> bool:
        self.asks -= 1
        return self.asks < 0

    def synchronize(self) -> None:
        self.asks, self.waited = -1, True


@pytest.mark.parametrize("asks", [0, 1, 2, 9])
def test_a_readback_keeps_the_order_and_waits_only_when_it_must(monkeypatch, asks):
    readback = Readback(torch.device("cpu"))
    events: list[LateEvent] = []

    def event() -> LateEvent:
        events.append(LateEvent(asks))
        return events[-1]

    monkeypatch.setattr(readback, "_event", event)
    monkeypatch.setattr(readback, "_buffer", lambda vector: torch.empty_like(vector))
    seen = []
    for step in range(30):
        readback.send(torch.full((3,), float(step)), step)
        seen += [(what, array.tolist()) for array, what in readback.arrived(wait=False)]
    seen += [(what, array.tolist()) for array, what in readback.arrived(wait=True)]
    assert seen == [(step, [float(step)] * 3) for step in range(30)]
    if asks == 0:
        assert not any(event.waited for event in events)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [row for row, (_, _, (reads, _)) in ROWS.items() if not reads])
def test_on_a_gpu_nothing_synchronizes(row):
    a_policy, name, _ = ROWS[row]
    tensors = parameters("cuda")
    optimizer = FUSED[name](tensors) if name else torch.optim.RMSprop(tensors)
    engine, backend, failures = engine_on(tensors, optimizer, a_policy or load_policy(None), None)
    engine.samples.every = 1
    for checked in (False, True, True):
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            with torch.no_grad():
                engine.step(StepContext())
            optimizer.step()
            engine.stepped()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        backend.disarm()
    engine.catch_up(wait=True)
    assert failures == []
    assert len(engine._recorder.newest(9)) == 3


class Agreeing(TorchBackend):
    """One of two processes, of which the other one is told to stop the run at its third step."""

    def agree(self, gradients, norms, word):
        self.agrees, self.steps = True, getattr(self, "steps", 0) + 1
        return Agreed(gradients, norms, torch.tensor(float(self.steps >= 3)))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_unread_a_finding_of_another_process_ends_the_run_behind_the_step_that_tells(lag):
    tensors = parameters("cpu")
    optimizer = torch.optim.AdamW(tensors, fused=True)
    a_policy = policy(CLIP, nonfinite="skip")
    plan = Plan(reads_host=False, fused=True, one_scale=True, on_accelerator=True)
    engine, _, failures = engine_on(tensors, optimizer, a_policy, Injected(lag), plan)
    engine._backend = Agreeing(tensors, optimizer, plan, Injected(lag))
    for step in range(3 + lag):
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        engine.step(StepContext())
        assert engine.num_steps == step + 1
    with pytest.raises(TrainingStopped, match="a finding of another rank ends the run"):
        engine.step(StepContext())
    assert failures == []
