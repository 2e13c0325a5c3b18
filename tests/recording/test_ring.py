"""The ring: a queue between two threads, and the memory that survives the process."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradwatch.errors import RecordingError
from gradwatch.recording.ring import Ring, read_ring


def steps(records):
    return [record.step for record in records]


def test_every_field_of_a_row_comes_back(info, row):
    ring = Ring(info, None)
    coefs, present = np.array([1, 0.5, 1], np.float32), np.array([True, True, False])
    given_row = row(
        7, skipped=4, loss_scale=1024.0, tensor_coefs_P=coefs, present_P=present, fired=0b11
    )
    ring.append(given_row, {"loss": 0.75, "größe": -math.inf})
    ring.close()
    (record,) = ring.take()
    for name in ("step", "time", "duration_seconds", "overhead_seconds", "total_norm",
                 "total_norm_clipped", "clip_coef", "micro_batches", "weight", "loss_scale",
                 "learning_rate"):  # fmt: skip
        assert getattr(record, name) == getattr(given_row, name), name
    assert record.fired == ("global", "tall")
    assert record.skipped == "tall"
    assert record.clipped
    assert record.limits == {"global": 1.0, "tall": 2.0}
    assert record.scalars == {"loss": 0.75, "größe": -math.inf}
    assert record.tensor_norms_P.tolist() == [7, 2, 3]
    assert record.tensor_coefs_P.tolist() == [1, 0.5, 1]
    assert record.present_P.tolist() == [True, True, False]
    assert record.layers == ("embed", "höhe")


def test_a_row_without_coefs_was_not_clipped_and_without_presence_is_all_there(info, row):
    ring = Ring(info, None)
    ring.append(row(0), {})
    (record,) = ring.peek(1)
    assert not record.clipped
    assert record.skipped is None
    assert record.tensor_coefs_P.tolist() == [1, 1, 1]
    assert record.present_P.all()


def test_the_newest_record_is_taken_only_once_it_is_closed(info, row):
    ring = Ring(info, None)
    ring.append(row(0), {})
    assert ring.take() == []
    ring.log("loss", 1.0)
    ring.append(row(1), {})
    ring.log("loss", 2.0)
    (first,) = ring.take()
    assert first.scalars == {"loss": 1.0}
    ring.close()
    ring.log("loss", 3.0)
    (second,) = ring.take()
    assert second.scalars == {"loss": 2.0}, "a closed record is not amended"


def test_a_taken_record_does_not_change_when_its_slot_is_used_again(info, row):
    ring = Ring(info, None, slots=2)
    ring.append(row(0), {"loss": 5.0})
    ring.close()
    (record,) = ring.take()
    for step in range(1, 5):
        ring.append(row(step), {})
    assert record.step == 0
    assert record.tensor_norms_P[0] == 0


def test_what_is_overwritten_before_it_is_taken_is_counted(info, row):
    ring = Ring(info, None, slots=8)
    for step in range(21):
        ring.append(row(step), {})
    # 20 are closed; the open one has taken the slot of one more.
    assert steps(ring.take()) == list(range(13, 20))
    assert ring.dropped == 13
    ring.close()
    assert steps(ring.take()) == [20]
    assert ring.dropped == 13


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.sampled_from(["append", "log", "take", "close", "peek"]), max_size=60))
def test_any_order_of_moves_loses_nothing_that_is_not_counted(info, row, moves):
    ring = Ring(info, None, slots=4)
    logged: dict[int, float] = {}
    taken = []
    begun = 0
    is_open = False
    for value, move in enumerate(moves):
        if move == "append":
            ring.append(row(begun), {})
            begun, is_open = begun + 1, True
        elif move == "log":
            ring.log("loss", float(value))
            if is_open:
                logged[begun - 1] = float(value)
        elif move == "close":
            ring.close()
            is_open = False
        elif move == "peek":
            assert steps(ring.peek(3)) == list(range(max(0, begun - 3), begun))
        else:
            taken += ring.take()
    ring.close()
    taken += ring.take()
    assert len(taken) + ring.dropped == begun
    assert steps(taken) == sorted(set(steps(taken)))
    for record in taken:
        assert record.scalars.get("loss") == logged.get(record.step)


def test_a_consumer_beside_a_racing_producer_never_sees_a_torn_row(info, row):
    ring = Ring(info, None, slots=16)
    total = 20_000
    rows = [
        row(step, total_norm=float(step), tensor_norms_P=np.full(3, step, np.float32))
        for step in range(total)
    ]

    def produce() -> None:
        for each in rows:
            ring.append(each, {})
        ring.close()

    producer = threading.Thread(target=produce)
    producer.start()
    taken = []
    while producer.is_alive():
        taken += ring.take()
    producer.join()
    taken += ring.take()
    assert len(taken) + ring.dropped == total
    assert all((record.tensor_norms_P == record.step).all() for record in taken)
    assert all(record.total_norm == record.step for record in taken)


def test_names_beyond_32_or_64_bytes_are_refused_with_one_warning_each(info, row, caplog):
    ring = Ring(info, None)
    ring.append(row(0), {})
    with caplog.at_level(logging.WARNING, "gradwatch"):
        for _ in range(2):
            ring.log("x" * 65, 1.0)
            for i in range(33):
                ring.log(f"name{i}", float(i))
    (record,) = ring.peek(1)
    assert record.scalars == {f"name{i}": float(i) for i in range(32)}
    assert len(caplog.records) == 2


def test_a_file_holds_all_that_is_needed_to_read_it(info, row, tmp_path):
    ring = Ring(info, tmp_path / "a.ring")
    for step in range(3):
        ring.append(row(step), {"loss": step / 2})
    found, records = read_ring(tmp_path / "a.ring")
    assert found == info
    assert steps(records) == [0, 1, 2], "the open record is there too"
    assert [record.scalars["loss"] for record in records] == [0, 0.5, 1]


def test_a_file_is_never_written_over_and_release_removes_it(info, tmp_path):
    ring = Ring(info, tmp_path / "a.ring")
    with pytest.raises(FileExistsError):
        Ring(info, tmp_path / "a.ring")
    ring.release()
    assert not (tmp_path / "a.ring").exists()


@pytest.mark.parametrize("keep", [0, 10, 60, 500, 3000])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(info, row, tmp_path, keep):
    Ring(info, tmp_path / "a.ring").append(row(0), {})
    whole = (tmp_path / "a.ring").read_bytes()
    (tmp_path / "b.ring").write_bytes(whole[:keep])
    with pytest.raises(RecordingError, match=r"b\.ring"):
        read_ring(tmp_path / "b.ring")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(at=st.integers(0, 4000), junk=st.binary(min_size=1, max_size=40))
def test_a_damaged_file_gives_records_or_a_recording_error(info, row, tmp_path, at, junk):
    path = tmp_path / "a.ring"
    path.unlink(missing_ok=True)
    ring = Ring(info, path)
    for step in range(3):
        ring.append(row(step), {"loss": 1.0})
    content = bytearray(path.read_bytes())
    content[at : at + len(junk)] = junk
    path.write_bytes(bytes(content))
    try:
        _, records = read_ring(path)
    except RecordingError:
        return
    assert len(records) <= 257


def test_a_missing_and_a_foreign_file_are_recording_errors(tmp_path):
    with pytest.raises(RecordingError, match="cannot be read"):
        read_ring(tmp_path / "none.ring")
    (tmp_path / "foreign.ring").write_bytes(b"SQLite format 3\0" * 100)
    with pytest.raises(RecordingError, match="not a ring of gradwatch"):
        read_ring(tmp_path / "foreign.ring")


WRITER = """
import sys, pathlib, numpy as np
from gradwatch.recording.ring import Ring, Row
from gradwatch.records import Layout, Parameter, RunInfo

info = RunInfo(run="w", layout=Layout.of([Parameter(name="a.b", shape=(3,))] * 200))
ring = Ring(info, pathlib.Path(sys.argv[1]))
same = dict.fromkeys(Row.__annotations__, 0) | {"tensor_coefs_P": None, "present_P": None}
print("ready", flush=True)
for step in range(10**9):
    changing = {"step": step, "total_norm": step, "limits": []}
    norms = np.full(200, step, dtype=np.float32)
    ring.append(Row(**same | changing | {"tensor_norms_P": norms}), {})
"""


def test_another_process_reads_whole_rows_while_they_are_written_and_after_a_kill(tmp_path):
    path = tmp_path / "live.ring"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    seen = 0
    for attempt in range(60):
        if attempt == 50:
            writer.kill()
            writer.wait()
        _, records = read_ring(path)
        for record in records:
            assert (record.tensor_norms_P == np.float32(record.step)).all()
            assert record.total_norm == record.step
        assert steps(records) == sorted(set(steps(records)))
        seen = max([seen, *steps(records)])
    writer.stdout.close()
    assert seen > 1000
    assert len(records) >= 255
