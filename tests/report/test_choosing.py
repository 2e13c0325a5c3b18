"""Which recording a report is of where none is named."""

from __future__ import annotations

import os
import shutil
import time

import pytest

import gradwatch
from gradwatch.cli import app
from gradwatch.recording.store import Store, new_recording_path
from gradwatch.records import Layout, Parameter, RunInfo

LAYOUT = Layout.of([Parameter(name="a.weight")])
BEGAN = 1_700_000_000.0


@pytest.fixture
def record(tmp_path, monkeypatch):
    """`record("name")` in a directory that is the present one; the later ones are the newer."""
    monkeypatch.chdir(tmp_path)
    written = []

    def make(run: str, *, rank: int = 0, started: float = BEGAN, folder="gradwatch-runs"):
        path = new_recording_path(folder, run, rank, started)
        Store(path, RunInfo(run=run, layout=LAYOUT, rank=rank, started=started)).close()
        written.append(path)
        os.utime(path, (started + len(written), started + len(written)))
        return path

    return make


def asked(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        app(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.splitlines(), err.splitlines()


def test_without_an_argument_it_is_of_the_newest_run_and_says_so(record, capsys):
    record("older")
    newest = record("newer", started=BEGAN + 3600)
    code, out, err = asked(capsys)
    assert code == 0
    assert out[0].startswith("run newer, ")
    assert err == [f"{newest}: the newest of 2 runs in gradwatch-runs"]


def test_a_directory_of_one_run_is_as_good_as_its_recording(record, capsys):
    path = record("one", folder="elsewhere")
    code, out, err = asked(capsys, "elsewhere")
    assert code == 0
    assert out[0].startswith("run one, ")
    assert err == [f"{path}: the only run in elsewhere"]


def test_the_ranks_of_a_run_are_one_run_and_its_lowest_is_taken(record, capsys):
    path = record("one")
    for rank in (1, 2):
        record("one", rank=rank, started=BEGAN + rank)
    assert asked(capsys, "gradwatch-runs")[2] == [f"{path}: the only run in gradwatch-runs"]


def test_of_a_directory_of_several_runs_it_is_of_the_newest_and_says_so(record, capsys):
    older = [record("one"), record("one", rank=1)]
    again = record("one", started=BEGAN + 60)
    shutil.copy(older[0], again.with_name("two words.sqlite"))
    code, _, err = asked(capsys, "gradwatch-runs")
    assert code == 0
    newest = again.with_name("two words.sqlite")
    assert err == [f"{newest}: the newest of 3 runs in gradwatch-runs"]


def test_the_newest_run_is_the_one_that_started_last_though_an_older_one_still_writes(
    record, capsys
):
    newest = record("short", started=BEGAN + 3600)
    record("long")
    record("long", rank=1, started=BEGAN + 1)
    assert asked(capsys)[2] == [f"{newest}: the newest of 2 runs in gradwatch-runs"]
    with gradwatch.open_recording("gradwatch-runs") as opened:
        assert opened.path == newest


def test_a_file_that_does_not_say_when_it_began_has_the_time_of_its_last_write(record, capsys):
    named = record("named", started=BEGAN + 3600)
    odd = record("odd").rename("gradwatch-runs/odd.sqlite")
    for written, newest in ((BEGAN + 3000, named), (BEGAN + 4000, odd)):
        os.utime(odd, (written, written))
        assert asked(capsys)[2] == [f"{newest}: the newest of 2 runs in gradwatch-runs"]


def test_the_name_of_a_run_is_its_last_start_on_the_lowest_rank_and_the_file_is_said(
    record, capsys
):
    record("boom")
    record("boom", rank=1, started=BEGAN + 3601)
    path = record("boom", started=BEGAN + 3600)
    record("other", started=BEGAN + 7200)
    code, out, err = asked(capsys, "boom")
    assert code == 0
    assert out[0].startswith("run boom, rank 0: ")
    assert err == [f"{path}: the last of 2 runs called boom in gradwatch-runs"]


@pytest.mark.parametrize("name", ["lr 0.1 / b", "lr_0.1_b"])
def test_a_run_is_found_by_the_name_it_was_given_and_by_that_of_its_files(record, capsys, name):
    path = record("lr 0.1 / b")
    assert asked(capsys, name)[2] == [f"{path}: the only run called lr_0.1_b in gradwatch-runs"]


def test_a_file_or_directory_comes_before_a_run_of_its_name(record, capsys):
    record("boom")
    path = record("one", folder="boom")
    assert asked(capsys, "boom")[2] == [f"{path}: the only run in boom"]


def test_a_rank_belongs_to_the_start_that_is_nearest(record, capsys):
    record("gpt")  # a try of one process, two minutes before
    record("gpt", started=BEGAN + 121)
    record("gpt", rank=1, started=BEGAN + 120)
    code, _, err = asked(capsys)
    assert code == 0
    assert "rank0.sqlite: the newest of 2 runs in" in err[0]
    assert time.strftime("%H%M%S", time.localtime(BEGAN + 121)) in err[0]


def test_what_cannot_be_read_hides_no_run(record, capsys):
    good = record("good")
    good.with_name("gone.sqlite").symlink_to("/nowhere/at/all.sqlite")
    good.with_name("again.sqlite").symlink_to(good.name)
    assert asked(capsys)[2] == [f"{good}: the only run in gradwatch-runs"]
    good.with_name("bad-20300101-000000-rank0.sqlite").write_bytes(b"no recording")
    code, _, err = asked(capsys)
    assert code == 0
    assert err == [
        f"{good}: the newest that can be read (bad-20300101-000000-rank0.sqlite cannot) "
        "of 2 runs in gradwatch-runs"
    ]


@pytest.mark.parametrize("command", ["report", "top"])
def test_where_no_run_has_the_name_the_error_says_which_names_there_are(record, capsys, command):
    for number in range(23):
        record(f"run{number:02}", started=BEGAN - number)
    record("run00", rank=1)
    with pytest.raises(SystemExit) as ended:
        app([command, "boom"])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    names = ", ".join(f"run{number:02}" for number in range(20))
    assert (
        "boom: no such recording or directory, and no run of this name in gradwatch-runs/" in said
    )
    assert said.endswith(f"There are: {names} and 3 more")


@pytest.mark.parametrize("command", ["report", "top"])
def test_a_name_where_no_run_was_recorded_says_where_one_would_be(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app([command, "boom"])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "boom: no such recording or directory" in said
    assert "A run makes gradwatch-runs/ in the directory that it is started in" in said


def test_the_terminal_takes_the_name_of_a_run_too(record, capsys):
    record("boom")
    record("other", started=BEGAN + 60)
    with pytest.raises(SystemExit):
        app(["top", "--once", "boom"])
    shown = capsys.readouterr().out
    assert shown.startswith("boom, rank 0: ")
    assert "the only run called boom in gradwatch-runs" in shown


@pytest.mark.parametrize("command", ["report", "top", "serve"])
def test_without_a_directory_of_recordings_it_says_where_one_would_be(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app([command])
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "A run makes gradwatch-runs/ in the directory that it is started in" in said


def test_the_terminal_shows_the_same_run_and_says_so(record, capsys):
    record("older")
    record("one", started=BEGAN + 60)
    record("one", rank=1, started=BEGAN + 61)
    with pytest.raises(SystemExit) as ended:
        app(["top", "--once"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert shown.startswith("one, rank 0: ")
    assert "the newest of 2 runs in gradwatch-runs" in shown
