"""What a run leaves at a real Pushgateway, under any name, and how it is taken away again."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from gradwatch.cli import commands
from gradwatch.errors import GradwatchError
from gradwatch.export.metrics import END_METRICS, METRICS
from gradwatch.export.pushgateway import delete, left_behind, push_summary
from gradwatch.export.urls import ServerUrl
from gradwatch.rules.detection import KINDS
from gradwatch.tally import Tally

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def gateway(tmp_path_factory) -> Iterator[ServerUrl]:
    program = shutil.which("prometheus-pushgateway")
    if program is None:
        message = "not installed: apt-get install prometheus-pushgateway"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Debian's keeps what was pushed in a file unless told not to.
    command = [program, f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]
    path = tmp_path_factory.mktemp("pushgateway") / "log"
    with path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        server = ServerUrl.of(f"http://127.0.0.1:{port}", "pushgateway")
        deadline = time.monotonic() + 30
        while True:
            try:
                server.ask("/-/ready", seconds=5)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield server
        process.terminate()


@pytest.fixture(autouse=True)
def empty(gateway) -> Iterator[None]:
    yield
    for group in left_behind(gateway):
        delete(gateway, group)


def push(gateway: ServerUrl, tally: Tally, job: str = "gradwatch") -> list[int]:
    failures: list[int] = []
    push_summary(gateway, job, tally.snapshot(), tally.largest_norm, lambda: failures.append(1))
    return failures


def samples(gateway: ServerUrl) -> list:
    families = text_string_to_metric_families(gateway.ask("/metrics", seconds=5).decode())
    return [
        sample
        for family in families
        for sample in family.samples
        if sample.name.startswith("gradwatch_")
    ]


def test_the_summary_says_how_the_run_ended(gateway, busy_tally):
    tally = busy_tally()
    tally.set_state("crashed")
    before = time.time()
    assert push(gateway, tally) == []
    found = {(one.name, *sorted(one.labels.values())): one.value for one in samples(gateway)}
    assert {one.labels["run"] for one in samples(gateway)} == {"test-run"}

    def value(name: str, **labels: str) -> float:
        own = {"job": "gradwatch", "run": "test-run", "rank": "0", "instance": "", **labels}
        return found[f"gradwatch_{name}", *sorted(own.values())]

    assert value("end_state", state="crashed") == 1
    assert value("end_state", state="finished") == 0
    assert before - 1 <= value("end_timestamp_seconds") <= time.time() + 1
    assert value("end_steps") == 3
    assert value("end_skipped_steps", reason="nonfinite") == 1
    assert value("end_clipped_steps", rule="global") == 1
    assert value("end_events", event="nonfinite", level="alert") == 1
    assert math.isnan(value("end_total_norm"))
    assert value("end_total_norm_max") == pytest.approx(math.sqrt(14))
    assert value("end_loss") == 0.25
    assert value("last_event_timestamp_seconds", event="nonfinite") == 1_700_000_002.0
    assert value("last_event_timestamp_seconds", event="exploding") == 0


def test_every_series_is_in_a_table_and_only_the_time_of_events_is_one_that_runs_export(
    gateway, busy_tally
):
    push(gateway, busy_tally())
    names = {one.name.removeprefix("gradwatch_") for one in samples(gateway)}
    assert names & METRICS.keys() == {"last_event_timestamp_seconds"}
    assert names - METRICS.keys() == END_METRICS.keys()


@pytest.mark.parametrize(
    "run", ["", ".", "..", "a/b", "../../x", "a b", "100%+?#", "ü\ud800", "x\0y", "-", "a" * 300]
)
def test_a_name_from_outside_is_a_label_and_nothing_else(gateway, info_of, run):
    assert push(gateway, Tally(info_of(run=run), kinds=KINDS), job="a/b") == []
    cleaned = run.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    (group,) = left_behind(gateway)
    assert (group.job, group.run, group.rank) == ("a/b", cleaned, "0")
    delete(gateway, group)
    assert left_behind(gateway) == []


def test_a_run_of_the_same_name_replaces_it_and_ranks_stand_beside_each_other(gateway, info_of):
    for rank in (0, 1, 0):
        push(gateway, Tally(info_of(rank=rank), kinds=KINDS))
    assert sorted(group.rank for group in left_behind(gateway)) == ["0", "1"]


class TestForget:
    def forget(self, gateway: ServerUrl, *arguments: str) -> list[str]:
        done = CliRunner().invoke(commands, ["forget", *arguments, "--pushgateway", str(gateway)])
        if done.exception is not None:
            raise done.exception
        return done.output.splitlines()

    def test_a_run_is_forgotten_with_all_of_its_ranks(self, gateway, info_of):
        for run, rank in (("a", 0), ("a", 1), ("b", 0)):
            push(gateway, Tally(info_of(run=run, rank=rank), kinds=KINDS))
        assert sorted(self.forget(gateway, "a")) == ["gradwatch a rank 0", "gradwatch a rank 1"]
        assert [group.run for group in left_behind(gateway)] == ["b"]

    def test_what_is_young_stays_and_so_does_what_is_not_ours(self, gateway, info_of):
        others = f"{gateway}/metrics/job/backup"
        request = urllib.request.Request(others, data=b"done 1\n", method="PUT")
        urllib.request.urlopen(request, timeout=5).close()
        push(gateway, Tally(info_of(run="a"), kinds=KINDS))
        assert self.forget(gateway, "--older-than", "1h") == []
        assert len(self.forget(gateway, "--older-than", "0s")) == 1
        assert b"backup" in gateway.ask("/metrics", seconds=5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((), "give a RUN, or --older-than"), (("--older-than", "soon"), "a time such as 7d")],
    )
    def test_what_is_not_understood_deletes_nothing(self, gateway, arguments, message):
        with pytest.raises(GradwatchError, match=message):
            self.forget(gateway, *arguments)

    def test_a_gateway_that_is_away_is_named_without_its_password(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            with pytest.raises(GradwatchError, match=f"127.0.0.1:{port} cannot be asked") as error:
                self.forget_at(f"http://me:secret@127.0.0.1:{port}")
        assert "secret" not in str(error.value)

    def forget_at(self, address: str) -> None:
        done = CliRunner().invoke(commands, ["forget", "a", "--pushgateway", address])
        assert done.exception is not None
        raise done.exception
