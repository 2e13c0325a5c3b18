"""A recording's file in, steps out; while it is written, after it ended, after its writer died."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from gradwatch.errors import RecordingError
from gradwatch.recording.cards import Card, card_from
from gradwatch.recording.ring import read_ring
from gradwatch.recording.rows import ANOMALY_COLUMNS, COLUMNS, anomaly_from, record_from
from gradwatch.recording.runinfo import info_from_json
from gradwatch.recording.runs import runs_in
from gradwatch.recording.store import SCHEMA, SCHEMA_VERSION
from gradwatch.records import Anomaly, Culprit, RunInfo, StepRecord
from gradwatch.saying import say

if TYPE_CHECKING:
    import pandas

__all__ = ["Recording", "connected", "known_columns", "open_recording"]

SERIES = (
    "time",
    "duration_seconds",
    "overhead_seconds",
    "total_norm",
    "total_norm_clipped",
    "clip_coef",
    "micro_batches",
    "weight",
    "loss_scale",
    "learning_rate",
    "noise_scale",
    "local_norm",
)


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Opens a recording for reading.

    Args:
        path: a `.sqlite` file, or a directory, of which the run is opened that started last, by
            the names of its files; of several ranks the lowest.

    Raises:
        RecordingError: there is none, or it is not one that this version can read.
    """
    found = Path(path)
    if not found.is_file():
        found = runs_in(found)[0].path
    return Recording(found)


class Recording:
    """One run on one rank: the rows in SQLite and, behind them, what only the ring holds yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = connected(path)
        try:
            self.info = self._checked()
            self._steps = f"SELECT {known_columns(self._connection)} FROM steps"
        except sqlite3.Error as error:
            self.close()
            raise RecordingError(f"{path}: cannot be read ({error})") from error
        except RecordingError:
            self.close()
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        return self.info.layout.layers

    @property
    def rules(self) -> tuple[str, ...]:
        return self.info.rules

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped` or `crashed`; a killed run still says `running`."""
        row = self._read("SELECT value FROM meta WHERE key = 'state'").fetchone()
        return str(row[0]) if row else "running"

    def __len__(self) -> int:
        tail = self._only_in_ring()
        return int(self._read("SELECT count(*) FROM steps").fetchone()[0]) + len(tail)

    def __iter__(self) -> Iterator[StepRecord]:
        return self.records()

    def records(self, start: int | None = None, stop: int | None = None) -> Iterator[StepRecord]:
        """The records of steps `start` to `stop` (not included), in the order they were made."""
        low, high = -(2**62) if start is None else start, 2**62 if stop is None else stop
        anomalies, culprits = self._anomalies_by_step(), self._culprits(low, high)
        # The ring first: what the consumer moves meanwhile is then seen in both, not in neither.
        tail = {_key(record): record for record in self._in_ring() if low <= record.step < high}
        query = f"{self._steps} WHERE step >= ? AND step < ? ORDER BY id"
        for row in self._read(query, low, high):
            tail.pop(row[:2], None)
            yield record_from(row, self.info, anomalies.get(row[0], ()), culprits.get(row[0]))
        for record in tail.values():
            yield _with_culprit(record, culprits)

    def last(self, count: int) -> list[StepRecord]:
        """The newest records, oldest first."""
        tail = self._only_in_ring()[-count:] if count > 0 else []
        newest = f"{self._steps} ORDER BY id DESC LIMIT ?"
        rows = self._read(newest, max(0, count - len(tail))).fetchall()
        first = min([*(row[0] for row in rows), *(record.step for record in tail)], default=0)
        anomalies, culprits = self._anomalies_by_step(), self._culprits(first)
        stored = [
            record_from(row, self.info, anomalies.get(row[0], ()), culprits.get(row[0]))
            for row in rows
        ]
        return [*reversed(stored), *(_with_culprit(record, culprits) for record in tail)]

    def anomalies(self) -> list[Anomaly]:
        """Every anomaly, in the order they were found."""
        query = f"SELECT {', '.join(ANOMALY_COLUMNS)} FROM anomalies ORDER BY id"
        return [anomaly_from(row) for row in self._read(query)]

    def cards(self) -> list[Card]:
        """The card of each warning and alert, in the order of their steps."""
        if not self._has("cards"):
            return []
        rows = self._read("SELECT card FROM cards ORDER BY step, id").fetchall()
        cards = _readable(text for (text,) in rows)
        if len(cards) < len(rows):
            say(logging.WARNING, "%s: %d of %d cards cannot be read and are left out", self.path,
                len(rows) - len(cards), len(rows))  # fmt: skip
        return cards

    def policies(self) -> list[tuple[int, str]]:
        """Those that took the place of the one in `info`, as YAML, each with its first step."""
        if not self._has("policies"):
            return []
        return [(int(step), str(text)) for step, text in self._read("SELECT * FROM policies")]

    def series(self, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Steps [T] and values [T] of one column, e.g. `total_norm`; fast, no record is made.

        Raises:
            KeyError: no such column.
        """
        if name not in SERIES:
            raise KeyError(f"no series {name!r}. Expected one of {', '.join(SERIES)}")
        tail = self._only_in_ring()
        rows = self._read(f"SELECT step, {name} FROM steps ORDER BY id").fetchall()
        rows += [(record.step, getattr(record, name)) for record in tail]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        values = [math.nan if value is None else float(value) for _, value in rows]
        return steps, np.array(values, dtype=np.float64)

    def norms(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Steps [T] and the gradient norm of each layer [T, L]."""
        records = list(self.records())
        steps = np.array([record.step for record in records], dtype=np.int64)
        norms = np.array([record.grad_norms for record in records], dtype=np.float32)
        return steps, norms.reshape(len(records), len(self.layers))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a step, indexed by step; `grad_norm/<layer>` is the norm of a layer.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install 'gradwatch[pandas]'") from error
        from gradwatch.recording.export import columns_of

        rows = [columns_of(record, layers=True) for record in self.records()]
        frame = pandas.DataFrame(rows, columns=None if rows else ["step"])
        return frame.set_index("step")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        found = len(self.anomalies())
        return (
            f"Recording({self.info.run!r}, {len(self)} steps, {len(self.layers)} layers, "
            f"{self.state}, {found} {'anomaly' if found == 1 else 'anomalies'})"
        )

    def _read(self, query: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(query, values)
        except sqlite3.Error as error:
            raise RecordingError(f"{self.path}: cannot be read ({error})") from error

    def _checked(self) -> RunInfo:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and self._newest_ring() is not None:
            # Killed before its first transaction: all there is, is in the ring.
            self._connection.close()
            self._connection = sqlite3.connect(":memory:")
            self._connection.executescript(SCHEMA)
            return read_ring(self._ring_path)[0]
        if version > SCHEMA_VERSION:
            raise RecordingError(
                f"{self.path}: written by a newer gradwatch (schema {version}, this version reads "
                f"{SCHEMA_VERSION}). Upgrade gradwatch to read it"
            )
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'info'").fetchone()
        if row is None:
            raise RecordingError(f"{self.path}: not a recording of gradwatch")
        return info_from_json(row[0])

    @property
    def _ring_path(self) -> Path:
        return self.path.with_suffix(".ring")

    def _newest_ring(self) -> list[StepRecord] | None:
        """What the ring holds, or None where there is no ring that can be read."""
        try:
            return read_ring(self._ring_path)[1]
        except RecordingError:
            return None

    def _in_ring(self) -> list[StepRecord]:
        return self._newest_ring() or []

    def _only_in_ring(self) -> list[StepRecord]:
        """What the consumer has not moved into SQLite, or could not."""
        in_ring = self._in_ring()
        if not in_ring:
            return []
        first = min(record.step for record in in_ring)
        stored = set(self._read("SELECT step, time FROM steps WHERE step >= ?", first))
        return [record for record in in_ring if _key(record) not in stored]

    def _has(self, table: str) -> bool:
        """Whether there is a table; a recording of an earlier version has not all of them."""
        query = "SELECT 1 FROM sqlite_master WHERE name = ?"
        return self._read(query, table).fetchone() is not None

    def _culprits(self, low: int, high: int = 2**62) -> dict[int, Culprit]:
        """By step, of those that were looked for."""
        if not self._has("cards"):
            return {}
        query = "SELECT card FROM cards WHERE kind = 'nonfinite' AND step >= ? AND step < ?"
        cards = _readable(text for (text,) in self._read(query, low, high))
        return {card.step: card.culprit for card in cards if card.culprit is not None}

    def _anomalies_by_step(self) -> dict[int, tuple[Anomaly, ...]]:
        found: dict[int, tuple[Anomaly, ...]] = {}
        for anomaly in self.anomalies():
            found[anomaly.step] = (*found.get(anomaly.step, ()), anomaly)
        return found


def _readable(texts: Iterable[str]) -> list[Card]:
    cards = []
    for text in texts:
        with suppress(RecordingError):
            cards.append(card_from(text))
    return cards


def _with_culprit(record: StepRecord, culprits: Mapping[int, Culprit]) -> StepRecord:
    culprit = culprits.get(record.step)
    return record if culprit is None else replace(record, culprit=culprit)


def _key(record: StepRecord) -> tuple[int, float]:
    """A step can come again after a resume, and a clock can be set back; both at once cannot."""
    return record.step, record.time


def known_columns(connection: sqlite3.Connection) -> str:
    """COLUMNS, to be selected; a recording of an earlier version has not each of them."""
    known = {row[1] for row in connection.execute("PRAGMA table_info(steps)")}
    return ", ".join(name if name in known else f"NULL AS {name}" for name in COLUMNS)


def connected(path: Path) -> sqlite3.Connection:
    """Read-only. A WAL in a directory that cannot be written is read as far as it is merged."""
    modes = ("mode=ro", "mode=ro&immutable=1")
    # Of a recording that is whole, the usual way would leave a WAL behind that nobody removes.
    for mode in reversed(modes) if _is_folded(path) else modes:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=5)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            connection.close()
            failure = error
        else:
            return connection
    raise RecordingError(f"{path}: not a recording of gradwatch ({failure})") from failure


def _is_folded(path: Path) -> bool:
    """Whether it was written with a WAL and the last writer has closed it."""
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError:
        return False
    return header[18:20] == b"\2\2" and not path.with_name(f"{path.name}-wal").exists()
