"""A recording in, what it gained since the last look out; for those who follow a run.

    open, read, read, ...  ->  rows of SQLite in the order they were stored, each once
    in_ring                ->  the newest records, stored or not

No connection stays open between two looks: the last one to be closed is what folds the WAL into the
recording, and that must be the run's own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradwatch.errors import RecordingError
from gradwatch.recording.reader import Recording, connected, known_columns
from gradwatch.recording.ring import read_ring, records_begun
from gradwatch.recording.rows import ANOMALY_COLUMNS, anomaly_from, record_from
from gradwatch.recording.runinfo import status_from_json
from gradwatch.recording.store import bytes_of
from gradwatch.records import Anomaly, Status, StepRecord

__all__ = ["Gained", "Tail"]


@dataclass(frozen=True, kw_only=True)
class Gained:
    """What was stored since the last look, all of it as of one moment."""

    records: list[tuple[int, StepRecord]]
    """By row; each has its anomalies."""

    findings: list[Anomaly]
    """Those that came without a record; known once there are no more rows."""

    policies: list[tuple[int, str]]
    """As YAML, each with its first step."""

    state: str
    status: Status | None
    """None where a recording does not tell: it is empty or of an earlier version."""

    num_bytes: int
    more: bool
    """Whether there are more rows than were asked for."""


class Tail:
    """Remembers what was read of one recording."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RecordingError: it is not a recording that this version can read.
        """
        self.path = path
        self._ring = path.with_suffix(".ring")
        with Recording(path) as recording:
            self.info = recording.info
        self._row = self._anomaly = self._policy = 0
        self._unplaced: dict[int, list[Anomaly]] = {}
        """By step, of rows that were not asked for yet."""

    def landmarks(self) -> tuple[int, int]:
        """The newest row, and that of the last alert; 0 where there is none.

        Raises:
            RecordingError: the file cannot be read.
        """
        newest = "SELECT max(id) FROM steps"
        alert = "SELECT max(step) FROM anomalies WHERE level = 'alert'"
        try:
            with closing(connected(self.path)) as connection:
                if not _has(connection, "steps"):
                    return 0, 0
                queries = newest, f"{newest} WHERE step = ({alert})"
                first, second = (connection.execute(query).fetchone()[0] for query in queries)
                return int(first or 0), int(second or 0)
        except sqlite3.Error as error:
            raise RecordingError(f"{self.path}: cannot be read ({error})") from error

    def skip_to(self, row: int) -> None:
        """Leaves out the rows up to this one."""
        self._row = max(self._row, row)

    def read(self, most: int) -> Gained:
        """
        Args:
            most: how many rows at a time.

        Raises:
            RecordingError: the file cannot be read, or a row is not one of a recording.
        """
        try:
            with closing(connected(self.path)) as connection:
                connection.execute("BEGIN")
                # A writer that was killed before its first transaction has left no tables.
                return self._gained(connection, most) if _has(connection, "meta") else NOTHING
        except sqlite3.Error as error:
            raise RecordingError(f"{self.path}: cannot be read ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordingError(
                f"{self.path}: a row after {self._row} is damaged ({error})"
            ) from error

    def records_begun(self) -> int | None:
        """How many records the ring was given so far; None where there is no ring."""
        try:
            return records_begun(self._ring) if self._ring.is_file() else None
        except RecordingError:
            return None

    def in_ring(self) -> list[StepRecord]:
        """What the ring holds, oldest first; nothing where it is not the ring of this run."""
        try:
            info, records = read_ring(self._ring)
        except RecordingError:
            return []
        return records if info.layout == self.info.layout else []

    def _gained(self, connection: sqlite3.Connection, most: int) -> Gained:
        anomalies = self._new_anomalies(connection)
        rows = connection.execute(
            f"SELECT id, {known_columns(connection)} FROM steps WHERE id > ? ORDER BY id LIMIT ?",
            (self._row, most + 1),
        ).fetchall()
        more = len(rows) > most
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        for self._anomaly, anomaly in anomalies:
            self._unplaced.setdefault(anomaly.step, []).append(anomaly)
        records = list(self._placed(rows[:most]))
        policies = self._new_policies(connection)
        status = meta.get("status")
        gained = Gained(
            records=records,
            findings=[] if more else [one for some in self._unplaced.values() for one in some],
            policies=[(step, text) for _, step, text in policies],
            state=str(meta.get("state", "running")),
            status=None if status is None else status_from_json(status),
            num_bytes=bytes_of(connection),
            more=more,
        )
        if not more:
            self._unplaced = {}
        self._row = max([self._row, *(row for row, _ in records)])
        self._policy = max([self._policy, *(number for number, _, _ in policies)])
        return gained

    def _placed(self, rows: list[Any]) -> Iterator[tuple[int, StepRecord]]:
        """Records with their anomalies."""
        for number, *row in rows:
            anomalies = tuple(self._unplaced.pop(row[0], ()))
            yield number, self._checked(record_from(row, self.info, anomalies))

    def _checked(self, record: StepRecord) -> StepRecord:
        """
        Raises:
            ValueError, TypeError: it could not be counted or shown later.
        """
        wanted = len(self.info.layout.parameters)
        sizes = {len(record.tensor_norms_P), len(record.tensor_coefs_P), len(record.present_P)}
        sizes |= {len(values_P) for values_P in record.samples.values()}
        if sizes != {wanted}:
            raise ValueError(f"expected values of {wanted} parameters. Received: {sorted(sizes)}")
        if not isinstance(record.step, int) or not isinstance(record.micro_batches, int):
            raise TypeError("expected a whole number as step")
        return record

    def _new_anomalies(self, connection: sqlite3.Connection) -> list[tuple[int, Anomaly]]:
        columns = ", ".join(ANOMALY_COLUMNS)
        query = f"SELECT id, {columns} FROM anomalies WHERE id > ? ORDER BY id"
        found = connection.execute(query, (self._anomaly,)).fetchall()
        return [(number, anomaly_from(row)) for number, *row in found]

    def _new_policies(self, connection: sqlite3.Connection) -> list[tuple[int, int, str]]:
        if not _has(connection, "policies"):
            return []
        query = "SELECT rowid, step, policy FROM policies WHERE rowid > ? ORDER BY rowid"
        rows = connection.execute(query, (self._policy,)).fetchall()
        return [(number, int(step), str(text)) for number, step, text in rows]


NOTHING = Gained(
    records=[], findings=[], policies=[], state="running", status=None, num_bytes=0, more=False
)


def _has(connection: sqlite3.Connection, table: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE name = ?"
    return connection.execute(query, (table,)).fetchone() is not None
