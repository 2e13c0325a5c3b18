"""One recording, live or ended: what is drawn and said of it, kept up to date when it is asked for.

Watched.look()  ->  Seen, a value that nobody changes
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradwatch.follower import checked
from gradwatch.page.columns import told_of
from gradwatch.page.grid import Grid, columns_for, grid_of, joined, with_usual
from gradwatch.page.overview import Overview
from gradwatch.page.reading import Rows, reading, rows_after, rows_between, rows_of, steps_in
from gradwatch.recording.reader import Recording
from gradwatch.recording.tail import Tail
from gradwatch.report.standing import Standing, Stands

__all__ = ["Seen", "Watched"]

CHUNK = 4096
FRESH_SECONDS = 0.5
"""Two who ask within that time see the same."""

RECENT = 100
MOST_WORST = 10
MOST_COLUMNS = 480


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run at one moment."""

    version: int
    """Grows with whatever can be seen of the run."""

    stands: Stands
    first: int
    last: int
    """Steps; `last` is -1 before the first one."""

    skipped: int
    told_of: Sequence[str]
    """The figures that have something to show, of those that not every run has."""

    worst: Sequence[tuple[int, float, float]]
    """Places of layers, their norm in the last step and what is usual for them; oddest first."""


class Watched:
    """Any thread may call; they take turns."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RecordingError: it is not a recording that this version can read.
        """
        self.path = path
        with Recording(path) as recording:
            self.info = checked(path, recording.info)
        self._lock = threading.RLock()
        self._overview = Overview(len(self.info.layout.layers))
        self._standing = Standing(path)
        self._row = self._skipped = self._version = 0
        self._recent: Rows | None = None
        self._from_ring: Rows | None = None
        self._looked = float("-inf")
        self._seen: Seen | None = None
        self._signature: tuple[object, ...] = ()

    @property
    def unread_bytes(self) -> int:
        """Of a recording that was not read yet, which takes a second for some 200 MB."""
        try:
            return 0 if self._seen is not None else self.path.stat().st_size
        except OSError:
            return 0

    def look(self) -> Seen:
        """
        Raises:
            RecordingError: it cannot be read.
        """
        with self._lock:
            if self._seen is None or time.monotonic() - self._looked > FRESH_SECONDS:
                self._seen = self._look()
                self._looked = time.monotonic()
            return self._seen

    def grid(self, start: int, stop: int, most: int = MOST_COLUMNS) -> Grid | None:
        """Steps `start` to `stop` (not included) in at most so many columns and one or two more;
        None where there are none. A range that is a column wide is read from the recording anew.

        Raises:
            RecordingError: it cannot be read.
        """
        with self._lock:
            whole = self._overview.grid()
            if whole is None:
                return None
            width = columns_for(stop - start, most)
            if width >= whole.width:
                part = whole.between(start, stop).widened(width // whole.width)
                return part if len(part.index_C) else None
            parts = []
            with reading(self.path) as connection:
                begin, end = start // width * width, -(-stop // width) * width
                for rows in rows_between(connection, self.info, begin, end):
                    parts.append(self._with_usual(rows, width))
            if self._from_ring is not None:
                parts.append(self._with_usual(self._from_ring, width).between(start, stop))
            parts = [part for part in parts if len(part.index_C)]
            return joined(parts) if parts else None

    def _with_usual(self, rows: Rows, width: int) -> Grid:
        grid, whole = grid_of(rows, width), self._overview.grid()
        assert whole is not None
        places = np.searchsorted(whole.index_C, grid.steps_C // whole.width, side="right") - 1
        return with_usual(grid, whole.usual_CL[np.clip(places, 0, None)])

    def _look(self) -> Seen:
        self._read()
        stands = self._standing.look()
        if stands.state != "running" and self._from_ring is None:
            self._take_ring()
        known = stands.known
        signature = (
            self._row, stands.state, len(known.anomalies), len(known.cards),
            len(stands.policies), stands.verdict.headline,
        )  # fmt: skip
        self._version += signature != self._signature
        self._signature = signature
        whole = self._overview.grid()
        return Seen(
            version=self._version,
            stands=stands,
            first=self._overview.first,
            last=self._overview.last if whole is not None else -1,
            skipped=self._skipped,
            told_of=told_of(whole),
            worst=self._worst(),
        )

    def _read(self) -> None:
        with reading(self.path) as connection:
            if self._row == 0 and (there := steps_in(connection)) is not None:
                self._overview.expect(*there)
            while True:
                rows = rows_after(connection, self.info, self._row, CHUNK)
                if not len(rows.steps_N):
                    break
                self._row = rows.last
                self._take(rows)

    def _take(self, rows: Rows) -> None:
        if not len(rows.steps_N):
            return
        self._overview.add(rows)
        self._skipped += int(rows.numbers["skipped"].sum())
        self._recent = _newest(self._recent, rows)

    def _take_ring(self) -> None:
        """What a process that was killed had not stored."""
        last = float("-inf") if self._recent is None else float(self._recent.numbers["time"][-1])
        missing = [r for r in Tail(self.path).in_ring() if r.time > last]
        self._from_ring = rows_of(missing, self.info)
        self._take(self._from_ring)

    def _worst(self) -> list[tuple[int, float, float]]:
        grid = self._overview.grid()
        recent = self._recent
        if grid is None or recent is None:
            return []
        with np.errstate(all="ignore"):
            norms_L = recent.norms_NL[-1]
            usual_L = np.power(10.0, grid.usual_CL[-1])
            odd_L = np.abs(np.log(norms_L / usual_L))
        odd_L = np.where(np.isnan(odd_L), -1, odd_L)
        order = np.argsort(-odd_L, kind="stable")
        return [(int(i), float(norms_L[i]), float(usual_L[i])) for i in order[:MOST_WORST]]


def _newest(before: Rows | None, rows: Rows) -> Rows:
    """The last rows of both."""
    if before is None or len(rows.steps_N) >= RECENT:
        return _tail(rows)
    return _tail(
        Rows(
            rows.last,
            np.concatenate([before.steps_N, rows.steps_N]),
            {k: np.concatenate([v, rows.numbers[k]]) for k, v in before.numbers.items()},
            {k: np.concatenate([v, rows.limits[k]]) for k, v in before.limits.items()},
            np.concatenate([before.norms_NL, rows.norms_NL]),
        )
    )


def _tail(rows: Rows) -> Rows:
    last = slice(-RECENT, None)
    return Rows(
        rows.last,
        rows.steps_N[last].copy(),
        {name: values[last].copy() for name, values in rows.numbers.items()},
        {rule: values[last].copy() for rule, values in rows.limits.items()},
        rows.norms_NL[last].copy(),
    )
