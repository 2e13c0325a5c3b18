"""Which recording a report is of where none is named."""

from __future__ import annotations

import os
import shutil

import pytest

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
