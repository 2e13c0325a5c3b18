"""Changes by intention raise nothing, and hide nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest


def alerts(anomalies):
    return [(a.kind, a.step) for a in anomalies if a.level == "alert"]


SCHEDULES = {
    "warm-up and cosine": lambda t: (
        min(1, (t + 1) / 100) * 0.5 * (1 + math.cos(math.pi * t / 1000))
    ),
    "step decay": lambda t: 0.1 ** (t // 250),
    "warm restarts": lambda t: 1e-3 + 0.5 * (1 + math.cos(math.pi * (t % 200) / 200)),
    "one cycle": lambda t: np.interp(t, [0, 300, 900, 1000], [0.04, 1.0, 4e-6, 0.0]),
    "zero at first": lambda t: 0.0 if t < 10 else 1.0,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("response", [-0.5, 0.0, 0.5])
def test_a_schedule_raises_nothing(run, healthy, name, response):
    """The norm answers to the rate within 20 steps, by up to its square root but at most x3."""
    rate = SCHEDULES[name]
    target = np.clip(
        [rate(t) ** abs(response) if rate(t) else 1 / 3 for t in range(1000)], 1 / 3, 3
    )
    level, levels = 1.0, []
    for goal in target ** np.sign(response):
        level += (goal - level) / 20
        levels.append(level)
    norms = healthy(1000, 4, seed=5) * np.array(levels)[:, None]
    assert run(4).play(norms, learning_rate=lambda t: 1e-3 * rate(t)) == []


@pytest.mark.parametrize(
    "growth", [[1, 3, 30, 300, 3000, 1e4], [1, 2, 8, 12, 15, 15], [1, 3, 100, 60, 20, 30]]
)
def test_an_explosion_after_a_learning_rate_x100_is_caught_within_five_steps(run, healthy, growth):
    a_run = run(3)
    a_run.warm(200)
    anomalies = a_run.play(
        healthy(6, seed=1, sigma=0.05) * np.array(growth)[:, None], learning_rate=0.1
    )
    ((kind, step),) = alerts(anomalies)
    assert kind == "exploding"
    assert step == 204
    assert anomalies[-1].message.endswith(
        "since step 202, 2 steps after the learning rate rose from 0.001 to 0.1"
    )


def test_what_began_before_the_last_change_is_not_blamed_on_it(run, healthy):
    """A learning rate x100 for three steps: the alert comes when it is over."""
    a_run = run(1)
    a_run.warm(200)
    norms = np.array([1.0, 2.0, 90.0, 80.0, 70.0])[:, None]
    anomalies = a_run.play(norms, learning_rate=lambda t: 0.1 if t < 203 else 1e-3)
    assert alerts(anomalies) == [("exploding", 204)]
    assert "2 steps after the learning rate rose from 0.001 to 0.1" in anomalies[-1].message


def test_a_lowered_learning_rate_is_not_blamed_for_what_comes_after_it(run):
    a_run = run(1)
    a_run.warm(200, learning_rate=5.0)
    found = a_run.play(np.full((3, 1), 90.0), learning_rate=0.05)
    assert alerts(found) == [("exploding", 202)]
    assert all("learning rate" not in one.message for one in found)


def test_a_loss_that_diverges_is_said_to_come_after_the_raise_not_after_its_end(run):
    a_run = run(1)
    a_run.warm(300, learning_rate=0.05, scalars={"loss": 1.0})
    raised = {"learning_rate": lambda step: 5.0 if step < 304 else 0.05}
    found = a_run.play(np.ones((60, 1)), scalars={"loss": 3.0}, **raised)
    (diverging,) = [one for one in found if one.kind == "diverging"]
    assert diverging.message.endswith(" steps after the learning rate rose from 0.05 to 5")


def test_a_rate_that_jumps_up_and_down_at_every_step_hides_no_explosion(run, healthy):
    a_run = run(2)

    def zigzag(step):
        return 1e-3 if step % 2 else 1e-1

    assert a_run.play(healthy(600, 2), learning_rate=zigzag) == []
    assert a_run.play(2.5 * healthy(300, 2, seed=1), learning_rate=zigzag) == []
    anomalies = a_run.play(25.0 * healthy(5, 2, seed=2), learning_rate=zigzag)
    assert alerts(anomalies) == [("exploding", 903)]


def test_a_new_level_after_a_jump_is_the_baseline_after_one_warm_up(run, healthy):
    """The rate falls, and so does the norm, to a tenth: what was usual before is then high."""
    a_run = run(2)
    a_run.warm(200)
    assert a_run.play(0.1 * healthy(70, 2, seed=1), learning_rate=1e-4) == []
    found = alerts(a_run.play(2 * healthy(5, 2, seed=2), learning_rate=1e-4))
    assert found == [("exploding", 272)]


def test_sixteen_times_fewer_micro_batches_may_raise_the_norm(run, healthy):
    a_run = run(2)
    a_run.warm(200, micro_batches=16, weight=16.0)
    assert alerts(a_run.play(16.0 * healthy(300, 2, seed=1))) == []
    assert a_run.play(16.0 * healthy(300, 2, seed=2)) == []
    assert alerts(a_run.play(160.0 * healthy(5, 2, seed=3))) == [("exploding", 802)]


def test_an_explosion_right_after_a_change_of_accumulation_is_caught(run, healthy):
    a_run = run(2)
    a_run.warm(200, micro_batches=16, weight=16.0)
    a_run.play(4.0 * healthy(10, 2, seed=1))
    assert alerts(a_run.play(1e3 * healthy(5, 2, seed=2))) == [("exploding", 212)]


def test_the_short_window_at_the_end_of_each_epoch_is_no_change(run, healthy):
    """It is not learnt from, does not alarm, and leaves the bound as sharp as it was."""
    a_run = run(2)

    def micro_batches(step):
        return 2 if step % 6 == 5 else 8

    def played(steps, factor, seed):
        short = np.array([micro_batches(a_run.step + t) == 2 for t in range(steps)])
        norms = healthy(steps, 2, seed=seed) * np.where(short, 8.0, 1.0)[:, None]
        return a_run.play(factor * norms, micro_batches=micro_batches)

    assert played(600, 1.0, seed=0) == []
    assert alerts(played(6, 8.0, seed=1)) == [("exploding", 602)]


def test_an_announced_resume_alarms_nothing_and_hides_nothing(run, healthy):
    a_run = run(2)
    a_run.warm(200)
    a_run.detection.announce("the run was resumed")
    assert a_run.play(2.0 * healthy(100, 2, seed=1)) == []
    a_run.detection.announce("the run was resumed")
    anomalies = a_run.play(40.0 * healthy(3, 2, seed=2))
    assert alerts(anomalies) == [("exploding", 302)]
    assert anomalies[0].message.endswith(", just after the run was resumed")


def test_an_announced_change_of_scale_is_tolerated(run, healthy):
    a_run = run(2)
    a_run.warm(200)
    a_run.detection.announce("the batch shrank", rescales=True)
    assert a_run.play(20.0 * healthy(300, 2, seed=1)) == []


def test_announcing_before_the_first_record_changes_nothing(run, healthy):
    a_run = run(2)
    a_run.detection.announce("the run was resumed")
    a_run.warm(200)
    assert alerts(a_run.play(40.0 * healthy(3, 2, seed=2))) == [("exploding", 202)]
