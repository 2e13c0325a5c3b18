"""`gradwatch top`: how a run stands, in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest
from rich.console import Console

from gradwatch.page.watched import Watched
from gradwatch.recording.store import new_recording_path
from gradwatch.top import Shown, screen

OLD = 1_700_000_000.0
CONTROL = r"\x1b\[[0-9;?]*[A-Za-z]"


class Terminal:
    """`gradwatch top` in a terminal of 24 lines and 80 columns."""

    def __init__(self, *arguments: str, stdin: int | None = None, **environment: str) -> None:
        self.leader, self.follower = pty.openpty()
        termios.tcsetwinsize(self.follower, (24, 80))
        self.modes = termios.tcgetattr(self.follower)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gradwatch", "top", *arguments],
            stdin=self.follower if stdin is None else stdin,
            stdout=self.follower, stderr=self.follower,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        self.written = b""

    def until(self, wanted: str) -> str:
        """What is written until then, without colours."""
        while wanted not in (plain := re.sub(CONTROL, "", self.written.decode(errors="replace"))):
            if not select.select([self.leader], [], [], 30)[0]:
                raise AssertionError(f"{wanted!r} is not in {plain!r}")
            self.written += os.read(self.leader, 65536)
        return plain

    def to_the_end(self) -> str:
        while self.process.poll() is None or select.select([self.leader], [], [], 0)[0]:
            if select.select([self.leader], [], [], 0.1)[0]:
                self.written += os.read(self.leader, 65536)
        return self.written.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.to_the_end()
        os.close(self.leader)
        os.close(self.follower)


def lines_of(run, width: int = 100, height: int = 40) -> list[str]:
    console = Console(width=width, height=height, no_color=True, file=None)
    with console.capture() as captured:
        console.print(screen(Watched(run.path), width, height))
    return captured.get().splitlines()


@pytest.fixture
def exploding(record):
    run = record("one", layers=20)
    run.steps(400, spikes=dict.fromkeys(range(380, 400), 300.0))
    run.pipeline.close("finished")
    return run


LABELS = ["to do", "done", "began", "worst", "now"]


def two_explosions(record, lasting: bool):
    run = record("two", layers=20)
    bad = [*range(200, 230), *range(900, 930)]
    run.steps(930 if lasting else 1400, spikes=dict.fromkeys(bad, 300.0))
    run.pipeline.close("finished")
    return run


def test_the_first_lines_say_how_it_stands_and_what_to_do(exploding):
    lines = lines_of(exploding)
    assert lines[0].startswith("one, rank 0: finished, step 399, ")
    assert lines[1].startswith("!!  Not healthy since step 380 (")
    assert "exploding in block.10" in " ".join(lines[1:3])
    assert any(line.startswith("to do") for line in lines[:8])


def test_the_oddest_layer_is_first_and_the_last_findings_are_there(exploding):
    lines = lines_of(exploding)
    (head,) = [i for i, line in enumerate(lines) if line.startswith("furthest from")]
    assert lines[head + 1].startswith("block.10 ")
    assert any("alert" in line and "exploding" in line for line in lines[head:])


def test_a_spike_of_one_step_is_in_the_chart_of_a_long_run(record):
    run = record("long", layers=3)
    run.steps(3000, spikes={1234: 1e6})
    lines = lines_of(run, width=80)
    (top,) = [line for line in lines if "█" in line][:1]
    assert top.count("█") + top.count("▇") == 1


@pytest.mark.parametrize("lasting", [True, False], ids=["open", "over"])
@pytest.mark.parametrize("size", [(80, 24), (80, 30), (120, 24), (60, 20), (40, 15), (200, 60)])
def test_verdict_layers_findings_and_norm_fit_into_the_terminal(record, size, lasting):
    run = two_explosions(record, lasting)
    lines = lines_of(run, *size)
    assert max(map(len, lines)) <= size[0]
    assert len(lines) <= size[1]
    assert f"step {run.count - 1:,}" in lines[0]
    assert lines[1].startswith("!!" if lasting else ("OK", "!"))
    assert "step" in " ".join(lines[1:3])
    assert len([line for line in lines if re.match(r"block\.\d+ ", line)]) >= 3
    assert len([line for line in lines if re.match(r"step \d+ +alert +exploding in", line)]) >= 2
    assert any("norm" in line and "log" in line for line in lines)


@pytest.mark.parametrize("size", [(80, 24), (80, 30), (120, 24), (60, 20), (40, 15), (20, 4)])
def test_no_heading_is_without_rows_and_no_two_lines_are_empty(exploding, size):
    lines = lines_of(exploding, *size)
    assert len(lines) <= size[1]
    assert all(lines[0:1])
    assert all(lines[-1:])
    assert not any(one == other == "" for one, other in pairwise(lines))
    for line, behind in pairwise([*lines, ""]):
        if line.startswith(("furthest", "findings,", "total norm before")):
            assert behind


def test_what_does_not_fit_is_left_out_from_the_least_important_on(exploding):
    had = [len(lines_of(exploding, 80, height)) for height in range(1, 40)]
    assert had == sorted(had)
    assert lines_of(exploding, 80, 2)[1].startswith("!!  Not healthy since step 380 (")
    assert [label for label in LABELS if label in labels(exploding, 16)] == ["to do"]
    assert labels(exploding, 60) == LABELS


def labels(run, height: int) -> list[str]:
    lines = lines_of(run, 80, height)
    return [label for label in LABELS if any(line.startswith(f"{label:<10}") for line in lines)]


def findings_in(lines: list[str]) -> list[tuple[int, str, str]]:
    found = (re.match(r"step (\d+) +(alert|warning) +(\w+)", line) for line in lines)
    return [(int(one[1]), one[2], one[3]) for one in found if one]


def test_of_findings_the_alerts_are_kept_and_of_them_the_latest_in_order_of_steps(record):
    run = record("many", layers=20)
    bad = [step for start in range(200, 1800, 300) for step in range(start, start + 30)]
    run.steps(1900, spikes=dict.fromkeys(bad, 300.0))
    run.pipeline.close("finished")
    every = findings_in(lines_of(run, 120, 100))
    alerts = [one for one in every if one[1] == "alert"]
    assert len(alerts) >= 4
    for height in (16, 20, 24):
        lines = lines_of(run, 80, height)
        kept = findings_in(lines)
        assert kept == alerts[-len(kept) :]
        left_out = f"; {len(every) - len(kept)} less urgent or older left out"
        assert any(left_out in line for line in lines) == (len(kept) < len(every))


def test_a_healthy_run_has_layers_and_says_that_nothing_was_found(record):
    run = record("well", layers=6)
    run.steps(200)
    run.pipeline.close("finished")
    lines = lines_of(run, 80, 24)
    assert lines[1].startswith("OK  Healthy")
    assert len([line for line in lines if line.startswith("block.")]) >= 5
    assert "no finding" in lines


def test_of_a_long_name_of_a_layer_the_end_is_shown(record):
    run = record("deep", layers=[f"model.{'x' * 60}.h.{i}.attn.c_proj.weight" for i in range(4)])
    run.steps(200)
    lines = lines_of(run, 60, 24)
    assert len([line for line in lines if re.match(r"….*\.h\.\d\.attn\.c_proj ", line)]) == 4


def test_hostile_names_cannot_act_on_the_terminal(record):
    name = "\x1b[2J[bold red]x[/]\r\n" + "z" * 10_000
    run = record(name, layers=[name, f"b.{name}"])
    run.steps(120, spikes=dict.fromkeys(range(100, 105), 300.0))
    text = "\n".join(lines_of(run))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "[bold red]" in text
    assert len(text) < 8000


def test_a_pipe_gets_it_once_and_without_colour(exploding):
    command = [sys.executable, "-m", "gradwatch", "top", str(exploding.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "Not healthy" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("colour", [{}, {"NO_COLOR": "1"}], ids=["colour", "none"])
def test_a_terminal_of_24_lines_has_layers_and_findings_until_it_is_interrupted(exploding, colour):
    with Terminal(str(exploding.path), **colour) as terminal:
        terminal.until("exploding in block.10: ")
        terminal.process.send_signal(signal.SIGINT)
        text = terminal.to_the_end()
    assert terminal.process.returncode == 0
    frame = re.sub(CONTROL, "", text).splitlines()[:24]
    assert any(line.startswith("!!  Not healthy") for line in frame)
    assert len([line for line in frame if line.startswith("block.")]) >= 3
    assert any(re.match(r"step \d+ +alert +exploding in block.10: ", line) for line in frame)
    assert bool(re.search(r"\x1b\[[0-9;]*3[1-7]m", text)) == (not colour)


def test_of_a_directory_it_goes_over_to_a_run_that_starts_later_and_says_so(record, runs):
    record("old", started=OLD).pipeline.close("finished")
    with Terminal(str(runs)) as terminal:
        terminal.until("the only run in")
        record("new", started=OLD + 3600)
        frame = terminal.until("went over from old to the newest of 2 runs in ")
    assert "new, rank 0: " in frame, frame[-2000:]


def test_a_run_that_started_before_the_one_shown_is_not_gone_over_to(record, runs):
    shown_run = record("shown", started=OLD + 3600)
    shown = Shown(runs)
    record("older", started=OLD)
    shown.go_over()
    assert shown.watched.path == shown_run.path


def test_a_new_recording_that_cannot_be_read_yet_is_waited_for(record, runs):
    old = record("old", started=OLD)
    old.pipeline.close("finished")
    shown = Shown(runs)
    new = new_recording_path(runs, "new", 0, OLD + 3600)
    new.touch()
    shown.go_over()
    assert shown.watched.path == old.path
    shutil.copy(old.path, new)
    shown.go_over()
    assert shown.watched.path == new


def test_a_file_and_a_run_that_were_named_stay(record, runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    runs.rename("gradwatch-runs")
    old = record("old", started=OLD, folder=Path("gradwatch-runs"))
    named = [Shown(old.path), Shown(Path("old"))]
    record("old", started=OLD + 3600, folder=Path("gradwatch-runs"))
    for shown in named:
        shown.go_over()
        assert shown.watched.path == old.path


def test_two_runs_of_odd_names_that_both_write_do_not_take_turns(record, runs):
    for name in ("one", "two"):
        run = record(name)
        run.pipeline.close("finished")
        run.path.rename(runs / f"{name}.sqlite")
    os.utime(runs / "one.sqlite", (OLD, OLD))
    shown = Shown(runs)
    os.utime(runs / "two.sqlite", (OLD - 1, OLD - 1))
    shown.go_over()
    assert shown.watched.info.run == "two"


@pytest.mark.parametrize("key", [b"q", b"Q"])
def test_q_ends_it_and_leaves_the_terminal_as_it_was(exploding, key):
    with Terminal(str(exploding.path)) as terminal:
        terminal.until("q ends")
        assert not termios.tcgetattr(terminal.follower)[3] & (termios.ECHO | termios.ICANON)
        os.write(terminal.leader, b"hello\x1b[A" + key)
        text = terminal.to_the_end()
        assert terminal.process.returncode == 0
        assert termios.tcgetattr(terminal.follower) == terminal.modes
    assert "hello" not in text
    assert text.rindex("\x1b[?1049l") > text.rindex("\x1b[?1049h")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_terminal_as_it_was_too(exploding, number):
    with Terminal(str(exploding.path)) as terminal:
        terminal.until("q ends")
        terminal.process.send_signal(number)
        terminal.to_the_end()
        assert termios.tcgetattr(terminal.follower) == terminal.modes


def test_where_stdin_is_no_terminal_no_key_is_named_and_none_is_waited_for(exploding):
    with Terminal(str(exploding.path), stdin=subprocess.DEVNULL) as terminal:
        frame = terminal.until("exploding in block.10: ")
        assert termios.tcgetattr(terminal.follower) == terminal.modes
        terminal.process.send_signal(signal.SIGINT)
        assert "q ends" not in frame + terminal.to_the_end()
    assert terminal.process.returncode == 0


def test_the_bottom_row_says_which_run_it_is_and_how_to_end_it_where_there_is_room(exploding):
    console = Console(width=40, height=24, no_color=True, file=None)
    for which, bottom in [
        ("", "q ends"),
        ("w" * 32, f"{'w' * 32}  q ends"),
        ("w" * 33, "w" * 33),
        ("w" * 50, f"{'w' * 39}…"),
    ]:
        with console.capture() as captured:
            console.print(screen(Watched(exploding.path), 40, 24, which, "q ends"))
        lines = captured.get().splitlines()
        assert lines[-1].rstrip() == bottom
        assert len(lines) <= 24


def test_a_run_without_steps_has_a_screen(record):
    assert any("No step yet" in line for line in lines_of(record("new")))
