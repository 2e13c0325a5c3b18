"""The list of what was found: the same everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradwatch.recording.cards import card_of
from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.report.findings import findings_of, listed, most_urgent

LAYOUT = Layout.of([Parameter(name="a.weight")])


def anomaly(step: int, kind: str = "exploding", level: str = "alert") -> Anomaly:
    return Anomaly(kind=kind, level=level, step=step, message=f"{kind}: so much")


def card(step: int, kind: str):
    one = np.ones(1)
    record = StepRecord(
        step=step, time=0.0, layout=LAYOUT, total_norm=1.0, total_norm_clipped=1.0,
        tensor_norms_P=one, tensor_coefs_P=one, present_P=one > 0,
    )  # fmt: skip
    return card_of(RunInfo(run="x", layout=LAYOUT), anomaly(step, kind), [record])


def places(findings):
    return [(one.step, one.kind) for one in findings]


def test_the_oldest_is_first_and_within_a_step_the_most_urgent():
    found = [anomaly(9, "loss_spike"), anomaly(9), anomaly(3, "diverging", "warning")]
    assert places(findings_of(found, [])) == [(3, "diverging"), (9, "exploding"), (9, "loss_spike")]


def test_events_are_named_with_their_steps_and_not_listed():
    events = [anomaly(step, "spike", "event") for step in (1, 5)]
    found = listed([*events, anomaly(9)], [], 10)
    assert places(found.all) == [(9, "exploding")]
    assert found.said_of_events == (
        "2 events of one step each, none an alert: spike (a norm far above its median in that "
        "step) at step 1, 5"
    )
    assert listed([anomaly(9)], [], 10).said_of_events == ""


def test_of_many_events_the_first_steps_are_named():
    found = listed([anomaly(step, "spike", "event") for step in range(8)], [], 10)
    assert found.said_of_events.endswith(" at step 0, 1, 2, 3, 4 and 3 more")


def test_the_step_in_which_it_began_stands_in_front_and_behind_no_other_number():
    message = "exploding: layer a: gradient norm 9 is 90x its median 0.1 since step 7, 1 step after"
    (found,) = findings_of([replace(anomaly(9), message=message)], [])
    assert found.message == (
        "began in step 7, 1 step after: layer a: gradient norm 9 is 90x its median 0.1"
    )


def test_where_there_are_too_many_the_first_stays_with_the_newest():
    found = listed([anomaly(step) for step in range(10)], [], 4)
    assert [one.step for one in found.all] == [0, 7, 8, 9]
    assert found.left_out == 6


def test_the_most_urgent_are_alerts_before_warnings_and_of_them_the_latest_by_step():
    found = findings_of(
        [anomaly(1, "diverging", "warning"), anomaly(2), anomaly(3), anomaly(4, "stuck", "warning"),
         anomaly(5, "vanishing", "warning")], [],
    )  # fmt: skip
    kept = [[one.step for one in most_urgent(found, most)] for most in range(6)]
    assert kept == [[], [3], [2, 3], [2, 3, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_a_bad_step_of_an_episode_belongs_to_its_beginning():
    cards = [card(step, "nonfinite") for step in (40, 41, 42, 57)]
    found = findings_of([anomaly(40, "nonfinite"), anomaly(57, "nonfinite")], cards)
    assert [(one.step, list(one.more)) for one in found] == [(40, [41, 42]), (57, [])]


def test_a_card_that_was_written_before_a_crash_is_a_finding():
    (found,) = findings_of([], [card(40, "nonfinite")])
    assert (found.step, found.message) == (40, "so much")


def test_two_cards_of_a_step_and_kind_are_one_finding():
    one = card(40, "nonfinite")
    (found,) = findings_of([anomaly(40, "nonfinite")], [one, replace(one, message="later")])
    assert found.card is one
