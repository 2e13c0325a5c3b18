"""Our own failures: training goes on where we only look, `on_error` holds where we enforce."""

from __future__ import annotations

import logging

import pytest
import torch

import gradwatch

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


def sgd(task):
    return torch.optim.SGD(task.model.parameters(), lr=0.1)


def breaking(watch, monkeypatch, verb: str) -> None:
    """Makes one verb of the backend raise from now on."""

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(watch._engine._backend, verb, broken)


@pytest.mark.parametrize("verb", ["gather", "measure", "host"])
def test_an_observing_watch_that_fails_changes_nothing(task, attach, monkeypatch, caplog, verb):
    other = task.copy()
    optimizer, plain = sgd(task), sgd(other)
    watch = attach(task.model, optimizer)
    breaking(watch, monkeypatch, verb)
    with caplog.at_level(logging.ERROR, "gradwatch"):
        for step in range(6):
            task.gradient(step)
            optimizer.step()
            other.gradient(step)
            plain.step()
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert caplog.text.count("MemoryError: no room); training goes on") == 1


def test_an_enforcing_watch_that_fails_three_times_in_a_row_stops_the_run(
    task, attach, monkeypatch
):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    breaking(watch, monkeypatch, "measure")
    for step in range(2):
        task.gradient(step)
        optimizer.step()
    with pytest.raises(gradwatch.TrainingStopped, match="failed 3 times in a row to measure") as e:
        optimizer.step()
    assert e.value.reason == "on_error"


def test_on_error_observe_goes_on_and_says_that_it_no_longer_enforces(
    task, attach, monkeypatch, caplog
):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, {**CLIP, "guard": {"on_error": "observe"}})
    breaking(watch, monkeypatch, "scale")
    with caplog.at_level(logging.CRITICAL, "gradwatch"):
        for step in range(6):
            task.gradient(step, 100.0)
            optimizer.step()
    assert not watch.enforcing
    assert caplog.text.count("the policy is no longer enforced") == 1
    assert len(watch.history(10)) == 6


def test_what_is_no_longer_enforced_is_recorded_as_it_is(task, attach, monkeypatch, caplog):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, {**CLIP, "guard": {"on_error": "observe"}})
    breaking(watch, monkeypatch, "scale")
    for step in range(3):
        task.gradient(step, 100.0)
        optimizer.step()
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING, "gradwatch"):
        for factor in (100.0, float("nan")):
            task.gradient(3, factor)
            optimizer.step()
        watch.flush()
    large, bad = watch.history(2)
    assert (large.clipped, large.clip_coef, large.fired) == (False, 1.0, ("global",))
    assert large.total_norm_clipped == large.total_norm > 1.0
    assert bad.skipped is None
    assert watch.skipped is None
    assert any(parameter.isnan().any() for parameter in task.parameters())
    watch.close()
    assert "nonfinite" in caplog.text
    assert "the step was skipped" not in caplog.text


def test_two_failures_then_a_good_step_are_forgiven(task, attach, monkeypatch):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    measure = watch._engine._backend.measure
    for step, works in enumerate([False, False, True, False, False, True]):
        if works:
            monkeypatch.setattr(watch._engine._backend, "measure", measure)
        else:
            breaking(watch, monkeypatch, "measure")
        task.gradient(step)
        optimizer.step()
    assert watch.enforcing


def test_a_directory_that_cannot_be_written_costs_only_the_recording(
    task, attach, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    optimizer = sgd(task)
    with caplog.at_level(logging.ERROR, "gradwatch"):
        watch = attach(task.model, optimizer, recording=tmp_path / "file" / "runs")
    task.gradient(0)
    optimizer.step()
    assert watch.recording is None
    assert watch.latest is not None
    assert "failed to do its recording" in caplog.text


def test_without_a_free_port_nothing_is_served_and_training_goes_on(task, attach, caplog):
    optimizer = sgd(task)
    with caplog.at_level(logging.WARNING, "gradwatch"):
        watch = attach(task.model, optimizer, port=0, host="256.0.0.1")
    task.gradient(0)
    optimizer.step()
    assert watch.url is None
    assert watch.latest is not None
    assert caplog.records
