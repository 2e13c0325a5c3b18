"""A directory in, one of its runs out: what a report is of where no recording is named.

Runs are told apart by the names of their files, so that one that cannot be read hides no other.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from gradwatch.recording.finding import BEGIN_SECONDS, FOLDER, NAMED, STAMP
from gradwatch.recording.reader import recordings_in

__all__ = ["chosen", "runs_in"]


def chosen(named: Path | None) -> tuple[Path, str]:
    """The recording, and which one it is there; empty where it was named itself.

    Args:
        named: a recording, or a directory whose newest run is meant; None for that of FOLDER.

    Raises:
        RecordingError: there is none.
    """
    if named is not None and not named.is_dir():
        return named, ""
    folder = Path(FOLDER) if named is None else named
    runs = runs_in(folder)
    which = "the only run" if len(runs) == 1 else f"the newest of {len(runs)} runs"
    return runs[0], f"{which} in {folder}"


def runs_in(folder: Path) -> list[Path]:
    """Of each run the recording of its lowest rank, the run that was written last first.

    Raises:
        RecordingError: there is none.
    """
    newest_first = recordings_in(folder)
    runs: list[dict[int, Path]] = []
    latest: dict[tuple[Path, str], tuple[float, dict[int, Path]]] = {}
    for began, rank, path, stem in sorted(map(_told_apart, newest_first)):
        run = latest.get((path.parent, stem))
        if run is None or rank in run[1] or began - run[0] > BEGIN_SECONDS:
            run = latest[path.parent, stem] = began, {}
            runs.append(run[1])
        run[1][rank] = path
    place = {path: number for number, path in enumerate(newest_first)}
    runs.sort(key=lambda ranks: min(place[path] for path in ranks.values()))
    return [ranks[min(ranks)] for ranks in runs]


def _told_apart(path: Path) -> tuple[float, int, Path, str]:
    """When it began by the clock of its machine, its rank, and what all ranks of it are called."""
    found = NAMED.fullmatch(path.name)
    if found is not None:
        stem, stamp, rank = found.groups()
        with suppress(ValueError, OverflowError):
            return time.mktime(time.strptime(stamp, STAMP)), int(rank), path, stem
    return 0.0, 0, path, path.name
