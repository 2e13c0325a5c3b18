"""Records in, SQLite out: one row a step, bounded in size, readable while it is written."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradwatch.errors import RecordingError
from gradwatch.recording.cards import BOUND_CARDS, CARDS, INSERT_CARD, Card, card_row
from gradwatch.recording.finding import STAMP, in_file_name
from gradwatch.recording.rows import ANOMALY_COLUMNS, COLUMNS, anomaly_row, row_of
from gradwatch.recording.runinfo import info_to_json, status_to_json
from gradwatch.records import Anomaly, RunInfo, Status, StepRecord

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Store", "bytes_of", "new_recording_path"]

SCHEMA_VERSION = 4
MAX_BYTES = 2 * 1024**3
DELETED_AT_ONCE = 20
"""Retention takes away one row of so many when the bound is reached."""

SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (id INTEGER PRIMARY KEY, {", ".join(COLUMNS)});
CREATE INDEX steps_by_step ON steps (step);
CREATE TABLE anomalies (id INTEGER PRIMARY KEY, {", ".join(ANOMALY_COLUMNS)});
CREATE TABLE policies (step INTEGER NOT NULL, policy TEXT NOT NULL);
CREATE TABLE {CARDS};
"""
_INSERT = f"INSERT INTO steps ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
_INSERT_ANOMALY = (
    f"INSERT INTO anomalies ({', '.join(ANOMALY_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(ANOMALY_COLUMNS))})"
)


class Store:
    """A new recording. Made on one thread, then used by one other."""

    def __init__(self, path: Path, info: RunInfo, max_bytes: int = MAX_BYTES) -> None:
        """
        Raises:
            RecordingError: the file cannot be made.
            FileExistsError: it exists.
        """
        self.path = path
        self._rules = info.rules
        self._max_bytes = max_bytes
        try:
            # Refuses a file that exists: a recording is never written over.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._prepare(info)
        except FileExistsError:
            raise
        except (OSError, sqlite3.Error) as error:
            raise RecordingError(f"{path}: a recording cannot be made here ({error})") from error

    def _prepare(self, info: RunInfo) -> None:
        run = self._connection.execute
        run("PRAGMA auto_vacuum = INCREMENTAL")
        # WAL needs shared memory, which network file systems lack: SQLite then answers `delete`,
        # and the rollback journal does the same work more slowly.
        run("PRAGMA journal_mode = WAL").fetchone()
        # Power loss may cost the last transactions, never the file. A killed process costs none.
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA busy_timeout = 5000")
        run("BEGIN IMMEDIATE")
        for statement in SCHEMA.split(";"):
            run(statement)
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        meta = {"info": info_to_json(info), "state": "running"}
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        run("COMMIT")

    def add(self, records: Sequence[StepRecord]) -> None:
        """Stores records and their anomalies in one transaction.

        Raises:
            RecordingError: nothing of them was stored, e.g. because the disk is full.
        """
        with self._storing(f"{len(records)} steps were"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(_INSERT, (row_of(r, self._rules) for r in records))
                anomalies = [anomaly_row(a) for record in records for a in record.anomalies]
                self._connection.executemany(_INSERT_ANOMALY, anomalies)
                if self.bytes > self._max_bytes:
                    self._forget()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def add_anomaly(self, anomaly: Anomaly) -> None:
        """Stores a finding that came without a record.

        Raises:
            RecordingError: it was not stored.
        """
        with self._storing("a finding was"):
            self._connection.execute(_INSERT_ANOMALY, anomaly_row(anomaly))

    def add_card(self, card: Card) -> None:
        """Stores the card of a finding.

        Raises:
            RecordingError: it was not stored.
        """
        with self._storing("a card was"):
            self._connection.execute(INSERT_CARD, card_row(card))
            self._connection.execute(BOUND_CARDS)

    def _forget(self) -> None:
        """Takes the oldest steps away, but those of an anomaly; freed pages are used again."""
        self._connection.execute(
            "DELETE FROM steps WHERE id IN (SELECT id FROM steps WHERE step NOT IN "
            "(SELECT step FROM anomalies) ORDER BY id LIMIT max(1, "
            f"(SELECT count(*) / {DELETED_AT_ONCE} FROM steps)))"
        )

    def note_policy(self, step: int, policy: str) -> None:
        """The policy that holds from a step on, as canonical YAML; the first one is in the info."""
        with self._storing("a policy was"):
            self._connection.execute("INSERT INTO policies VALUES (?, ?)", (step, policy))

    def note_state(self, state: str) -> None:
        """How the run is: `running`, `finished`, `stopped` or `crashed`."""
        with self._storing("its state was"):
            self._connection.execute("UPDATE meta SET value = ? WHERE key = 'state'", (state,))

    def note_status(self, status: Status) -> None:
        """What no record tells of the run, as it is now."""
        values = ("status", status_to_json(status))
        with self._storing("its status was"):
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", values)

    @contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RecordingError(f"{self.path}: {what} not stored ({error})") from error

    @property
    def bytes(self) -> int:
        """Of the pages that hold something."""
        return bytes_of(self._connection)

    def close(self) -> None:
        self._connection.close()


def bytes_of(connection: sqlite3.Connection) -> int:
    """Of the pages of a database that hold something."""
    pages, free, size = (
        connection.execute(f"PRAGMA {pragma}").fetchone()[0]
        for pragma in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def new_recording_path(
    directory: str | os.PathLike[str], run: str, rank: int, started: float
) -> Path:
    """A file that does not exist yet, named after the run; its directories are made.

    Raises:
        OSError: the directory cannot be made.
    """
    stamp = time.strftime(STAMP, time.localtime(started))
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{in_file_name(run)}-{stamp}-rank{rank}", 1
    path = folder / f"{stem}.sqlite"
    while path.exists() or path.with_suffix(".ring").exists():
        number += 1
        path = folder / f"{stem}-{number}.sqlite"
    return path
