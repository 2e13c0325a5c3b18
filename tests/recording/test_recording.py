"""Recordings: what was stored comes back, whatever happened to the writer or the file."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import RecordingError
from gradwatch.recording.export import export_recording
from gradwatch.recording.reader import open_recording
from gradwatch.recording.ring import Ring
from gradwatch.recording.store import Store, new_recording_path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.sqlite"


@pytest.fixture
def store(path, info):
    store = Store(path, info)
    yield store
    store.close()


def assert_equal(found, expected):
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert np.array_equal(a, b, equal_nan=True), field.name
            assert a.dtype == b.dtype, field.name
        elif isinstance(b, float) and math.isnan(b):
            assert math.isnan(a), field.name
        else:
            assert a == b, field.name


def test_every_field_of_a_record_comes_back(store, path, record, anomaly):
    plain = record(0)
    rich = record(
        1,
        total_norm=math.inf,
        total_norm_clipped=2.5,
        clip_coef=0.125,
        fired=("tall",),
        clipped=True,
        skipped="tall",
        tensor_norms_P=np.array([np.inf, np.nan, 1e-40], np.float32),
        tensor_coefs_P=np.array([0.5, 1, 0.25], np.float32),
        present_P=np.array([True, False, True]),
        limits={"global": 0.5, "tall": 3.0},
        micro_batches=4,
        weight=17.0,
        loss_scale=65536.0,
        learning_rate=1e-3,
        duration_seconds=0.25,
        overhead_seconds=1e-5,
        scalars={"loss": -math.inf, 'a "b" ü': 2.0, "none": 7.0},
        anomalies=(anomaly(1), anomaly(1, "nonfinite")),
    )
    evenly = record(2, clipped=True, tensor_coefs_P=np.full(3, 0.75, np.float32))
    store.add([plain, rich, evenly])
    with open_recording(path) as recording:
        found = list(recording)
    assert len(found) == 3
    for actual, expected in zip(found, [plain, rich, evenly], strict=True):
        anomalies = [dataclasses.replace(a, expected=0) for a in actual.anomalies]
        assert anomalies == [dataclasses.replace(a, expected=0) for a in expected.anomalies]
        assert_equal(
            dataclasses.replace(actual, anomalies=()), dataclasses.replace(expected, anomalies=())
        )


def test_what_a_recording_tells_about_the_run(store, path, info, record, anomaly):
    store.add([record(0), record(1, anomalies=(anomaly(1),))])
    with open_recording(path) as recording:
        assert recording.info == info
        assert recording.layers == ("embed", "höhe")
        assert recording.rules == ("global", "tall")
        assert recording.state == "running"
        assert len(recording) == 2
        assert [a.kind for a in recording.anomalies()] == ["exploding"]
        assert repr(recording) == f"Recording({info.run!r}, 2 steps, 2 layers, running, 1 anomaly)"
        store.note_state("finished")
        assert recording.state == "finished"


def test_a_recording_is_read_while_it_is_written(store, path, record):
    with open_recording(path) as recording:
        assert list(recording) == []
        for step in range(3):
            store.add([record(step)])
            assert [r.step for r in recording] == list(range(step + 1))


def test_ranges_series_and_norms(store, path, record):
    store.add([record(step, total_norm=float(step) or math.nan) for step in range(10)])
    with open_recording(path) as recording:
        assert [r.step for r in recording.records(3, 6)] == [3, 4, 5]
        assert [r.step for r in recording.last(2)] == [8, 9]
        assert recording.last(0) == []
        steps, values = recording.series("total_norm")
        assert steps.tolist() == list(range(10))
        assert math.isnan(values[0])
        assert values[1:].tolist() == list(range(1, 10))
        steps, norms = recording.norms()
        assert norms.shape == (10, 2)
        assert norms[4, 1] == pytest.approx(math.hypot(2, 4))
        with pytest.raises(KeyError, match="total_norm"):
            recording.series("norms; DROP TABLE steps")


def test_a_step_that_comes_again_after_a_resume_loses_no_row(store, path, record):
    store.add([record(0), record(1), record(2)])
    store.add([record(1, time=2e9), record(2, time=2e9 + 1)])
    with open_recording(path) as recording:
        assert [r.step for r in recording] == [0, 1, 2, 1, 2]


def test_what_only_the_ring_holds_is_merged(store, path, info, row, record):
    ring = Ring(info, path.with_suffix(".ring"))
    for step in range(5):
        ring.append(row(step), {"loss": float(step)})
    store.add(ring.take()[:3])
    with open_recording(path) as recording:
        assert len(recording) == 5
        assert [r.step for r in recording] == [0, 1, 2, 3, 4]
        assert [r.step for r in recording.last(3)] == [2, 3, 4]
        assert [r.scalars["loss"] for r in recording] == [0, 1, 2, 3, 4]
        assert recording.series("total_norm")[0].tolist() == [0, 1, 2, 3, 4]


def test_a_recording_whose_first_transaction_never_happened_is_read_from_its_ring(path, info, row):
    path.touch()
    ring = Ring(info, path.with_suffix(".ring"))
    ring.append(row(0), {})
    with open_recording(path) as recording:
        assert [r.step for r in recording] == [0]
        assert recording.state == "running"
        assert recording.anomalies() == []


def test_a_directory_opens_its_newest_recording(tmp_path, info, record):
    for age, name in enumerate(["a", "b"]):
        store = Store(tmp_path / f"{name}.sqlite", info)
        store.add([record(age)])
        store.close()
        os.utime(tmp_path / f"{name}.sqlite", (2e9 - age, 2e9 - age))
    with open_recording(tmp_path) as recording:
        assert recording.path.name == "a.sqlite"


@pytest.mark.parametrize(
    "content",
    [b"", b"SQLite format 3\0", b"SQLite format 3\0" + b"\1" * 5000, b"hello", os.urandom(8192)],
    ids=["empty", "cut short", "damaged", "text", "noise"],
)
def test_what_is_no_recording_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "odd.sqlite"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"odd\.sqlite"):
        open_recording(path)


def test_a_missing_recording_and_an_empty_directory_are_errors_that_say_so(tmp_path):
    with pytest.raises(RecordingError, match="no such recording"):
        open_recording(tmp_path / "none.sqlite")
    with pytest.raises(RecordingError, match="no recording"):
        open_recording(tmp_path)


def test_a_foreign_database_and_a_newer_schema_are_refused(tmp_path, store, path):
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE users (name)")
    foreign.commit()
    foreign.close()
    with pytest.raises(RecordingError, match=r"foreign\.sqlite"):
        open_recording(tmp_path / "foreign.sqlite")
    store._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(RecordingError, match=r"schema 99.*Upgrade gradwatch"):
        open_recording(path)


def test_the_file_stays_within_its_bound_and_keeps_the_steps_of_anomalies(
    path, info, record, anomaly
):
    bound = 300_000
    store = Store(path, info, max_bytes=bound)
    steps = 0
    for _ in range(200):
        batch = []
        for _ in range(50):
            found = (anomaly(steps),) if steps == 3 else ()
            batch.append(record(steps, scalars={"loss": 1.0}, anomalies=found))
            steps += 1
        store.add(batch)
        assert store.bytes < bound * 1.1
    assert path.stat().st_size < bound * 1.3, "freed pages are used again"
    store.close()
    with open_recording(path) as recording:
        kept = [r.step for r in recording]
        assert kept[0] == 3
        assert kept[1:] == list(range(steps - len(kept) + 1, steps)), "the oldest went first"
        assert len(recording.anomalies()) == 1


def test_a_file_that_exists_is_never_written_over(store, path, info):
    with pytest.raises(FileExistsError):
        Store(path, info)


def test_a_full_disk_is_a_recording_error_and_the_next_batch_may_succeed(store, path, record):
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RecordingError, match="400 steps were not stored"):
        store.add([record(step) for step in range(400)])
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    store.add([record(400)])
    with open_recording(path) as recording:
        assert [r.step for r in recording] == [400]


def test_without_shared_memory_the_rollback_journal_does_the_work(path, info, record):
    """`locking_mode` and WAL aside, a store needs nothing that a network file system lacks."""
    store = Store(path, info)
    assert store._connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0] == "delete"
    store.add([record(0)])
    with open_recording(path) as recording:
        assert [r.step for r in recording] == [0]
    store.close()


@pytest.mark.parametrize(
    "run", ["../../etc/passwd", "a/b", "", ".", "x" * 500, "<script>", "ü ☃", "a\0b", "CON"]
)
def test_any_run_name_gives_a_file_inside_the_directory(tmp_path, run):
    first = new_recording_path(tmp_path / "runs", run, 0, 1e9)
    assert first.parent == tmp_path / "runs"
    assert len(first.name) < 140
    first.touch()
    second = new_recording_path(tmp_path / "runs", run, 0, 1e9)
    assert second != first


def table(recording, **options) -> list[dict[str, str]]:
    out = io.StringIO()
    export_recording(recording, out, **options)
    return list(csv.DictReader(io.StringIO(out.getvalue())))


def test_csv_has_a_row_a_step_and_a_column_for_every_layer_and_scalar(store, path, record, anomaly):
    store.add([record(0), record(1, scalars={"loss": 0.5}, anomalies=(anomaly(1),))])
    with open_recording(path) as recording:
        rows = table(recording)
        assert [row["step"] for row in rows] == ["0", "1"]
        assert rows[1]["scalar/loss"] == "0.5"
        assert rows[0]["scalar/loss"] == ""
        assert rows[1]["anomalies"] == "exploding"
        assert float(rows[1]["grad_norm/höhe"]) == pytest.approx(math.hypot(2, 1))
        assert rows[0]["limit/tall"] == "9.0"
        assert not [name for name in table(recording, layers=False)[0] if "grad_norm/" in name]


def test_parquet_holds_the_same_table(store, path, record, tmp_path):
    import pandas

    store.add([record(0), record(1, scalars={"loss": 0.5})])
    with open_recording(path) as recording:
        export_recording(recording, tmp_path / "out.parquet", "parquet")
        frame = recording.to_pandas()
    loaded = pandas.read_parquet(tmp_path / "out.parquet").set_index("step")
    assert loaded["total_norm"].tolist() == [3.5, 3.5]
    pandas.testing.assert_frame_equal(loaded, frame)


def test_without_pandas_the_way_out_is_named(store, path, record):
    store.add([record(0)])
    code = """
import sys
import time
sys.modules["pandas"] = None
from gradwatch.recording.reader import open_recording
from gradwatch.recording.export import export_recording
from gradwatch.errors import RecordingError
import pathlib
with open_recording(sys.argv[1]) as recording:
    for call in (recording.to_pandas,
                 lambda: export_recording(recording, pathlib.Path("x"), "parquet")):
        try:
            call()
        except (ImportError, RecordingError) as error:
            print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("pip install 'gradwatch[pandas]'") == 2


def test_a_directory_means_the_recording_that_was_written_to_last(tmp_path, info, record):
    live = Store(tmp_path / "live.sqlite", info)
    ended = Store(tmp_path / "ended.sqlite", info)
    ended.add([record(0)])
    ended.close()
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "live.sqlite", (hour_ago, hour_ago))
    time.sleep(0.02)
    live.add([record(0)])
    with open_recording(tmp_path) as found:
        assert found.path.name == "live.sqlite"
    live.close()
