"""`gradwatch top`: how a run stands, in a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console

from gradwatch.page.watched import Watched
from gradwatch.top import screen


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


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 20), (200, 60)])
def test_it_fits_into_the_terminal(exploding, width, height):
    lines = lines_of(exploding, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height


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


def test_a_run_without_steps_has_a_screen(record):
    assert any("No step yet" in line for line in lines_of(record("new")))
