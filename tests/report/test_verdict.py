"""The first line that somebody on call reads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gradwatch.recording.cards import card_of
from gradwatch.records import Anomaly, Culprit, Layout, Parameter, RunInfo, StepRecord
from gradwatch.report.advice import to_do
from gradwatch.report.aftermath import Aftermath
from gradwatch.report.course import first_step
from gradwatch.report.moments import duration
from gradwatch.report.verdict import Known, verdict

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


def explosion(step: int, since: int, rates: list[float], layers: int = 5):
    """A card of an explosion that began at `since`, with the learning rates of its last steps."""
    names = tuple(f"block.{i}" for i in range(layers))
    layout = Layout.of([Parameter(name=f"{name}.weight") for name in names])
    more = f" and {layers - 1} more" if layers > 1 else ""
    found = Anomaly(
        kind="exploding", level="alert", step=step, layer=names[0], layers=names[:5],
        message=f"exploding: layer {names[0]}{more}: gradient norm 9 is 90x its median 0.1 since "
        f"step {since}",
    )  # fmt: skip
    ones = np.ones(layers)
    records = [
        replace(
            record_at(at), layout=layout, learning_rate=rate, tensor_norms_P=ones,
            tensor_coefs_P=ones, present_P=ones > 0, time=NOW - 600 + at,
        )
        for at, rate in enumerate(rates, step - len(rates) + 1)
    ]  # fmt: skip
    return card_of(RunInfo(run="x", layout=layout, mode="enforce"), found, records)


def aftermath(of, **values) -> Aftermath:
    first = first_step(of)
    return Aftermath(**({"first": first, "until": 500, "num_steps": 501 - first, "step": 500,
                         "num_recent": 20} | values))  # fmt: skip


def test_a_run_without_a_finding_is_healthy_and_there_is_nothing_to_do():
    found = verdict(known(), NOW)
    assert (found.health, found.headline) == (
        "healthy", "Healthy: no alert and no warning up to step 500"
    )  # fmt: skip
    assert found.lines == [("to do", "nothing")]


def test_an_open_alert_says_since_when_what_where_and_what_was_done():
    found = verdict(
        known(anomalies=[anomaly(300)], cards=[card(300)], open={"exploding": ("block.1",)}), NOW
    )
    assert found.health == "alert"
    assert found.headline == (
        "Not healthy since step 300 (1970-01-12 13:36:40 UTC, 10 min ago): exploding in block.1"
    )
    said = dict(found.lines)["done"]
    assert said == "step 300 was clipped by the rule global (step 300: 9 -> 1) and taken"
    assert "to do" in dict(found.lines)
    assert found.card.step == 300


def test_of_several_open_alerts_the_first_is_told_and_the_others_named():
    anomalies = [anomaly(300), anomaly(310, "loss_spike")]
    open_alerts = {"loss_spike": (), "exploding": ("block.1",)}
    found = verdict(known(anomalies=anomalies, cards=[card(300)], open=open_alerts), NOW)
    assert "since step 300" in found.headline
    assert found.headline.endswith("exploding in block.1; also loss spike")


def test_a_kind_is_told_in_words():
    found = [anomaly(100, "stalled_update", "warning"), anomaly(200, "diverging", "warning")]
    assert (
        "the last: diverging loss in block.1 at step 200"
        in verdict(known(anomalies=found), NOW).headline
    )
    alerts = [anomaly(490, "loss_spike"), anomaly(490, "rank_divergence")]
    open_alerts = {"loss_spike": (), "rank_divergence": ("block.1",)}
    cards = [card(490, "loss_spike"), card(490, "rank_divergence")]
    told = verdict(known(anomalies=alerts, cards=cards, open=open_alerts), NOW)
    assert "rank divergence in block.1; also loss spike" in told.headline
    assert "open: rank divergence in block.1, loss spike" in dict(
        verdict(
            known(anomalies=alerts, cards=cards, open=open_alerts, latest=record_at(500),
                  after=aftermath(cards[0])), NOW
        ).lines
    )["now"]  # fmt: skip


def test_layers_that_come_back_into_an_open_episode_do_not_begin_it():
    anomalies = [anomaly(100), anomaly(300), anomaly(360)]
    values = {"anomalies": anomalies, "cards": [card(300), card(360)]}
    found = verdict(known(open={"exploding": ()}, open_since={"exploding": 300}, **values), NOW)
    assert found.headline.startswith("Not healthy since step 300")
    assert found.card.step == 300


def test_an_open_alert_says_how_it_stands_by_now():
    later = replace(record_at(500), scalars={"loss": 0.5}, total_norm=0.25, learning_rate=0.1)
    one = explosion(303, 301, [0.1] * 14)
    found = verdict(known(cards=[one], open={"exploding": ()}, latest=later), NOW)
    said = dict(found.lines)["now"]
    assert said == (
        "at step 500: loss 0.5, total norm 0.25 (9 before), learning rate 0.1 (0.1 before)"
    )


RATES = [0.1] * 10 + [5.0] * 4


def test_a_learning_rate_that_rose_just_before_is_in_the_first_line():
    one = explosion(303, 301, RATES)
    found = verdict(
        known(cards=[one], open={"exploding": ()}, num_layers=5, times={301: NOW - 299}), NOW
    )
    assert found.headline == (
        "Not healthy since step 301 (1970-01-12 13:41:41 UTC, 5 min ago): exploding in all 5 "
        "layers, 1 step after the learning rate rose 50x"
    )
    lines = dict(found.lines)
    assert lines["began"].startswith("at step 300 the learning rate rose from 0.1 to 5; exploding")
    assert "from step 301 on in 5 layers" in lines["began"]
    assert lines["began"].endswith("in step 303: block.0 (90x its median)")
    assert lines["to do"].startswith(
        "first find what set the learning rate to 5 at step 300 (0.1 before)"
    )


@pytest.mark.parametrize(
    ("since", "rates"),
    [
        (300, RATES),  # it rose with the first bad step, whose gradient is that of weights before
        (301, [0.1] * 14),
        (301, [0.1] * 10 + [0.2] * 4),
        (301, [math.nan] * 10 + [5.0] * 4),
        (301, [5.0] * 10 + [0.1] * 4),
    ],
    ids=["with it", "constant", "doubled", "not known", "fell"],
)
def test_no_cause_is_told_that_the_steps_before_do_not_show(since, rates):
    one = explosion(303, since, rates)
    found = verdict(known(cards=[one], open={"exploding": ()}), NOW)
    assert "learning rate" not in found.headline + str(dict(found.lines)["began"])


def test_what_the_loss_did_since_decides_whether_to_go_back():
    one = explosion(303, 301, RATES)
    losses = (*[0.5] * 9, 30.0, 30.0, 20.0, 9.0, 9.0)
    one = replace(one, series={**one.series, "loss": losses})
    for now, said in (
        (0.505, "the loss, 0.505, is back where it was (0.5): let it run"),
        (0.54, "evaluate a checkpoint from before step 300 too and go on from the better one (the "
         "loss, 0.54, is 8% above before)"),
        (2.0, "the loss is still up, 2 (0.5 before): go back to a checkpoint from before step 300, "
         "and lower the learning rate or the limit"),
    ):  # fmt: skip
        after = aftermath(one, loss_now=now)
        found = verdict(known(cards=[one], open={"exploding": ()}, after=after), NOW)
        assert dict(found.lines)["to do"].endswith(f"; then {said}")


@pytest.mark.parametrize(
    ("kind", "origin", "since", "before"),
    [
        ("exploding", None, 301, 301),
        ("loss_spike", None, 301, 301),
        ("rank_divergence", None, 204, 204),
        ("nonfinite", None, None, 303),
        ("nonfinite", "weight", None, 302),  # they were bad when the step before had ended
        ("dead", None, 290, 280),  # the sample before is the last one that was good
    ],
)
def test_the_checkpoint_to_go_back_to_is_from_before_the_first_bad_step(
    kind, origin, since, before
):
    said = f" since step {since}" if since is not None else ""
    found = Anomaly(
        kind=kind, level="alert", step=303, layer="block.1", message=f"{kind}: so much{said}"
    )
    culprit = None if origin is None else Culprit(origin=origin, module="block.1", message="it")
    info = RunInfo(run="x", layout=LAYOUT, mode="enforce")
    told = to_do(card_of(info, found, [record_at(303)], culprit))
    assert f"a checkpoint from before step {before}" in " ".join(told.split())


def test_an_explosion_that_one_layer_has_not_come_back_from_names_that_layer():
    one = explosion(303, 301, RATES)
    layers = {f"block.{i}": 1.0 for i in range(5)}
    values = {
        "cards": [one],
        "open": {"exploding": ("block.1",)},
        "num_layers": 5,
        "state": "finished",
        "anomalies": [anomaly(303), anomaly(400, "diverging", "warning")],
    }
    after = aftermath(one, layers_now={**layers, "block.1": 3.6}, norm_now=10.0)
    found = verdict(known(**values, after=after), NOW)
    assert found.health == "warning"
    assert found.headline == (
        "Not fully recovered, block.1 still 3.6x its median: exploded at step 301 "
        "(1970-01-12 13:41:43 UTC) in all 5 layers, 1 step after the learning rate rose 50x"
    )
    more = {**values, "anomalies": [*values["anomalies"], anomaly(410, "loss_spike")]}
    counted = verdict(known(**more, after=after), NOW).headline
    assert counted == f"{found.headline}; 2 alerts, 1 warning in all"
    back = verdict(known(**values, after=aftermath(one, layers_now=layers, norm_now=10.0)), NOW)
    assert back.headline.startswith("Recovered, its alert not closed yet: exploded at step 301")
    most = layers | dict.fromkeys(("block.0", "block.1", "block.2"), 3.6)
    for up, norm in ((most, 10.0), (layers, 30.0), ({}, 10.0)):
        after = aftermath(one, layers_now=up, norm_now=norm)
        assert verdict(known(**values, after=after), NOW).headline.startswith("Not healthy since")


def test_an_alert_that_is_over_is_said_to_be_over_with_what_began_it():
    found = verdict(
        known(anomalies=[anomaly(300), anomaly(302, "loss_spike")], cards=[card(300)],
              calm_since=320), NOW
    )  # fmt: skip
    assert found.health == "over"
    assert found.headline == (
        "Healthy again since step 320, after 2 alerts; see exploding in block.1, at step 300 "
        "(1970-01-12 13:36:40 UTC)"
    )


def test_a_run_whose_loss_has_stayed_up_is_not_called_healthy_again():
    one = explosion(303, 301, RATES)
    one = replace(one, series={**one.series, "loss": (*[0.5] * 9, 30.0, 30.0, 20.0, 9.0, 9.0)})
    values = {"anomalies": [anomaly(303)], "cards": [one], "calm_since": 330}
    found = verdict(known(**values, after=aftermath(one, loss_now=1.6)), NOW)
    assert found.health == "warning"
    assert found.headline.startswith(
        "Loss still up, 1.6 (0.5 before); no alert open since step 330"
    )
    well = verdict(known(**values, after=aftermath(one, loss_now=0.6)), NOW)
    assert well.headline.startswith("Healthy again")


def test_of_what_began_in_the_same_step_the_finding_that_says_where_is_told():
    spike = replace(
        card(302, "loss_spike"), layer=None, layers=(), message="loss_spike: since step 300"
    )
    gone = replace(
        card(319, "collapsed"), message="collapsed: layer block.1 and 6 more: 0 since step 300"
    )
    anomalies = [anomaly(302, "loss_spike"), anomaly(319, "collapsed")]
    open_alerts = {"loss_spike": (), "collapsed": ("block.1",)}
    found = verdict(known(anomalies=anomalies, cards=[spike, gone], open=open_alerts), NOW)
    assert found.headline.endswith("collapsed in 7 parameters; also loss spike")


def test_a_gradient_that_is_clipped_before_it_is_measured_is_not_called_healthy():
    warnings = [anomaly(8, "clipped_elsewhere", "warning"), anomaly(90, "diverging", "warning")]
    found = verdict(known(anomalies=warnings, cards=[card(8, "clipped_elsewhere")]), NOW)
    assert (found.health, found.headline) == (
        "warning",
        "No alert up to step 500, but an explosion would not show: since step 8 something clips "
        "the gradient before it is measured",
    )
    assert dict(found.lines)["to do"].startswith("take clip_grad_norm_")


def test_a_clip_that_a_larger_norm_has_disproved_is_a_warning_like_any_other():
    was = replace(anomaly(8, "clipped_elsewhere", "warning"), value=0.5)
    latest = replace(record_at(500), total_norm=1.3)
    found = verdict(known(anomalies=[was], latest=latest), NOW)
    assert found.headline == (
        "Healthy up to step 500, with 1 warning; the last: clipped elsewhere in block.1 at step 8"
    )
    still = verdict(known(anomalies=[was], latest=replace(latest, total_norm=0.5)), NOW)
    assert still.headline.startswith("No alert up to step 500, but an explosion would not show")


def test_beside_an_alert_the_clip_before_the_measurement_is_what_to_do_first():
    both = [anomaly(8, "clipped_elsewhere", "warning"), anomaly(90, "exploding")]
    found = verdict(known(anomalies=both, cards=[card(90)], open={"exploding": ()}), NOW)
    assert found.headline.startswith("Not healthy since step 90 ")
    to_do = dict(found.lines)["to do"]
    assert to_do.startswith("first take clip_grad_norm_, ")
    assert "(found at step 8); then " in to_do


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
    assert found.headline.startswith("Not healthy since step 500 (1970-01-12 13:36:40 UTC): nonfin")


def test_a_crash_without_an_alert_sends_to_the_log():
    found = verdict(known(state="crashed"), NOW)
    assert found.headline == "Crashed at step 500; no alert came before"
    assert "log" in dict(found.lines)["to do"]


def test_a_crash_long_after_an_alert_is_told_with_it():
    over = [anomaly(90), anomaly(93, "loss_spike"), anomaly(93)]
    found = verdict(known(state="crashed", anomalies=over), NOW)
    assert found.headline == (
        "Crashed at step 500; 3 alerts before, the last at step 93 (exploding, loss spike)"
    )


def test_a_run_that_somebody_stopped_asks_for_nothing():
    found = verdict(known(state="stopped"), NOW)
    assert found.headline == (
        "Stopped, by its policy or by hand, at step 500; no alert came before"
    )
    assert dict(found.lines)["to do"].startswith("nothing, where that was meant")


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
