"""Whether the process that writes a recording still lives, as far as this process can tell.

A recording that was killed says `running` for ever. Its pid alone proves nothing: another machine
or container numbers its processes anew, and a number is given again.
"""

from __future__ import annotations

import os
from pathlib import Path

from gradwatch.records import RunInfo

__all__ = ["process_table", "writer_lives"]

PROC = Path("/proc")
TOLERATED_SECONDS = 60.0
"""By which a process may seem to have begun after its run: clocks are set while they go."""


def process_table(proc: Path = PROC) -> str:
    """Which boot and pid namespace the pids of this process are of; empty where unknown."""
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(proc / 'self/ns/pid')}"
    except OSError:
        return ""


def writer_lives(info: RunInfo, proc: Path = PROC) -> bool | None:
    """Whether the process of a run is there, or None where its pid says nothing here."""
    here = process_table(proc)
    if not here or info.process_table != here or info.pid <= 0:
        return None
    try:
        stat = (proc / str(info.pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    # The name, in parentheses, may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    if state in "ZX":
        return False
    began = _boot_time(proc) + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return began <= info.started + TOLERATED_SECONDS


def _boot_time(proc: Path) -> float:
    for line in (proc / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
