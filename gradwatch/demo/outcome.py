"""From options to an exit code: one run with its end screen, or runs without end."""

from __future__ import annotations

import textwrap
from collections import deque
from dataclasses import replace
from itertools import count
from pathlib import Path

from rich.console import Console

from gradwatch.demo.plain import say
from gradwatch.demo.session import Options, run_once
from gradwatch.demo.summary import further, one_line, showed, summary
from gradwatch.stopping import stoppable

__all__ = ["forever", "once"]

FAULTY_OF = 4
"""With --loop one run of so many has the fault, first the second one."""

KEPT_RECORDINGS = 48
"""With --loop, older ones of this process are deleted."""

INTERRUPTED = 130


def once(options: Options, console: Console) -> int:
    """Runs, prints what happened, and returns 0 where gradwatch saw just that."""
    with stoppable() as stop:
        findings, setting = run_once(options, console, stop)
    for heading, lines in summary(findings, setting):
        say(console, f"\n{heading}", "bold")
        for line in lines:
            say(console, _wrapped(line, console))
    say(console, "\nLook further", "bold")
    for line in further(findings, setting):
        say(console, f"  {line}")
    if stop.asked:
        return INTERRUPTED
    if showed(findings, setting):
        return 0
    expected = f"an alert {setting.expects!r} after the fault" if setting.expects else "no alert"
    say(console, f"\nThis is not what the demo should show: expected {expected}.", "bold red")
    return 1


def _wrapped(line: str, console: Console) -> str:
    """At words and indented, where a terminal would break it anywhere."""
    if not console.is_terminal:
        return f"  {line}"
    return textwrap.fill(line, console.width, initial_indent="  ", subsequent_indent="    ")


def forever(options: Options, console: Console) -> int:
    """Runs until asked to stop; a line for each run."""
    kept: deque[Path] = deque()
    runs = count()
    with stoppable() as stop:
        while not stop.asked:
            i = next(runs)
            fault = options.fault if i % FAULTY_OF == 1 else "none"
            run = replace(options, fault=fault, seed=options.seed + i)
            findings, setting = run_once(run, console, stop)
            say(console, one_line(findings, setting))
            kept.append(setting.recording)
            if len(kept) > KEPT_RECORDINGS:
                _delete(kept.popleft())
    return 0


def _delete(recording: Path) -> None:
    for suffix in (".ring", ".sqlite-wal", ".sqlite-shm", recording.suffix):
        recording.with_suffix(suffix).unlink(missing_ok=True)
