"""Running totals of records: what a scrape may ask for at any moment."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest

from gradwatch.records import Anomaly, Layout, Parameter, RunInfo, StepRecord
from gradwatch.rules.detection import KINDS
from gradwatch.tally import Tally

LAYOUT = Layout.of([Parameter(name="a.weight"), Parameter(name="b.weight")])
INFO = RunInfo(
    run="r", layout=LAYOUT, rules=("global", "embedding"), multiplying=("global", "embedding")
)


def step(number: int, total: float = 1.0, **fields: object) -> StepRecord:
    values: dict[str, object] = {
        "step": number,
        "time": 1000.0 + number,
        "layout": LAYOUT,
        "total_norm": total,
        "total_norm_clipped": total,
        "tensor_norms_P": np.array([total, 0], dtype=np.float32),
        "tensor_coefs_P": np.ones(2, dtype=np.float32),
        "present_P": np.ones(2, dtype=np.bool_),
    }
    return StepRecord(**{**values, **fields})


def tally_of(*records: StepRecord, now: float = 1000.0) -> Tally:
    tally = Tally(INFO, kinds=KINDS, clock=lambda: now)
    for record in records:
        tally.add(record)
    return tally


def test_steps_that_were_dropped_from_the_recording_were_steps_all_the_same():
    snapshot = tally_of(step(0), step(1), step(7)).snapshot()
    assert snapshot.numbers["steps_total"] == 8
    assert snapshot.numbers["step"] == 7


def test_a_clipped_step_counts_for_each_rule_that_fired_and_a_mere_warning_does_not():
    records = (
        step(0, clipped=True, fired=("global", "embedding")),
        step(1, clipped=True, fired=("global",)),
        step(2, clipped=False, fired=("embedding",)),
    )
    totals = tally_of(*records).snapshot().labelled["clipped_steps_total"]
    assert totals == {("global",): 2, ("embedding",): 1}


def test_a_rule_that_only_warns_never_clips():
    info = replace(INFO, multiplying=("global",))
    tally = Tally(info, kinds=KINDS)
    tally.add(step(0, clipped=True, fired=("global", "embedding")))
    assert tally.snapshot().labelled["clipped_steps_total"] == {("global",): 1}


def test_a_skipped_step_counts_by_its_reason():
    totals = tally_of(step(0, skipped="nonfinite"), step(1)).snapshot().labelled
    counted = {reason: count for (reason,), count in totals["skipped_steps_total"].items()}
    assert counted == {"nonfinite": 1, "overflow": 0, "global": 0, "embedding": 0}


def test_an_unknown_scalar_keeps_its_last_known_value():
    records = (step(0, scalars={"loss": 2.0}, learning_rate=0.1), step(1))
    numbers = tally_of(*records).snapshot().numbers
    assert numbers["loss"] == 2.0
    assert numbers["learning_rate"] == 0.1
    assert "loss_scale" not in numbers


def test_a_norm_that_is_not_finite_is_shown_and_kept_out_of_distribution_and_maximum():
    snapshot = tally_of(step(0, 2.0), step(1, math.nan), step(2, math.inf)).snapshot()
    assert snapshot.numbers["total_norm"] == math.inf
    assert snapshot.numbers["total_norm_window_max"] == 2.0
    assert sum(snapshot.histograms["total_norm_distribution"].counts) == 1


def test_the_maximum_covers_the_last_minute_and_no_more():
    spike_then_calm = [step(0, 50.0), *(step(number, 1.0) for number in range(1, 200))]

    def maximum(now):
        return tally_of(*spike_then_calm, now=now).snapshot().numbers["total_norm_window_max"]

    assert maximum(1060.0) == 50.0
    assert maximum(1063.0) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_the_maximum_is_that_of_a_search_over_all_records(seed):
    draw = np.random.default_rng(seed)
    times = 1000 + np.cumsum(draw.exponential(3.0, 100))
    norms = draw.lognormal(size=100)
    tally = Tally(INFO, kinds=KINDS, clock=lambda: float(times[-1]))
    for number, (time, norm) in enumerate(zip(times, norms, strict=True)):
        tally.add(step(number, float(norm), time=float(time)))
    # Whole seconds are kept: one more may be in it.
    narrow = norms[times >= times[-1] - 60].max()
    wide = norms[times >= times[-1] - 62].max()
    assert narrow <= tally.snapshot().numbers["total_norm_window_max"] <= wide


def test_buckets_hold_what_is_at_most_their_bound_and_an_exemplar_names_the_step():
    histogram = (
        tally_of(step(0, 1.0), step(1, 1.01), step(2, 1e9))
        .snapshot()
        .histograms["total_norm_distribution"]
    )
    at = histogram.bounds.index(1.0)
    assert histogram.counts[at] == 1
    assert histogram.counts[at + 1] == 1
    assert histogram.counts[-1] == 1
    assert histogram.exemplars[at].step == 0
    assert histogram.sum == pytest.approx(2.01 + 1e9)


def test_events_count_by_kind_and_level_and_only_alerts_have_a_time():
    spike = Anomaly(kind="spike", level="event", step=1)
    alert = Anomaly(kind="exploding", level="alert", step=2)
    labelled = (
        tally_of(step(1, anomalies=(spike,)), step(2, anomalies=(alert,))).snapshot().labelled
    )
    assert labelled["events_total"]["spike", "event"] == 1
    assert labelled["events_total"]["exploding", "alert"] == 1
    assert labelled["last_event_timestamp_seconds"]["exploding",] == 1002.0
    assert labelled["last_event_timestamp_seconds"]["spike",] == 0


def test_the_time_of_an_alert_moves_on_while_its_episode_is_open():
    alert = Anomaly(kind="exploding", level="alert", step=0)
    tally = tally_of(step(0, anomalies=(alert,)))
    tally.set_active({"exploding": ("a",)})
    tally.add(step(5))
    tally.set_active({})
    tally.add(step(6))
    assert tally.snapshot().labelled["last_event_timestamp_seconds"]["exploding",] == 1005.0


def test_active_kinds_and_their_layers_are_counted_and_the_others_are_0():
    tally = tally_of()
    tally.set_active({"exploding": ("a", "b")})
    labelled = tally.snapshot().labelled
    assert labelled["anomaly_active"]["exploding",] == 1
    assert labelled["anomalous_layers"]["exploding",] == 2
    assert labelled["anomaly_active"]["nonfinite",] == 0
    tally.set_active({})
    assert set(tally.snapshot().labelled["anomaly_active"].values()) == {0}


def test_every_kind_that_detection_can_report_exists_from_the_start():
    from gradwatch.rules.detection import Detection

    labelled = tally_of().snapshot().labelled
    assert {kind for kind, _ in labelled["events_total"]} == {*KINDS, "policy"}
    assert set(Detection(LAYOUT).active()) <= set(KINDS)


def test_a_snapshot_never_changes():
    tally = tally_of(step(0))
    snapshot = tally.snapshot()
    before = repr(snapshot)
    tally.add(step(1, 5.0, clipped=True, fired=("global",)))
    tally.set_state("finished")
    tally.hook_error("export")
    assert repr(snapshot) == before


def test_a_state_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="the state of a run is one of"):
        tally_of().set_state("sleeping")


def test_snapshots_taken_while_records_come_in_are_whole():
    tally = Tally(INFO, kinds=KINDS)
    torn: list[object] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            snapshot = tally.snapshot()
            numbers = snapshot.numbers
            counted = sum(snapshot.histograms["total_norm_distribution"].counts)
            if numbers["steps_total"] != counted or numbers.get("step", -1) + 1 != counted:
                torn.append(snapshot)

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(2000):
        tally.add(step(number))
    ended.set()
    looking.join()
    assert not torn


def test_what_was_sampled_after_a_record_was_counted_is_shown_all_the_same():
    def sampled(ratio: float) -> dict[str, np.ndarray]:
        names = ("zero_share", "flushed_share", "unchanged_share")
        shares = {name: np.zeros(2, dtype=np.float32) for name in names}
        weights = np.ones(2, dtype=np.float32)
        return {**shares, "update_norm": ratio * weights, "weight_norm": weights}

    tally = tally_of(step(0, samples=sampled(0.5)), step(1))
    np.testing.assert_allclose(tally.snapshot().update_ratios, 0.5)
    tally.amend(step(1, samples=sampled(0.25)))
    np.testing.assert_allclose(tally.snapshot().update_ratios, 0.25)
    tally.add(step(2))
    np.testing.assert_allclose(tally.snapshot().update_ratios, 0.25, err_msg="the last known")
    assert tally.snapshot().numbers["steps_total"] == 3
