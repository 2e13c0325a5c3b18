"""The first line that somebody on call reads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gradwatch.recording.cards import card_of
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.report.verdict import Known, duration, verdict

NOW = 1_000_000.0


def known(**values) -> Known:
    return Known(**({"state": "running", "step": 500, "last_time": NOW - 1, "step_seconds": 0.1,
                     "open": {}} | values))  # fmt: skip


def anomaly(step: int, kind: str = "exploding", level: str = "alert") -> Anomaly:
    return Anomaly(kind=kind, level=level, step=step, layer="block.1", message=f"{kind}: so much")


LAYOUT = Layout.of([Parameter(name="block.1.weight")])


def record_at(step: int) -> StepRecord:
    return StepRecord(
        step=step, time=NOW - 600, layout=LAYOUT, total_norm=9.0, total_norm_clipped=1.0,
        clip_coef=1 / 9, fired=("global",), clipped=True, tensor_norms_P=np.array([9.0]),
        tensor_coefs_P=np.array([1 / 9]), present_P=np.array([True]),
    )  # fmt: skip


def card(step: int, kind: str = "exploding"):
    info = RunInfo(run="x", layout=LAYOUT, mode="enforce")
    return card_of(info, anomaly(step, kind), [record_at(step)])


def test_a_run_without_a_finding_is_healthy_and_there_is_nothing_to_do():
    found = verdict(known(), NOW)
    assert (found.health, found.headline) == ("healthy", "Healthy: no alert up to step 500")
    assert found.lines == [("to do", "nothing")]


def test_an_open_alert_says_since_when_what_where_and_what_was_done():
    found = verdict(
        known(anomalies=[anomaly(300)], cards=[card(300)], open={"exploding": ("block.1",)}), NOW
    )
    assert found.health == "alert"
    assert found.headline == "Not healthy since step 300, 10 min ago: exploding in block.1"
    assert dict(found.lines)["done"].startswith("the gradient was multiplied by 0.111 (global)")
    assert "to do" in dict(found.lines)
    assert found.card.step == 300


def test_of_several_open_alerts_the_first_is_told_and_the_others_named():
    anomalies = [anomaly(300), anomaly(310, "loss_spike")]
    open_alerts = {"loss_spike": (), "exploding": ("block.1",)}
    found = verdict(known(anomalies=anomalies, cards=[card(300)], open=open_alerts), NOW)
    assert "since step 300" in found.headline
    assert found.headline.endswith("exploding in block.1; also loss_spike")


def test_layers_that_come_back_into_an_open_episode_do_not_begin_it():
    anomalies = [anomaly(100), anomaly(300), anomaly(360)]
    values = {"anomalies": anomalies, "cards": [card(300), card(360)]}
    found = verdict(known(open={"exploding": ()}, open_since={"exploding": 300}, **values), NOW)
    assert found.headline.startswith("Not healthy since step 300")
    assert found.card.step == 300


def test_an_open_alert_says_how_it_stands_by_now():
    later = replace(record_at(500), scalars={"loss": 0.5}, total_norm=0.25, learning_rate=0.1)
    found = verdict(
        known(anomalies=[anomaly(300)], cards=[card(300)], open={"exploding": ()}, latest=later),
        NOW,
    )
    said = dict(found.lines)["now"]
    assert said == "at step 500: total norm 0.25 (9 before), loss 0.5, learning rate 0.1"


def test_an_alert_that_is_over_is_said_to_be_over_with_what_began_it():
    found = verdict(
        known(anomalies=[anomaly(300), anomaly(302, "loss_spike")], cards=[card(300)],
              calm_since=320), NOW
    )  # fmt: skip
    assert found.health == "over"
    assert found.headline == (
        "Healthy again since step 320, after 2 alerts; see exploding in block.1 at step 300"
    )


def test_alerts_of_which_nobody_knows_whether_they_are_open_count_as_open():
    assert verdict(known(anomalies=[anomaly(300)], open=None), NOW).health == "alert"


@pytest.mark.parametrize("state", ["crashed", "stopped"])
def test_an_end_right_behind_an_alert_is_told_with_it(state):
    values = {"state": state, "cards": [card(490)]}
    found = verdict(known(anomalies=[anomaly(490)], **values), NOW)
    assert found.health == "alert"
    assert found.headline.endswith(f"; the run {state} at step 500")


def test_a_card_that_was_written_before_a_crash_counts_without_its_anomaly():
    found = verdict(known(state="crashed", cards=[card(500, "nonfinite")]), NOW)
    assert "Not healthy since step 500: nonfinite" in found.headline


def test_a_crash_without_an_alert_sends_to_the_log():
    found = verdict(known(state="crashed"), NOW)
    assert found.headline == "Crashed at step 500. No alert came before."
    assert "log" in dict(found.lines)["to do"]


def test_a_run_that_is_silent_for_long_is_no_healthy_one():
    assert verdict(known(last_time=NOW - 59), NOW).health == "healthy"
    found = verdict(known(last_time=NOW - 1200), NOW)
    assert (found.health, found.headline) == (
        "warning", "No step for 20 min, the last one was 500"
    )  # fmt: skip
    assert verdict(known(last_time=NOW - 1200, step_seconds=100.0), NOW).health == "healthy"


def test_before_the_first_step_nothing_is_claimed():
    assert verdict(known(step=None, last_time=math.nan), NOW).health == "unknown"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h"), (172_800, "2 days"),
     (math.nan, "an unknown time")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said
