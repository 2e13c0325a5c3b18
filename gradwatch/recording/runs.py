"""A directory in, its runs out, the one that started last first.

Runs are told apart by the names of their files, so that one that cannot be read hides no other.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gradwatch.errors import RecordingError
from gradwatch.recording.finding import BEGIN_SECONDS, MADE, NAMED, STAMP

__all__ = ["Run", "runs_in"]


@dataclass(slots=True)
class Run:
    """One start of a run, with what its ranks recorded."""

    name: str
    """As its files have it; that of the file where it says no more."""

    began: float
    """By the clock of its machine; of a file that does not say it, when it was written last."""

    ranks: dict[int, Path] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The recording of its lowest rank."""
        return self.ranks[min(self.ranks)]


def runs_in(directory: Path) -> list[Run]:
    """Those there and one level below, the one that started last first; at least one.

    Raises:
        RecordingError: there is none.
    """
    runs: list[Run] = []
    starts: dict[tuple[Path, str], list[Run]] = {}
    found = map(_told_apart, _recordings_in(directory))
    for rank, began, path, name in sorted(found):
        of_name = starts.setdefault((path.parent, name), [])
        near = [run for run in of_name
                if rank not in run.ranks and abs(began - run.began) <= BEGIN_SECONDS]  # fmt: skip
        if near:
            run = min(near, key=lambda run: abs(began - run.began))
        else:
            run = Run(name, began)
            of_name.append(run)
            runs.append(run)
        run.ranks[rank] = path
    return sorted(
        runs, key=lambda run: (run.began, _last_written(run.path), run.path.name), reverse=True
    )


def _recordings_in(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise RecordingError(
            f"{directory}: no such recording, and no directory of recordings. {MADE}"
        )
    found: dict[Path, Path] = {}
    there = [*directory.glob("*.sqlite"), *directory.glob("*/*.sqlite")]
    for path in sorted(there, key=Path.is_symlink):  # a file goes before the links to it
        with suppress(OSError, RuntimeError):  # a link to itself
            if path.is_file():
                found.setdefault(path.resolve(), path)
    if not found:
        raise RecordingError(f"{directory}: no recording (*.sqlite) in this directory")
    return list(found.values())


def _told_apart(path: Path) -> tuple[int, float, Path, str]:
    """Its rank, when it began, and what all ranks of it are called."""
    found = NAMED.fullmatch(path.name)
    if found is not None:
        name, stamp, rank = found.groups()
        with suppress(ValueError, OverflowError):
            return int(rank), time.mktime(time.strptime(stamp, STAMP)), path, name
    return 0, _last_written(path), path, path.name


def _last_written(path: Path) -> float:
    """A live run writes to its WAL for a long time before to the file itself, and removes it."""
    times = [0.0]
    for file in (path, path.with_name(f"{path.name}-wal")):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)
