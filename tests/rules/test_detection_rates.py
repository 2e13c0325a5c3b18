"""How often a healthy run is called ill, and how soon a published explosion is seen."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

DATA = Path(os.environ.get("GRADWATCH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
RUNS, STEPS, LAYERS = 60, 1000, 20


def healthy_run(seed: int) -> np.ndarray:
    """[T, L] log-normal norms after a rise or a fall, drifting by up to x3 either way."""
    draw = np.random.default_rng(seed)
    sigma = draw.uniform(0.1, 0.5, LAYERS)
    level = draw.normal(0.0, 1.0, LAYERS)
    time = np.arange(STEPS)[:, None]
    transient = draw.uniform(-1.5, 3.0, LAYERS) * np.exp(-time / draw.uniform(10, 60, LAYERS))
    drift = draw.uniform(-1.1, 1.1, LAYERS) * time / STEPS
    return np.exp(level + transient + drift + sigma * draw.standard_normal((STEPS, LAYERS)))


@pytest.mark.slow
def test_sixty_healthy_runs_raise_no_alert(run):
    """0 of 60 runs: with 95 % confidence fewer than 5 % of runs (1 - 0.05^(1/60))."""
    found: Counter[tuple[str, str]] = Counter()
    for seed in range(RUNS):
        found.update((a.kind, a.level) for a in run(LAYERS).play(healthy_run(seed)))
    assert {key: n for key, n in found.items() if key[1] == "alert"} == {}
    # An event per 1000 steps and 20 layers would be noise.
    assert sum(found.values()) < RUNS


def published() -> list[tuple[float, float]]:
    """(loss, norm) of BLOOM-176B, iterations 31214 to 31222."""
    path = DATA / "bigscience_grad_norms.csv"
    if not path.exists():
        pytest.skip(f"no public traces at {DATA}: set GRADWATCH_DATA to their folder")
    with path.open() as lines:
        rows = [row for row in csv.DictReader(lines) if "176B" in row["file"] and row["iteration"]]
    wanted = [row for row in rows if 31214 <= int(row["iteration"]) <= 31222]
    return [(float(row["lm_loss"]), float(row["grad_norm"])) for row in wanted]


@pytest.mark.parametrize("seed", range(20))
def test_the_published_explosion_of_bloom_is_seen_before_its_loss_jumps(run, healthy, seed):
    losses, norms = map(np.array, zip(*published(), strict=True))
    jump = int(np.argmax(losses > 2 * losses[0]))
    a_run = run(1)
    assert a_run.play(healthy(128, 1, median=0.2, sigma=0.15, seed=seed)) == []
    alerts = [a for a in a_run.play(norms[:, None]) if a.level == "alert"]
    assert [a.kind for a in alerts] == ["exploding"]
    assert alerts[0].step - 128 < jump
