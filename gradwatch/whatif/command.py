"""`gradwatch replay` and `gradwatch advise`: what the command line prints of them."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradwatch.policy import load_policy
from gradwatch.progress import shown_recording
from gradwatch.whatif.advice import Point, advise
from gradwatch.whatif.replay import replay
from gradwatch.whatif.telling import picture, rule_table, summary

__all__ = ["advise_command", "replay_command"]

PIPE_WIDTH = 100
RecordingArgument = Annotated[
    Path,
    typer.Argument(help="A recording, or a directory of them: its newest.", show_default=False),
]


def replay_command(
    recording: RecordingArgument,
    policy: Annotated[
        Path,
        typer.Option("--policy", "-p", metavar="FILE", help="The policy.", show_default=False),
    ],
) -> None:
    """Says what a policy would have done in a recorded run.

    For the policy that ran, what was recorded is what happened. It is computed
    again, and what differs is listed.
    """
    loaded = load_policy(policy)
    with shown_recording(recording) as opened:
        found = replay(opened.records(), opened.info, loaded, opened.policies())
    console = _console()
    for line in summary(found):
        print(line)
    if found.policy.clip:
        print()
        console.print(rule_table(found))
    print()
    for line in picture(found, console.width):
        print(line.rstrip())


def advise_command(recording: RecordingArgument) -> None:
    """Advises a limit and a number of micro-batches from what a run recorded."""
    with shown_recording(recording) as opened:
        info = opened.info
        advice = advise(opened.records(), info)
    print(f"run {info.run}")
    _print_point(advice.limit)
    if advice.policy:
        print(textwrap.indent(advice.policy.rstrip(), "    "))
    _print_point(advice.accumulation)
    for warning in advice.warnings:
        _print_point(warning, "warning: ")


def _print_point(point: Point, kind: str = "") -> None:
    width = _console().width
    print()
    print(textwrap.fill(f"{kind}{point.what}", width, break_on_hyphens=False))
    said = f"{point.why}." + (f" [{point.source}]" if point.source else "")
    indent = "  "
    print(
        textwrap.fill(
            said, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    )


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return (
        Console(highlight=False, markup=False, width=width)
        if not console.is_terminal
        else (console)
    )
