"""What a push makes of a Grafana, and that a second one changes nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.dashboards import build_dashboards, write_dashboards
from gradwatch.grafana import Annotation, Outcome
from gradwatch.grafana.adapter import DATASOURCE, UID
from gradwatch.records import Anomaly

HOSTILE = "<img src=x onerror=alert(1)>:run\x1b[31m"
EXPLODING = Anomaly(
    kind="exploding", level="alert", step=7, layer="a", message="exploding: norm 1e+09 in a"
)


def test_a_push_makes_folder_data_source_and_dashboards(push, stand_in) -> None:
    done = push("--datasource-url", "http://prometheus:9090")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        f"Grafana 13.2.0 at {stand_in.url}",
        "data source: created",
        "folder gradwatch: created",
    ]
    assert list(stand_in.dashboards) == [Path(name).stem for name in build_dashboards()]
    for name, text in build_dashboards().items():
        held = stand_in.dashboards[Path(name).stem]
        assert json.loads(text).items() <= held["dashboard"].items()
        assert held["meta"]["folderUid"] == "gradwatch"
        line = f"dashboard {Path(name).stem}: created, {stand_in.url}/d/{Path(name).stem}"
        assert line in done.stdout
    source = stand_in.datasources[DATASOURCE]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")


def test_a_second_push_writes_nothing(push, stand_in, recorded) -> None:
    recording = recorded("gpt", [EXPLODING])
    given = ("--datasource-url", "http://prometheus:9090", "--recording", recording)
    assert push(*given).returncode == 0
    written = stand_in.writes()
    done = push(*given)
    assert (done.returncode, done.stderr) == (0, "")
    assert stand_in.writes() == written
    assert ": created" not in done.stdout
    assert "annotations of gpt: 0 created, 1 unchanged" in done.stdout
    assert "data source: unchanged" in done.stdout
    assert "folder gradwatch: unchanged" in done.stdout
    assert done.stdout.count(": unchanged, http") == len(build_dashboards())


def test_a_shell_starts_it_too(stand_in) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "gradwatch", "dashboards", "push", "--url",
         stand_in.url],
        env=os.environ | {"GRAFANA_TOKEN": "glsa_c0ffee-of-the-test"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(stand_in.dashboards) == len(build_dashboards())


def test_a_user_with_a_password_pushes_too(push, stand_in) -> None:
    done = push(environment={"GRAFANA_USER": "ann", "GRAFANA_PASSWORD": "päss wörd"})
    assert done.returncode == 0
    assert len(stand_in.dashboards) == len(build_dashboards())


def test_a_directory_is_pushed_instead_of_what_is_built(push, stand_in, tmp_path) -> None:
    folder = tmp_path / "mine"
    write_dashboards(folder)
    for path in sorted(folder.glob("*.json"))[1:]:
        path.unlink()
    assert push(folder, "--folder", "Training / GPUs").returncode == 0
    assert list(stand_in.dashboards) == ["gradwatch-clipping"]
    ((uid, made),) = stand_in.folders.items()
    assert made["title"] == "Training / GPUs"
    assert UID.fullmatch(uid)


def test_a_dashboard_that_somebody_changed_is_as_it_should_be_again(connect, stand_in) -> None:
    grafana, wanted = connect(), {"uid": "mine", "title": "Mine", "panels": [{"id": 1}]}
    folder, _ = grafana.ensure_folder("gradwatch")
    assert grafana.push_dashboard(wanted, folder) == "created"
    stand_in.dashboards["mine"]["dashboard"]["panels"].append({"id": 2})
    assert grafana.push_dashboard(wanted, folder) == "updated"
    assert stand_in.dashboards["mine"]["dashboard"]["panels"] == [{"id": 1}]
    stand_in.dashboards["mine"]["dashboard"]["liveNow"] = False
    assert grafana.push_dashboard(wanted, folder) == "unchanged"


def test_a_dashboard_that_was_moved_comes_back(connect, stand_in) -> None:
    grafana, wanted = connect(), {"uid": "mine", "title": "Mine"}
    for title in ("here", "there"):
        grafana.ensure_folder(title)
    assert [grafana.push_dashboard(wanted, uid) for uid in ("here", "there", "there")] == [
        "created", "updated", "unchanged",
    ]  # fmt: skip
    assert stand_in.dashboards["mine"]["meta"]["folderUid"] == "there"


def test_numbers_of_another_grafana_are_not_sent(connect, stand_in) -> None:
    """The stand-in refuses an id: it would be that of another dashboard here."""
    grafana = connect()
    folder, _ = grafana.ensure_folder("gradwatch")
    wanted = {"uid": "mine", "title": "Mine", "id": 17, "version": 400}
    assert grafana.push_dashboard(wanted, folder) == "created"
    assert stand_in.dashboards["mine"]["dashboard"]["version"] == 1


def test_a_folder_of_that_title_is_used_whoever_made_it(connect, stand_in) -> None:
    stand_in.folders["xyz"] = {"uid": "xyz", "title": "ML", "version": 1}
    assert connect().ensure_folder("ML") == ("xyz", Outcome.unchanged)


def test_a_folder_beyond_the_first_page_is_found(connect, stand_in) -> None:
    for i in range(1001):
        stand_in.folders[f"f{i}"] = {"uid": f"f{i}", "title": f"F {i}", "version": 1}
    assert connect().ensure_folder("F 1000") == ("f1000", Outcome.unchanged)


def test_a_renamed_folder_gets_its_title_back(connect, stand_in) -> None:
    grafana = connect()
    uid, _ = grafana.ensure_folder("gradwatch")
    stand_in.folders[uid]["title"] = "Old"
    assert grafana.ensure_folder("gradwatch") == (uid, Outcome.updated)
    assert stand_in.folders[uid]["title"] == "gradwatch"


def test_titles_that_look_alike_as_uids_are_two_folders(connect) -> None:
    grafana = connect()
    made = [grafana.ensure_folder(title) for title in ("a b", "a/b", "a-b", "é", "x" * 99)]
    assert all(outcome == "created" for _, outcome in made)
    assert all(UID.fullmatch(uid) for uid, _ in made)


def test_a_data_source_keeps_what_others_set(connect, stand_in) -> None:
    grafana = connect()
    grafana.ensure_datasource("http://old:9090")
    there = stand_in.datasources[DATASOURCE]
    there["jsonData"]["timeInterval"] = "5s"
    there["secureJsonFields"] = {"basicAuthPassword": True}
    assert grafana.ensure_datasource("http://new:9090") == "updated"
    assert there["url"] == "http://new:9090"
    assert there["jsonData"] == {"httpMethod": "POST", "timeInterval": "5s"}


def test_findings_become_annotations_with_their_time_layer_and_step(
    push, stand_in, recorded
) -> None:
    warning = Anomaly(kind="clip_saturated", level="warning", step=9, message="clip_saturated: x")
    event = Anomaly(kind="overflow", level="event", step=3, message="overflow: y")
    assert push("--recording", recorded("gpt", [EXPLODING, warning, event])).returncode == 0
    alert, other = stand_in.annotations
    assert alert["time"] == 1_700_000_007_000
    assert alert["tags"] == ["gradwatch", "run:gpt", "rank:0", "exploding"]
    assert alert["text"] == "gpt, step 7: alert in a. exploding: norm 1e+09 in a"
    assert other["text"] == "gpt, step 9: warning. clip_saturated: x"


def test_names_from_outside_are_text_in_an_annotation_and_on_the_terminal(
    push, stand_in, recorded
) -> None:
    bad = Anomaly(kind="exploding", level="alert", step=7, layer=HOSTILE, message=HOSTILE)
    recording = recorded(HOSTILE, [bad])
    for made in ("1 created, 0 unchanged", "0 created, 1 unchanged"):
        done = push("--recording", recording)
        assert done.returncode == 0
        assert made in done.stdout
        assert "\x1b" not in done.stdout
    (one,) = stand_in.annotations
    assert "<" not in one["text"]
    assert one["text"].count("&lt;img src=x onerror=alert(1)&gt;") == 3
    assert one["tags"][1] == "run:<img src=x onerror=alert(1)>_run\N{REPLACEMENT CHARACTER}[31m"


@pytest.mark.parametrize(
    "name", ["a:b:c", "x" * 300, "é" * 80, " padded "], ids=lambda name: ascii(name)[:12]
)
def test_a_name_that_grafana_would_change_is_still_found_again(
    push, stand_in, recorded, name
) -> None:
    recording = recorded(name, [EXPLODING])
    for made in ("1 created", "0 created"):
        assert made in push("--recording", recording).stdout
    assert len(stand_in.annotations) == 1


def test_ranks_of_a_run_are_told_apart(push, stand_in, recorded) -> None:
    for rank in (0, 1):
        assert push("--recording", recorded("gpt", [EXPLODING], rank)).returncode == 0
    assert len(stand_in.annotations) == 2


def test_annotations_are_found_again_however_few_the_server_gives_at_once(
    connect, stand_in
) -> None:
    stand_in.most_at_once = 7
    wanted = [Annotation(1000 * i, ("gradwatch", f"kind{i % 3}"), "x") for i in range(60)]
    assert connect().annotate(wanted) == {"created": 60, "unchanged": 0}
    assert connect().annotate(wanted) == {"created": 0, "unchanged": 60}
    assert connect().annotate([]) == {"created": 0, "unchanged": 0}
    other = Annotation(500, ("gradwatch", "kind0"), "x")
    assert connect().annotate([other, other]) == {"created": 1, "unchanged": 1}


def test_a_grafana_below_a_path_is_reached(connect, stand_in) -> None:
    stand_in.broken = lambda verb, path: (
        (200, '{"database": "ok", "version": "1"}', {}) if path == "/ops/grafana/api/health" else
        (404, "", {})
    )  # fmt: skip
    assert connect(f"{stand_in.url}/ops/grafana/").version() == "1"


def test_the_commands_of_the_documentation_push(push, stand_in, recorded, tmp_path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "grafana.md").read_text()
    commands = re.findall(r"^gradwatch dashboards push (.*)$", text, re.MULTILINE)
    options = re.findall(r"^\| `(--[a-z-]+ \S+)`", text, re.MULTILINE)
    assert (len(commands), len(options)) == (1, 2)
    recorded("gpt", [EXPLODING])
    runs = tmp_path / "gradwatch-runs"
    runs.mkdir()
    for path in tmp_path.glob("*.sqlite"):
        path.rename(runs / path.name)
    for line in (*commands, *options):
        assert push(*shlex.split(line), "--url", stand_in.url).returncode == 0, line
    assert len(stand_in.annotations) == 1
    assert list(stand_in.datasources) == [DATASOURCE]
