"""`gradwatch tune`: thresholds from healthy runs, and what is to be expected of them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from scipy.stats import beta

from gradwatch.policy import KINDS, Detect, parse_policy
from gradwatch.records import Layout, Parameter, StepRecord
from gradwatch.rules.detection import Detection
from gradwatch.whatif.rates import upper_bound, upper_rate
from gradwatch.whatif.tuning import LADDERS, default_rung, observed, tuned

LAYOUT = Layout.of([Parameter(name=f"layer{i}.weight") for i in range(4)])


def run(seed: int, sigma: float, steps: int = 600, bursts: bool = False):
    """Log-normal norms; with bursts of five large steps here and there."""
    draw = np.random.default_rng(seed)
    for step in range(steps):
        norms = np.exp(sigma * draw.standard_normal(4))
        if bursts and step > 100 and step % 97 < 5:
            norms *= 8.0
        norms = norms.astype(np.float32)
        total = float(np.linalg.norm(norms))
        yield StepRecord(
            step=step, time=0.0, layout=LAYOUT, total_norm=total, total_norm_clipped=total,
            tensor_norms_P=norms, tensor_coefs_P=np.ones_like(norms), present_P=norms > 0,
            scalars={"loss": float(np.exp(0.05 * draw.standard_normal()))},
        )  # fmt: skip


def findings(records, detect: Detect) -> list:
    detection = Detection(LAYOUT, detect)
    return [a for r in records for a in detection.observe(r) if a.level != "event"]


def test_each_ladder_has_the_default_but_not_as_its_first_rung():
    for kind in LADDERS:
        assert kind in KINDS
        assert default_rung(kind) > 0


def test_more_tolerant_rungs_find_no_more():
    for bursts in (False, True):
        found = observed("r", LAYOUT, run(1, 0.3, bursts=bursts)).found
        for kind, rungs in LADDERS.items():
            counts = [found[kind, i] for i in range(len(rungs))]
            assert counts == sorted(counts, reverse=True), kind


def test_calm_runs_make_detection_stricter_and_rough_ones_more_tolerant():
    calm = {
        one.kind: one for one in tuned([observed(str(s), LAYOUT, run(s, 0.1)) for s in range(3)])
    }
    assert calm["exploding"].rung == {"z": 5, "times": 3.2}
    rough = [observed(str(s), LAYOUT, run(s, 0.2, bursts=True)) for s in range(3)]
    (exploding,) = [one for one in tuned(rough) if one.kind == "exploding"]
    assert exploding.by_default > 0
    assert exploding.rung["times"] > exploding.default["times"]
    assert exploding.elsewhere == 0
    kept = Detect().model_copy(
        update={"exploding": Detect().exploding.model_copy(update=exploding.rung)}
    )
    fresh = [a for s in range(10, 20) for a in findings(run(s, 0.2, bursts=True), kept)]
    assert [a for a in fresh if a.kind == "exploding"] == []


def test_what_no_rung_spares_is_blamed_on_the_run():
    """A parameter without a gradient for the whole run: unused, however long one waits."""
    layout = Layout.of([Parameter(name="a.weight"), Parameter(name="b.weight")])

    def records():
        for step in range(3200):
            norms = np.array([1.0 + 0.1 * math.sin(step), 0.0], dtype=np.float32)
            yield StepRecord(
                step=step, time=0.0, layout=layout, total_norm=1.0, total_norm_clipped=1.0,
                tensor_norms_P=norms, tensor_coefs_P=np.ones_like(norms), present_P=norms > 0,
            )  # fmt: skip

    (unused,) = [
        one for one in tuned([observed("mine", layout, records())]) if one.kind == "unused"
    ]
    assert (unused.rung, unused.blamed, unused.elsewhere) == (None, "mine", None)


def test_a_kind_that_is_switched_off_stays_off():
    base = Detect(exploding=None)
    assert "exploding" not in {
        one.kind for one in tuned([observed("r", LAYOUT, run(0, 0.1), base)], base)
    }


@pytest.fixture
def cli(tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "gradwatch", *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return call


def test_what_is_printed_is_a_detect_section(cli, recorded):
    recordings = [recorded(None, steps=300).path for _ in range(2)]
    done = cli("tune", *recordings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Tuned on 2 healthy runs, 600 steps.\n")
    assert "That is little" in done.stdout
    policy = parse_policy(f"version: 1\n{done.stdout}")
    section = yaml.safe_load(done.stdout)["detect"]
    for kind, values in section.items():
        assert {key: getattr(policy.detect[kind], key) for key in values} == values


def test_the_rest_of_the_section_that_was_gone_from_is_printed_too(cli, recorded, tmp_path):
    section = {
        "every": 5,
        "culprit": "replay",
        "exploding": {"layers": "a*", "z": 7.0, "then": "stop"},
        "vanishing": "none",
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"version": 1, "detect": section}))
    done = cli("tune", recorded(None, steps=300).path, "--policy", "mine.yaml")
    printed = parse_policy(f"version: 1\n{done.stdout}").detect
    assert (printed.every, printed.culprit, printed.vanishing) == (5, "replay", None)
    assert (printed.exploding.layers, printed.exploding.then) == (("a*",), "stop")


@pytest.mark.parametrize("detect", [{}, {"nonfinite": "none"}])
def test_a_run_that_was_not_finite_is_left_out(cli, recorded, detect):
    policy = {"version": 1, "detect": detect}
    bad = recorded(policy, gains=lambda step: math.nan if step == 50 else 1.0)
    done = cli("tune", bad.path)
    assert done.returncode == 2
    assert "left out, step 50 was not finite" in done.stderr
    assert "none of these runs is healthy" in done.stderr


@pytest.mark.parametrize(("hits", "trials"), [(0, 60), (1, 60), (3, 12), (0, 1), (2, 10**6)])
def test_bounds_are_those_of_clopper_and_pearson(hits, trials):
    expected = beta.ppf(0.95, hits + 1, trials - hits)
    assert upper_bound(hits, trials) == pytest.approx(expected, rel=1e-9)


def test_without_trials_a_bound_is_no_bound():
    assert upper_bound(0, 0) == upper_bound(5, 5) == 1.0
    assert upper_rate(0) == math.inf
    assert upper_rate(3000) == pytest.approx(1e-3, rel=2e-3)
