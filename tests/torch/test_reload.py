"""A policy file that is written while a run goes on: its numbers hold from a step on."""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import reloading
from gradwatch.policy import load_policy
from gradwatch.whatif.replay import replay

POLICY = """\
version: 1
guard: {patience: 5}
clip:
  - {limit: 1.0, eps: 0}
  - {per: layer, limit: {z: 4, warmup: 4}, name: learns}
"""


@pytest.fixture
def run(attach, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reloading, "LOOK_SECONDS", 0.02)
    return Running(attach, task, tmp_path / "policy.yaml")


class Running:
    """A watched loop with its policy file."""

    def __init__(self, attach, task, path):
        self.path, self.task, self.number = path, task, 0
        self._attach, self._text = attach, POLICY

    def begins(self, text=POLICY, **kwargs):
        self._text = text
        self.path.write_text(text)
        self.optimizer = torch.optim.SGD(self.task.model.parameters(), lr=1e-3)
        self.watch = self._attach(
            self.task.model, self.optimizer, self.path.name, recording=self.path.parent, **kwargs
        )

    def steps(self, count, gain=100.0):
        for _ in range(count):
            self.watch.log(loss=self.task.gradient(self.number, gain))
            self.optimizer.step()
            self.number += 1

    def writes(self, *pairs, text=None):
        """Writes the file and waits until it was looked at."""
        text = self._text if text is None else text
        for before, after in pairs:
            assert before in text
            text = text.replace(before, after)
        self._text = text
        self.path.write_text(text)
        status = self.path.stat()
        os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))
        deadline = time.monotonic() + 5
        file = self.watch.pipeline.reloading._file
        while file._loaded != file._stamp():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.watch.flush()  # the look at the file that found it is over

    def events(self):
        self.watch.flush()
        return [a for r in self.watch.history(256) for a in r.anomalies if a.kind == "policy"]


def test_a_limit_holds_from_the_next_step_on(run):
    run.begins()
    run.steps(5)
    run.writes(("limit: 1.0", "limit: 0.5"))
    run.steps(5)
    clipped = [r.total_norm_clipped for r in run.watch.history(10)]
    assert clipped == pytest.approx([1.0] * 5 + [0.5] * 5, rel=1e-5)
    assert [r.limits["global"] for r in run.watch.history(10)] == [1.0] * 5 + [0.5] * 5


def test_it_is_an_event_of_its_first_step_in_metrics_and_recording_and_the_log_shows_it_by_default(
    run, caplog
):
    run.begins()
    run.steps(5)
    run.writes(("limit: 1.0", "limit: 0.5"), ("patience: 5", "patience: 7"))
    run.steps(3)
    (event,) = run.events()
    assert (event.step, event.level) == (5, "event")
    assert event.message == (
        "the policy has changed from this step on: guard.patience 5 -> 7, clip[0].limit 1.0 -> 0.5"
    )
    logged = [(one.levelno, one.getMessage()) for one in caplog.records]
    assert logged == [(logging.WARNING, f"step 5: {event.message}")]
    after = load_policy(run.path)
    assert run.watch.info.policy_sha256 == after.sha256
    snapshot = run.watch.pipeline.tally.snapshot()
    assert snapshot.labelled["events_total"]["policy", "event"] == 1
    assert snapshot.info.policy_sha256 == after.sha256
    run.watch.close()
    with gradwatch.open_recording(run.path.parent) as recording:
        assert [(a.kind, a.step, a.message) for a in recording.anomalies()] == [
            ("policy", 5, event.message)
        ]
        assert recording.policies() == [(5, after.canonical_yaml())]


def test_a_bad_file_keeps_the_policy_and_says_why(run, caplog):
    run.begins()
    run.steps(5)
    before = run.watch.info.policy_sha256
    run.writes(("limit: 1.0", "limit: -1"))
    run.steps(2)
    (refused,) = run.events()
    assert refused.level == "warning"
    assert "policy.yaml:4:6: clip[0].limit must be > 0. Received: -1" in refused.message
    assert "the policy file was refused, the policy stays as it is" in caplog.text
    assert run.watch.latest.limits["global"] == 1.0
    assert run.watch.info.policy_sha256 == before
    run.writes(("limit: -1", "limit: 0.5"))
    run.steps(1)
    assert run.watch.latest.limits["global"] == 0.5


def test_a_file_that_is_another_policy_is_refused(run):
    run.begins()
    run.steps(2)
    run.writes(("per: layer", "per: tensor"))
    run.steps(2)
    (refused,) = run.events()
    assert "clip[1].per cannot change while the run goes on, only numbers can." in refused.message


def test_a_file_that_is_only_touched_changes_nothing(run):
    run.begins()
    run.steps(2)
    run.writes()
    run.steps(2)
    assert run.events() == []


def test_what_was_learnt_is_kept(run):
    run.begins()
    run.steps(20)
    before = run.watch._engine.state_dict()["rules"]["learns"]
    run.writes(("z: 4", "z: 8"))
    run.steps(1)
    history = run.watch.history(2)
    assert history[1].limits["learns"] > history[0].limits["learns"] * 1.1
    after = run.watch._engine.state_dict()["rules"]["learns"]
    assert np.array_equal(after["count"], before["count"] + 1)


def test_the_limit_of_the_warm_up_changes_with_its_number(run):
    run.begins(POLICY.replace("warmup: 4", "warmup: 40, until: 0.5"))
    run.steps(2)
    run.writes(("until: 0.5", "until: 0.25"))
    run.steps(1)
    assert [r.limits["learns"] for r in run.watch.history(3)] == [0.5, 0.5, 0.25]


def test_a_history_of_another_length_begins_anew_and_says_so(run, caplog):
    text = POLICY.replace("z: 4, warmup: 4", "z: 4, space: raw, window: 8, warmup: 4")
    run.begins(text)
    run.steps(10)
    run.writes(("window: 8", "window: 16"))
    run.steps(1)
    assert "the histories of learns were not saved, or learn in another way now" in caplog.text
    assert run.watch.latest.limits["learns"] == float("inf")


def test_detectors_judge_by_the_new_numbers_with_the_baseline_that_they_have(run):
    run.begins("version: 1\ndetect: {spike: {times: 1000}}\n")
    run.steps(60, gain=1.0)
    run.steps(1, gain=200.0)
    run.watch.flush()
    assert [a.kind for a in run.watch.latest.anomalies] == []
    run.writes(("times: 1000", "times: 10"))
    run.steps(1, gain=1.0)
    run.steps(1, gain=200.0)
    run.watch.flush()
    assert [a.kind for a in run.watch.latest.anomalies] == ["spike"]


def test_more_micro_batches_begin_with_the_next_window(run):
    run.begins("version: 1\naccumulate: {steps: 2}\nclip: [{limit: 1000}]\n")
    run.steps(3, gain=1.0)
    run.writes(("steps: 2", "steps: 3"))
    run.steps(1 + 6, gain=1.0)
    assert [r.micro_batches for r in run.watch.history(9)] == [2, 2, 3, 3]


def test_patience_holds_from_the_next_step_on(run):
    run.begins("version: 1\nguard: {patience: 100}\n")
    run.steps(4, gain=float("nan"))
    run.writes(("patience: 100", "patience: 5"))
    run.steps(1, gain=float("nan"))
    with pytest.raises(gradwatch.TrainingStopped, match="patience"):
        run.steps(1, gain=float("nan"))


def test_a_run_whose_policy_was_changed_is_replayed_with_its_changes(run):
    run.begins(POLICY.replace("limit: 1.0", "limit: 1000"))
    run.steps(20, gain=1.0)
    run.writes(("limit: 1000", "limit: 0.05"), ("z: 4", "z: 1"))
    run.steps(20, gain=1.0)
    run.watch.close()
    with gradwatch.open_recording(run.path.parent) as recording:
        records, info, changes = list(recording), recording.info, recording.policies()
    found = replay(records, info, load_policy(run.path), changes)
    assert found.is_the_one_that_ran
    assert found.differences == []
    assert "the policy was changed at step 20 and is replayed with its changes" in found.notes
    assert any(record.fired for record in records[20:])


def test_a_failure_to_change_leaves_the_policy_as_it_is(run, monkeypatch):
    run.begins()
    run.steps(2)
    monkeypatch.setattr(run.watch._engine, "change", lambda policy: 1 / 0)
    run.writes(("limit: 1.0", "limit: 0.5"))
    run.steps(2)
    assert run.watch.latest.limits["global"] == 1.0
    errors = run.watch.pipeline.tally.snapshot().labelled["hook_errors_total"]
    assert errors["apply",] == 1


def test_a_policy_that_is_no_file_is_not_looked_at(attach, task):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, {"version": 1, "clip": [{"limit": 1}]})
    assert watch.pipeline.reloading is None
