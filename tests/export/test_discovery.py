"""The file that Prometheus finds a run by."""

from __future__ import annotations

import json
import os
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest

from gradwatch.export.addresses import reachable
from gradwatch.export.discovery import ABANDONED_SECONDS, Discovery, scheduler_labels
from gradwatch.export.exporter import Exporter


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_USER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def announce(info_of, tmp_path):
    """Announces a run in tmp_path; all are closed in the end."""
    made = []

    def announced(authority="127.0.0.1:9464", **fields) -> Discovery:
        made.append(Discovery(tmp_path, info_of(**fields), authority))
        return made[-1]

    yield announced
    for one in made:
        one.close()


def aged(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_the_file_says_where_which_run_and_which_rank(busy_tally, tmp_path, get):
    with closing(Exporter(busy_tally(), port=0, directory=tmp_path)) as exporter:
        (path,) = tmp_path.glob("*.json")
        (entry,) = json.loads(path.read_text())
        assert entry["labels"] == {"run": "test-run", "rank": "0"}
        assert entry["targets"] == [f"127.0.0.1:{exporter.port}"]
        assert get(f"http://{entry['targets'][0]}/metrics").status == 200
    assert list(tmp_path.iterdir()) == []


def test_where_all_interfaces_are_listened_on_others_are_told_a_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7.cluster")
    assert reachable("0.0.0.0", 9464) == "node7.cluster:9464"
    assert reachable("::", 9464) == "node7.cluster:9464"
    assert reachable("10.0.0.7", 9464) == "10.0.0.7:9464"
    assert reachable("fe80::1", 9464) == "[fe80::1]:9464"


@pytest.mark.parametrize("run", ["../../etc/passwd", "a/b", "", ".hidden", "x" * 400, "ü\n\0"])
def test_any_name_of_a_run_stays_inside_the_directory(announce, tmp_path, run):
    path = announce(run=run).path
    assert path.parent == tmp_path
    assert path.is_file()
    assert list(tmp_path.glob("gradwatch-*.json")) == [path]


def test_two_runs_never_share_a_file(announce):
    names = ["a/b", "a-b", "a b", "a:b"]
    assert len({announce(run=name).path for name in names}) == len(names)


def test_a_later_run_of_the_same_name_keeps_its_file_when_the_first_one_ends(announce):
    first, second = announce("127.0.0.1:9464"), announce("127.0.0.1:9465")
    first.touch()
    first.close()
    assert "9465" in second.path.read_text()


def test_what_somebody_else_has_put_there_stays(announce):
    discovery = announce()
    discovery.path.write_bytes(b"\xff")
    discovery.touch()
    discovery.close()
    assert discovery.path.read_bytes() == b"\xff"


def test_everybody_may_read_the_file_whatever_the_umask(announce):
    before = os.umask(0o077)
    try:
        path = announce().path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_nothing_else_is_left_in_the_directory(announce, tmp_path):
    path = announce().path
    assert list(tmp_path.iterdir()) == [path]


def test_the_job_of_a_scheduler_is_told(busy_tally, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_USER", "ada")
    with closing(Exporter(busy_tally(), host="0.0.0.0", port=0, directory=tmp_path)):
        (path,) = tmp_path.glob("*.json")
        (entry,) = json.loads(path.read_text())
    assert entry["labels"] == {
        "run": "test-run", "rank": "0", "slurm_job_id": "4711", "slurm_user": "ada",
    }  # fmt: skip


def test_no_job_no_labels_of_one():
    assert scheduler_labels({"SLURM_JOB_ID": "", "HOME": "/"}) == {}


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_job_that_only_its_own_node_can_scrape_is_warned_of(
    busy_tally, tmp_path, monkeypatch, caplog, host, warned
):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with closing(Exporter(busy_tally(), host=host, port=0, directory=tmp_path)):
        assert len(list(tmp_path.iterdir())) == 1
    assert ("GRADWATCH_HOST" in caplog.text) is warned


def test_a_run_that_lives_keeps_its_file_fresh(announce):
    discovery = announce()
    aged(discovery.path, 5000)
    discovery.touch()
    assert time.time() - discovery.path.stat().st_mtime < 100


def test_a_file_that_somebody_removed_comes_back_while_the_run_lives(announce):
    discovery = announce()
    text = discovery.path.read_text()
    discovery.path.unlink()
    discovery.touch()
    assert discovery.path.read_text() == text
    discovery.close()
    discovery.touch()
    assert not discovery.path.exists()


def test_the_file_of_a_run_that_was_killed_goes_a_day_later_and_not_before(announce):
    old, recent = announce(run="old").path, announce(run="recent").path
    aged(old, ABANDONED_SECONDS + 60)
    aged(recent, ABANDONED_SECONDS - 60)
    announce(run="another rank", rank=1)
    assert old.exists()  # one rank of a run looks
    announce(run="new")
    assert not old.exists()
    assert recent.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nodes.json", '[{"targets": ["node7:9100"], "labels": {"run": "x", "rank": "0"}}]'),
        ("gradwatch-nodes.json", '[{"targets": ["node7:8050"]}]'),
        ("gradwatch-x-rank0.json", '[{"targets": ["node7:8050"], "labels": {"team": "vision"}}]'),
        ("gradwatch-x-rank0.json", '[{"targets": [], "labels": {"run": "y", "rank": "0"}}]'),
        ("gradwatch-x-rank0.json", "[]"),
        ("gradwatch-x-rank0.json", "{"),
    ],
)
def test_a_file_that_a_person_wrote_is_never_removed(announce, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    theirs = aged(tmp_path / name, 10 * ABANDONED_SECONDS)
    announce(run="new")
    assert theirs.read_text() == text


def test_what_looks_like_the_file_of_a_run_is_one(announce, tmp_path):
    """So that the cases above can fail."""
    text = '[{"targets": ["node7:9464"], "labels": {"run": "x", "rank": "0"}}]'
    (tmp_path / "gradwatch-x-rank0.json").write_text(text)
    ours = aged(tmp_path / "gradwatch-x-rank0.json", 10 * ABANDONED_SECONDS)
    announce(run="new")
    assert not ours.exists()


def test_a_directory_that_cannot_be_written_to_is_warned_of_and_the_metrics_are_served(
    busy_tally, tmp_path, caplog, get
):
    (tmp_path / "file").write_text("")
    with closing(Exporter(busy_tally(), port=0, directory=tmp_path / "file" / "x")) as exporter:
        text = get(exporter.url).text
    assert 'gradwatch_hook_errors_total{run="test-run",rank="0",component="export"} 1' in text
    assert "Prometheus is not told of this run" in caplog.text
