"""The node agent over real recordings: what a scraper is told of all the runs of a machine."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradwatch.export.metrics import AGENT_METRICS
from gradwatch.export.renderer import OPENMETRICS, TEXT, Renderer
from gradwatch.follower import Follower
from gradwatch.recording.tail import Tail
from gradwatch.records import SAMPLES
from gradwatch.serve.agent import Agent

NOT_COMPARED = {
    # Of the last transaction there and of the moment here.
    "gradwatch_recording_bytes",
    # Durations and times are equal, but this is of the clock at the time of asking.
    "gradwatch_total_norm_window_max",
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def agent(runs: Path) -> Agent:
    told: list[str] = []
    agent = Agent(runs, tell=told.append)
    agent.told = told  # type: ignore[attr-defined]
    return agent


def look(agent: Agent) -> None:
    agent._next_scan = float("-inf")
    while agent.look():
        pass


@pytest.fixture
def scraped(agent, samples_of):
    """The samples that a scrape gets after a look, in both forms."""

    def scrape() -> dict[tuple[str, ...], str]:
        look(agent)
        kind, body = agent.render(OPENMETRICS)
        assert kind == OPENMETRICS
        assert samples_of(body.decode()).keys() == samples_of(agent.render("")[1].decode()).keys()
        return samples_of(agent.render("")[1].decode())

    return scrape


def value(samples, name: str, *labels: str) -> str | None:
    """Of the only series with that name and labels; None where there is none."""
    found = [v for key, v in samples.items() if key[0] == f"gradwatch_{name}"
             and set(labels) <= set(key[1:])]  # fmt: skip
    assert len(found) <= 1, found
    return found[0] if found else None


def of_runs(samples) -> dict[tuple[str, ...], str]:
    mine = {spec.full_name for spec in AGENT_METRICS.values()}
    return {key: v for key, v in samples.items() if key[0] not in mine | NOT_COMPARED}


def test_values_are_those_of_each_runs_own_endpoint(
    train, serve, runs, fetched, samples_of, eventually
):
    trainers = [train("pair", rank) for rank in (0, 1)]
    for trainer in trainers:
        trainer.steps(60)
        trainer.steps(5, 1e6)
        trainer.steps(3)
        trainer.steps(1, float("nan"))
    served = serve(runs)
    eventually(lambda: value(served.samples(), "steps_total", "rank=1") == "69.0")
    for accept in ("", OPENMETRICS):
        own = {}
        for trainer in trainers:
            own |= samples_of(fetched(trainer.url, accept))
        assert of_runs(served.samples(accept)) == of_runs(own)
    exploded = ("events_total", "rank=0", "event=exploding", "level=alert")
    assert value(served.samples(), *exploded) == "1.0"
    layers = {key for key in served.samples() if key[0] == "gradwatch_grad_norm"}
    assert layers
    assert all("rank=0" in key for key in layers), "layers come from rank 0 alone"
    trainers[0].finish()
    state = ("run_state", "rank=0", "state=finished")
    eventually(lambda: value(served.samples(), *state) == "1.0")
    trainers[1].steps(5)
    eventually(lambda: value(served.samples(), "steps_total", "rank=1") == "74.0")


def test_an_alert_that_is_open_is_so_in_a_recording_that_was_there_before(record, runs, scraped):
    run = record("explodes")
    run.steps(200)
    run.steps(5, norm=1e5)
    own = Renderer(run.pipeline.info)
    live = own.render(run.pipeline.tally.snapshot()).decode()
    assert 'gradwatch_anomaly_active{run="explodes",rank="0",event="exploding"} 1' in live
    assert value(scraped(), "anomaly_active", "event=exploding") == "1.0"
    run.steps(200)
    assert value(scraped(), "anomaly_active", "event=exploding") == "0.0"


def test_a_run_that_begins_later_is_found_and_one_that_is_removed_is_gone(record, runs, scraped):
    assert value(scraped(), "agent_recordings", "state=running") == "0.0"
    first = record("first")
    first.steps(3)
    nested = record("nested", directory=runs / "below")
    nested.steps(4)
    record("too deep", directory=runs / "a" / "b").steps(1)
    samples = scraped()
    assert value(samples, "steps_total", "run=first") == "3.0"
    assert value(samples, "steps_total", "run=nested") == "4.0"
    assert value(samples, "steps_total", "run=too deep") is None
    first.pipeline.close("finished")
    first.pipeline.path.unlink()
    assert value(scraped(), "steps_total", "run=first") is None


def test_a_directory_that_vanishes_and_comes_back_is_no_error(record, runs, scraped, tmp_path):
    record("stays").steps(2)
    runs.rename(tmp_path / "away")
    assert value(scraped(), "steps_total") is None
    (tmp_path / "away").rename(runs)
    assert value(scraped(), "steps_total") == "2.0"


class TestEnds:
    def test_a_run_that_was_killed_right_after_an_explosion_says_so(self, train, runs, scraped):
        trainer = train("killed")
        trainer.steps(60)
        samples = scraped()
        assert value(samples, "run_state", "state=running") == "1.0"
        # Killed at once: the last steps are in the ring alone, and the last one is not closed.
        trainer.steps(5, 1e6, then="die")
        samples = scraped()
        assert value(samples, "run_state", "state=crashed") == "1.0"
        assert value(samples, "steps_total") == "65.0"
        assert value(samples, "events_total", "event=exploding", "level=alert") == "1.0"
        assert value(samples, "anomaly_active", "event=exploding") == "1.0"
        last = float(value(samples, "last_event_timestamp_seconds", "event=exploding"))
        assert last == float(value(samples, "last_step_timestamp_seconds"))
        assert time.time() - last < 60

    def test_a_killed_run_is_told_of_by_an_agent_that_starts_afterwards(self, train, runs, scraped):
        trainer = train("killed")
        trainer.steps(60)
        trainer.steps(5, 1e6, then="die")
        samples = scraped()
        assert value(samples, "run_state", "state=crashed") == "1.0"
        assert value(samples, "events_total", "event=exploding", "level=alert") == "1.0"

    def test_a_run_of_another_machine_is_believed(self, record, runs, scraped):
        run = record("elsewhere", pid=2**22 + 1)
        run.steps(2)
        path = run.pipeline.path
        assert value(scraped(), "run_state", "state=crashed") == "1.0"
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE meta SET value = replace(value, 'pid:[', 'pid:[9')")
        connection.close()
        path.rename(path.with_name("copy.sqlite"))
        for ending in ("-wal", "-shm"):
            Path(f"{path}{ending}").rename(path.with_name(f"copy.sqlite{ending}"))
        assert value(scraped(), "run_state", "state=running") == "1.0"

    def test_runs_age_out_and_are_not_read_again(self, record, runs):
        now = [time.time()]
        agent = Agent(runs, keep_seconds=60, clock=lambda: now[0])
        run = record("over")
        run.steps(2)
        look(agent)
        run.pipeline.close("finished")
        look(agent)
        now[0] += 59
        look(agent)
        assert b'state="finished"} 1' in agent.render("")[1]
        now[0] += 2
        look(agent)
        assert b'run="over"' not in agent.render("")[1]
        look(agent)
        assert not agent._runs

    def test_a_run_that_hangs_for_longer_than_that_is_shown_while_it_lives(self, record, runs):
        now = [time.time()]
        record("hangs").steps(2)
        for agent in (Agent(runs, keep_seconds=60, clock=lambda: now[0]) for _ in range(2)):
            look(agent)
            assert b'run="hangs"' in agent.render("")[1]
            now[0] += 7200

    def test_a_run_that_comes_back_waits_until_the_end_of_the_first_one_was_scraped(
        self, record, runs, scraped, agent
    ):
        first = record("again")
        first.steps(3)
        look(agent)
        first.pipeline.close("crashed")
        second = record("again", started=time.time() + 1)
        second.steps(1)
        look(agent)
        assert b'gradwatch_steps_total{run="again",rank="0"} 3' in agent.render("")[1]
        samples = scraped()
        assert value(samples, "steps_total") == "1.0"
        assert value(samples, "agent_recordings", "state=hidden") == "1.0"


def test_a_step_that_hangs_open_is_shown_as_the_run_itself_shows_it_and_counted_once(record, runs):
    run = record("hangs")
    run.steps(100)
    now = [0.0]
    follower = Follower(Tail(run.pipeline.path), clock=lambda: now[0])
    follower.look(1000)
    # The consumer is held, as by a step that keeps the interpreter; the row stays open.
    with run.pipeline.consumer.paused():
        run.pipeline.recorder.append(run._row(float("nan")))
        run.count += 1
        follower.look(1000)
        assert follower.tally.snapshot().numbers["steps_total"] == 100
        now[0] += 1.5
        follower.look(1000)
        shown = follower.tally.snapshot()
        assert shown.numbers["steps_total"] == 101
        assert shown.labelled["anomaly_active"]["nonfinite",] == 1
    run.steps(1)
    follower.look(1000)
    live, shown = run.pipeline.tally.snapshot(), follower.tally.snapshot()
    assert shown.numbers["steps_total"] == live.numbers["steps_total"] == 102
    assert shown.labelled["events_total"] == live.labelled["events_total"]
    assert shown.histograms == live.histograms


def test_what_was_sampled_in_steps_that_hung_open_is_judged_when_it_is_there(record, runs):
    run = record("slow")
    run.steps(20)
    now = [0.0]
    follower = Follower(Tail(run.pipeline.path), clock=lambda: now[0])
    sample = {"update_norm": 5.0, "weight_norm": 1.0}
    samples_SP = np.array([[sample.get(name, 0.0)] * 3 for name in SAMPLES], dtype=np.float32)
    for _ in range(3):
        with run.pipeline.consumer.paused():
            run.pipeline.recorder.append(run._row(1.0))
            follower.look(1000)
            now[0] += 1.5
            follower.look(1000)  # from the ring, which has no samples
            run.pipeline.recorder.sampled(run.count, samples_SP)
            run.count += 1
        run.pipeline.flush()
    follower.look(1000)
    live, shown = run.pipeline.tally.snapshot(), follower.tally.snapshot()
    assert shown.numbers["steps_total"] == 23
    assert shown.labelled["anomaly_active"]["oversized_update",] == 1
    assert shown.labelled["anomaly_active"] == live.labelled["anomaly_active"]
    assert shown.labelled["events_total"] == live.labelled["events_total"]


def test_what_no_record_tells_comes_from_the_run(record, runs, scraped):
    run = record("ails")
    run.steps(1)
    assert value(scraped(), "enforcing") == "0.0"
    run.pipeline.tally.set_enforcing(True)
    run.pipeline.tally.hook_error("apply")
    run.pipeline.tally.set_records_dropped(3)
    run.pipeline.flush()
    samples = scraped()
    assert value(samples, "enforcing") == "1.0"
    assert value(samples, "hook_errors_total", "component=apply") == "1.0"


def test_what_an_older_recording_does_not_tell_is_absent(record, runs, scraped):
    run = record("old")
    run.steps(1)
    run.pipeline.close("finished")
    with sqlite3.connect(run.pipeline.path) as connection:
        connection.execute("DELETE FROM meta WHERE key = 'status'")
    connection.close()
    samples = scraped()
    assert value(samples, "steps_total") == "1.0"
    for name in ("enforcing", "records_dropped_total", "hook_errors_total"):
        assert value(samples, name) is None


def test_a_recording_that_was_followed_is_one_file_in_the_end(record, runs, scraped):
    run = record("whole")
    run.steps(50)
    scraped()
    run.pipeline.close("finished")
    scraped()
    assert [path.name for path in runs.iterdir()] == [run.pipeline.path.name]


def test_counters_of_a_long_recording_are_those_of_all_of_it(record, runs, scraped):
    run = record("long")
    run.steps(3)
    for _ in range(30):
        run.steps(100)
    tally = run.pipeline.tally.snapshot()
    run.pipeline.close("finished")
    samples = scraped()
    assert value(samples, "steps_total") == "3003.0"
    assert float(value(samples, "total_norm_distribution_count")) == 3003
    assert (
        float(value(samples, "overhead_seconds_total")) == tally.numbers["overhead_seconds_total"]
    )


class TestFiles:
    @pytest.fixture
    def settled(self, runs, samples_of):
        """An agent that has known its files for long, what it told, and a scrape."""
        told: list[str] = []
        now = [time.time()]
        agent = Agent(runs, tell=told.append, clock=lambda: now[0])

        def scrape() -> dict:
            look(agent)
            now[0] += 10
            look(agent)
            return samples_of(agent.render(OPENMETRICS)[1].decode())

        return told, scrape, agent

    def test_what_is_no_recording_is_told_once_and_counted_and_the_others_go_on(
        self, record, runs, settled
    ):
        told, scrape, _ = settled
        (runs / "empty.sqlite").touch()
        (runs / "noise.sqlite").write_bytes(os.urandom(50_000))
        (runs / "folder.sqlite").mkdir()
        os.mkfifo(runs / "pipe.sqlite")
        with sqlite3.connect(runs / "foreign.sqlite") as connection:
            connection.execute("CREATE TABLE trials (id)")
        connection.close()
        newer = record("newer")
        newer.steps(1)
        newer.pipeline.close("finished")
        with sqlite3.connect(newer.pipeline.path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        cut = record("cut", layers=200)
        cut.steps(300)
        cut.pipeline.close("finished")
        with cut.pipeline.path.open("r+b") as file:
            file.seek(8192)
            file.write(os.urandom(200_000))
        record("fine").steps(7)
        for _ in range(3):
            samples = scrape()
        assert value(samples, "steps_total", "run=fine") == "7.0"
        assert value(samples, "steps_total", "run=cut") is None
        assert float(value(samples, "agent_unreadable_files")) == len(told) == 7, told
        assert any("newer gradwatch" in line for line in told)
        assert value(samples, "agent_errors_total") == "0.0"

    def test_a_file_that_is_mended_is_shown(self, record, runs, settled):
        _, scrape, _ = settled
        (runs / "late.sqlite").touch()
        assert value(scrape(), "agent_unreadable_files") == "1.0"
        run = record("late")
        run.steps(2)
        run.pipeline.close("finished")
        run.pipeline.path.replace(runs / "late.sqlite")
        samples = scrape()
        assert value(samples, "steps_total") == "2.0"
        assert value(samples, "agent_unreadable_files") == "0.0"

    @pytest.mark.parametrize("ending", [".sqlite", ".ring", ".sqlite-wal"])
    def test_no_link_leads_out_of_the_directory(self, record, runs, tmp_path, settled, ending):
        _, scrape, _ = settled
        outside = tmp_path / "outside"
        run = record("secret", directory=outside)
        run.steps(2)
        for file in outside.iterdir():
            name = file.name.replace(run.pipeline.path.stem, "inside")
            if name == f"inside{ending}":
                (runs / name).symlink_to(file)
            elif ending != ".sqlite":
                (runs / name).write_bytes(file.read_bytes())
        (runs / "folder").symlink_to(outside)
        samples = scrape()
        assert value(samples, "steps_total") is None
        assert value(samples, "agent_unreadable_files") == "1.0"

    @pytest.mark.parametrize(
        "name",
        [
            "<script>alert(1)</script>",
            "../../etc",
            'quo"te\\',
            "new\nline",
            "x" * 10_000,
            "\U0001f525",
        ],
        ids=["script", "path", "quote", "newline", "long", "emoji"],
    )
    def test_any_name_is_a_label_and_cannot_act_on_the_page(self, record, runs, settled, name):
        told, scrape, agent = settled
        run = record(name)
        run.steps(1)
        (runs / f"{name[:50].replace('/', '_')}.sqlite").write_text("no recording")
        assert value(scrape(), "steps_total", f"run={name}") == "1.0"
        page = agent.page()
        assert "<script" not in page
        assert len(page) < 5000
        assert all("\n" not in line for line in told)

    def test_a_damaged_row_leaves_the_run_as_it_was_and_is_told_once(self, record, runs, settled):
        told, scrape, _ = settled
        run = record("worn")
        run.steps(3)
        assert value(scrape(), "steps_total") == "3.0"
        with sqlite3.connect(run.pipeline.path) as connection:
            connection.execute("UPDATE steps SET norms = x'00', id = id + 10 WHERE id = 3")
        connection.close()
        for _ in range(2):
            samples = scrape()
        assert value(samples, "steps_total") == "3.0"
        assert value(samples, "agent_unreadable_files") == "1.0"
        assert len(told) == 1
        assert "is damaged" in told[0]


class TestCommand:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_in_order(self, serve, runs, number):
        served = serve(runs)
        served.process.send_signal(number)
        assert served.process.wait(10) == 0
        assert served.log.read_text() == ""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [(["--keep", "long"], "'long'"), (["--port", "99999"], "65535"), (["nowhere"], "nowhere")],
        ids=["keep", "port", "directory"],
    )
    def test_a_mistake_is_said_in_one_line(self, runs, arguments, said):
        command = [sys.executable, "-m", "gradwatch", "serve"]
        command += arguments if "nowhere" in arguments else [str(runs), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_a_port_that_is_taken_is_refused(self, serve, runs):
        port = serve(runs).url.split(":")[2].split("/")[0]
        done = subprocess.run(
            [sys.executable, "-m", "gradwatch", "serve", str(runs), "--port", port],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert f"127.0.0.1:{port}" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_the_page_lists_the_runs_and_healthz_counts_them(
        self, record, serve, runs, fetched, eventually
    ):
        record("one").steps(3)
        served = serve(runs)
        base = served.url.removesuffix("/metrics")
        eventually(lambda: '"running": 1' in fetched(f"{base}/healthz"))
        page = fetched(f"{base}/agent")
        assert "<td>one</td><td>0</td><td>running</td><td>2</td>" in page

    def test_the_text_form_is_what_a_browser_gets(self, serve, runs):
        assert TEXT.startswith("text/plain")
        assert value(serve(runs).samples(), "agent_unreadable_files") == "0.0"
