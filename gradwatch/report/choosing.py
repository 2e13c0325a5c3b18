"""What was named in, a recording out: the newest run of a directory, or the last of a name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.errors import RecordingError
from gradwatch.recording.finding import FOLDER, in_file_name
from gradwatch.recording.reader import open_recording
from gradwatch.recording.runs import runs_in
from gradwatch.saying import one_line

__all__ = ["Named", "chosen", "folder_of"]

Named = Annotated[
    Path | None,
    typer.Argument(
        help="A recording, a directory whose newest run is meant, or the name of a run in "
        f"{FOLDER}, of which the last start is meant.",
        show_default=f"the newest run in {FOLDER}",
    ),
]
"""What a command is given, as `chosen` takes it."""

MOST_NAMES = 20


def chosen(named: Path | None) -> tuple[Path, str]:
    """The recording, and which one it is there; empty where it was named itself.

    Args:
        named: a recording; a directory whose newest run is meant, None for FOLDER; or the name of
            a run in FOLDER, of which the last start is meant.

    Raises:
        RecordingError: there is none.
    """
    folder = folder_of(named)
    if folder is not None:
        runs = runs_in(folder)
        path, passed_over = _first_readable([run.path for run in runs])
        which = "the only run" if len(runs) == 1 else f"the newest of {len(runs)} runs"
        if passed_over:
            names = ", ".join(one_line(one.name) for one in passed_over)
            which = f"the newest that can be read ({names} cannot) of {len(runs)} runs"
        return path, f"{which} in {one_line(str(folder))}"
    assert named is not None
    return (named, "") if os.path.isfile(named) else _of_name(str(named))


def folder_of(named: Path | None) -> Path | None:
    """The directory whose newest run is meant, None where a recording or a run is."""
    if named is None:
        return Path(FOLDER)
    return named if os.path.isdir(named) else None


def _first_readable(paths: Sequence[Path]) -> tuple[Path, list[Path]]:
    """And those before it.

    Raises:
        RecordingError: none can be read; what is wrong with the first.
    """
    first: RecordingError | None = None
    for place, path in enumerate(paths):
        try:
            open_recording(path).close()
        except RecordingError as error:
            first = first or error
        else:
            return path, list(paths[:place])
    assert first is not None
    raise first


def _of_name(name: str) -> tuple[Path, str]:
    try:
        runs = runs_in(Path(FOLDER))
    except RecordingError as error:
        raise RecordingError(
            f"{one_line(name)}: no such recording or directory, and no name of a run: {error}"
        ) from None
    found = [run for run in runs if run.name == name]
    found = found or [run for run in runs if run.name == in_file_name(name)]
    if not found:
        names = [one_line(known) for known in dict.fromkeys(run.name for run in runs)]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        raise RecordingError(
            f"{one_line(name)}: no such recording or directory, and no run of this name in "
            f"{FOLDER}/. There are: {', '.join(names[:MOST_NAMES])}{more}"
        )
    which = "the only run" if len(found) == 1 else f"the last of {len(found)} runs"
    return found[0].path, f"{which} called {one_line(found[0].name)} in {FOLDER}"
