"""Presets over whole runs, against the published update rules written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradwatch.policy import load_policy, parse_policy

STEPS = 240
RATE = 0.02
Gradients = list[torch.Tensor]


def norm(*tensors: torch.Tensor) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


class Agc:
    """arXiv:2102.06171, equation 3: every unit of a matrix by its own ratio to its weights."""

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        return [self.one(w, g) if g.ndim > 1 else g for w, g in zip(weights, grads, strict=True)]

    def one(self, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        rows = []
        for w, g in zip(weight, grad, strict=True):
            bound = 0.01 * max(norm(w), 1e-3)
            rows.append(g * bound / norm(g) if norm(g) > bound else g)
        return torch.stack(rows)


class ZClip:
    """arXiv:2504.02507, algorithm 1: mean and variance of 25 norms, then moving averages."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        size = norm(*grads)
        if len(self.seen) < 25:
            self.seen.append(size)
            if len(self.seen) == 25:
                self.mean, self.variance = float(np.mean(self.seen)), float(np.var(self.seen))
            return grads
        sigma = math.sqrt(self.variance)
        z = (size - self.mean) / sigma
        effective = self.mean + (2.5**2 / z) * sigma if z > 2.5 else size
        grads = [g * effective / size for g in grads] if z > 2.5 else grads
        self.mean = 0.97 * self.mean + 0.03 * effective
        self.variance = 0.97 * self.variance + 0.03 * (effective - self.mean) ** 2
        return grads


class AutoClip:
    """arXiv:2007.14469: the tenth percentile of the norms so far.

    The published code has the norm of the step itself among them. A limit of gradwatch never has.
    """

    def __init__(self) -> None:
        self.history: list[float] = []

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        size = norm(*grads)
        limit = float(np.percentile(self.history, 10)) if self.history else size
        self.history.append(size)
        return [g * min(1.0, limit / size) for g in grads]


class AdaGC:
    """arXiv:2502.11034: each tensor by its own moving average of norms after clipping.

    In its first 100 steps the paper clips the whole gradient to 1 and keeps the smallest norm of
    each tensor; the preset clips each tensor to 1 and keeps their mean.
    """

    def __init__(self) -> None:
        self.average: list[float] = []
        self.step = 0

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        self.step += 1
        warm = self.step > 100
        limits = [1.04 * a for a in self.average] if warm else [1.0] * len(grads)
        done = [g * min(1.0, n / norm(g)) for g, n in zip(grads, limits, strict=True)]
        sizes = [norm(g) for g in done]
        keep = 0.99 if warm else 1 - 1 / self.step
        before = self.average or sizes
        self.average = [keep * a + (1 - keep) * n for a, n in zip(before, sizes, strict=True)]
        return done


class SkipStep:
    """OLMo-core's rule: a loss or norm above mean + 6 standard deviations of the last 128."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        size = norm(*grads)
        skip = self.over(self.losses, loss) or self.over(self.norms, size)
        self.losses.append(loss)
        self.norms.append(size)
        return None if skip else grads

    def over(self, history: list[float], value: float) -> bool:
        recent = history[-128:]
        return len(recent) >= 64 and value - np.mean(recent) > 6 * np.std(recent, ddof=1)


class KerasClipnorm:
    """Keras' clipnorm: each variable by its own L2 norm."""

    limit = 1.0

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        return [g * min(1.0, self.limit / norm(g)) for g in grads]


class BlockRms:
    """optax.clip_by_block_rms: each array by its own root mean square."""

    def __call__(self, weights: Gradients, grads: Gradients, loss: float) -> Gradients | None:
        return [g / max(1.0, norm(g) / math.sqrt(g.numel()) / 1.0) for g in grads]


class Run:
    """Least squares with noise, bursts and drift; its gradients in closed form, in any dtype."""

    def __init__(self, gain: float) -> None:
        generator = torch.Generator().manual_seed(7)
        self.start = [torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator)]
        self.noise = [
            [torch.randn(w.shape, generator=generator) for w in self.start] for _ in range(STEPS)
        ]
        rng = np.random.default_rng(7)
        self.gains = gain * np.exp(0.3 * rng.standard_normal(STEPS))
        self.gains[rng.integers(110, STEPS, 6)] *= 40

    def gradients(self, step: int, weights: Gradients) -> tuple[float, Gradients]:
        gain = float(self.gains[step])
        grads = [
            gain * (w / 2 + noise.to(w)) for w, noise in zip(weights, self.noise[step], strict=True)
        ]
        return gain, grads


CASES: dict[str, tuple[Callable[[], Callable[..., Gradients | None]], float]] = {
    "agc": (Agc, 0.05),
    "zclip": (ZClip, 1.0),
    "autoclip": (AutoClip, 1.0),
    "adagc": (AdaGC, 1.0),
    "skipstep": (SkipStep, 1.0),
    "keras-clipnorm": (KerasClipnorm, 0.3),
    "block-rms": (BlockRms, 1.0),
}


def published(name: str) -> tuple[Gradients, list[bool]]:
    """The weights after the run, and by step whether the rule changed something."""
    make, gain = CASES[name]
    run, rule = Run(gain), make()
    weights = [w.double() for w in run.start]
    changed = []
    for step in range(STEPS):
        loss, grads = run.gradients(step, weights)
        used = rule(weights, grads, loss)
        changed.append(
            used is None or any(not torch.equal(u, g) for u, g in zip(used, grads, strict=True))
        )
        if used is not None:
            weights = [w - RATE * g for w, g in zip(weights, used, strict=True)]
    return weights, changed


def watched(attach, name: str, policy) -> tuple[Gradients, list[bool]]:
    run = Run(CASES[name][1])
    model = torch.nn.Linear(5, 6)
    weights = [model.weight, model.bias]
    with torch.no_grad():
        for weight, start in zip(weights, run.start, strict=True):
            weight.copy_(start)
    optimizer = torch.optim.SGD(weights, lr=RATE)
    watch = attach(model, optimizer, policy)
    changed = []
    for step in range(STEPS):
        loss, grads = run.gradients(step, [w.detach() for w in weights])
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        watch.log(loss=loss)
        optimizer.step()
        changed.append(watch.latest.clipped or watch.latest.skipped is not None)
    return [w.detach() for w in weights], changed


POISON = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("name", [*CASES, "default"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 150), bad=st.sampled_from(POISON), element=st.integers(0, 35))
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing_after_it(
    attach, name, at, bad, element
):
    rules = [{"limit": {"z": 4}}] if name == "default" else [{"use": name}]
    gain = CASES.get(name, (None, 1.0))[1]
    policy = {"version": 1, "clip": rules}
    expected, limits = poisoned(attach, policy, Run(gain), None, bad, element)
    found, with_one_more = poisoned(attach, policy, Run(gain), at, bad, element)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert with_one_more[:at] + with_one_more[at + 1 :] == limits


def poisoned(attach, policy, run, at, bad, element):
    """Weights after 160 steps, one more that holds a bad element before step `at`, and limits."""
    model = torch.nn.Linear(5, 6)
    weights = [model.weight, model.bias]
    with torch.no_grad():
        for weight, start in zip(weights, run.start, strict=True):
            weight.copy_(start)
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=0.9)
    watch = attach(model, optimizer, policy)
    limits = []
    for step in [*range(at), -1, *range(at, 160)] if at is not None else range(160):
        loss, grads = run.gradients(max(step, 0), [w.detach() for w in weights])
        if step < 0:
            grads[element // 30].view(-1)[element % 6] = bad
            loss = bad
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        watch.log(loss=loss)
        optimizer.step()
        assert (watch.latest.skipped == "nonfinite") == (step < 0) or watch.latest.fired
        limits.append(dict(watch.latest.limits))
    watch.close()
    return [w.detach() for w in weights], limits


def using(name: str):
    return load_policy({"version": 1, "guard": {"nonfinite": "none"}, "clip": [{"use": name}]})


@pytest.mark.parametrize("name", CASES)
def test_a_whole_run_is_that_of_the_published_rule(attach, name):
    expected, changes = published(name)
    weights, changed = watched(attach, name, using(name))
    assert changed == changes
    assert sum(changed) > 3
    for weight, due in zip(weights, expected, strict=True):
        assert torch.allclose(weight.double(), due, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_explained_policy_gives_the_same_run_bit_for_bit(attach, name):
    used, changed = watched(attach, name, using(name))
    explained = parse_policy(using(name).canonical_yaml(), "explained")
    plain, again = watched(attach, name, explained)
    assert changed == again
    assert all(torch.equal(a, b) for a, b in zip(used, plain, strict=True))
