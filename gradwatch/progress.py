"""A recording whose every pass has a progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from gradwatch.recording.reader import Recording, open_recording
from gradwatch.records import StepRecord

__all__ = ["shown_recording"]


@contextmanager
def shown_recording(path: str | os.PathLike[str]) -> Iterator[Recording]:
    """Opens a recording, or the newest of a directory.

    Raises:
        RecordingError: there is none, or it is not one that this version can read.
    """
    with open_recording(path) as found:
        file = found.path
    progress = Progress(
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
    with progress, _Shown(file, progress) as shown:
        yield shown


class _Shown(Recording):
    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path)
        self._progress = progress

    def records(self, start: int | None = None, stop: int | None = None) -> Iterator[StepRecord]:
        bar = self._progress.add_task(f"reading {self.path.name}", total=len(self))
        for record in super().records(start, stop):
            yield record
            self._progress.advance(bar)
