"""The file that Prometheus finds a run by."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from gradwatch.export.addresses import reachable
from gradwatch.export.discovery import Discovery
from gradwatch.export.exporter import Exporter


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
def test_any_name_of_a_run_stays_inside_the_directory(info_of, tmp_path, run):
    discovery = Discovery(tmp_path, info_of(run=run), "127.0.0.1:9464")
    assert discovery.path.parent == tmp_path
    assert discovery.path.is_file()
    assert not discovery.path.name.startswith(".")
    discovery.close()


def test_two_runs_never_share_a_file(info_of, tmp_path):
    names = ["a/b", "a-b", "a b", "a:b"]
    paths = {Discovery(tmp_path, info_of(run=name), "x:1").path for name in names}
    assert len(paths) == len(names)


def test_a_later_run_of_the_same_name_keeps_its_file_when_the_first_one_ends(info_of, tmp_path):
    first = Discovery(tmp_path, info_of(), "127.0.0.1:9464")
    second = Discovery(tmp_path, info_of(), "127.0.0.1:9465")
    first.close()
    assert "9465" in second.path.read_text()


def test_a_directory_that_cannot_be_written_to_is_warned_of_and_the_metrics_are_served(
    busy_tally, tmp_path, caplog, get
):
    (tmp_path / "file").write_text("")
    with closing(Exporter(busy_tally(), port=0, directory=tmp_path / "file" / "x")) as exporter:
        text = get(exporter.url).text
    assert 'gradwatch_hook_errors_total{run="test-run",rank="0",component="export"} 1' in text
    assert "Prometheus is not told of this run" in caplog.text
