"""Rows in on the training thread, records out on another: the last 256 steps in mapped memory.

    append, log (producer)  ->  slots  ->  take (consumer), peek, read_ring (anybody)

The ring is the queue between the two threads and the part of a recording that survives SIGKILL:
stores to a shared mapping stay in the page cache when the process dies. A slot is numbered before
and after it is written; a reader copies it and keeps the copy only if both numbers agree with what
it asked for, before and after copying.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.errors import RecordingError
from gradwatch.recording.runinfo import info_from_json, info_to_json
from gradwatch.records import RunInfo, StepRecord
from gradwatch.saying import say

__all__ = ["Ring", "Row", "read_ring", "records_begun"]

MAGIC = b"gradwatch-ring-2"
SLOTS = 256
NAMES = 32
NAME_BYTES = 64
HEADER = struct.Struct("<16sIIQQ")
"""magic, slots, bytes of the description, records begun, records closed."""

BEGUN, CLOSED = 24, 32
"""Offsets of the last two."""


def _slot_dtype(info: RunInfo) -> np.dtype[Any]:
    num_parameters, num_rules = len(info.layout.parameters), len(info.rules)
    return np.dtype(
        [
            ("before", "<u8"),
            ("step", "<i8"),
            ("time", "<f8"),
            ("duration_seconds", "<f8"),
            ("overhead_seconds", "<f8"),
            ("total_norm", "<f8"),
            ("total_norm_clipped", "<f8"),
            ("clip_coef", "<f8"),
            ("fired", "<u8"),
            ("skipped", "<i8"),
            ("micro_batches", "<i8"),
            ("weight", "<f8"),
            ("loss_scale", "<f8"),
            ("learning_rate", "<f8"),
            ("noise_scale", "<f8"),
            ("logged", "<u8"),
            ("scalars", "<f8", (NAMES,)),
            ("limits", "<f8", (num_rules,)),
            ("norms", "<f4", (num_parameters,)),
            ("coefs", "<f4", (num_parameters,)),
            ("measures", "<f4", (len(info.measures), num_parameters)),
            ("present", "u1", (num_parameters,)),
            ("clipped", "u1"),
            ("after", "<u8"),
        ]
    )


@dataclass(slots=True, kw_only=True)
class Row:
    """One step as the training thread hands it over; see StepRecord for the meaning."""

    step: int
    time: float
    duration_seconds: float
    overhead_seconds: float
    total_norm: float
    total_norm_clipped: float
    clip_coef: float
    fired: int
    """Bit k is set where rule k was over its limit."""

    skipped: int
    """0, or 1 + the index of the reason in `info.reasons`."""

    micro_batches: int
    weight: float
    loss_scale: float
    learning_rate: float
    noise_scale: float = math.nan
    limits: Sequence[float]
    tensor_norms_P: npt.NDArray[np.float32]
    tensor_coefs_P: npt.NDArray[np.float32] | None
    """None stands for all 1."""

    present_P: npt.NDArray[np.bool_] | None
    """None stands for all."""

    measures: Sequence[npt.NDArray[np.float32]] = ()
    """[M] by `info.measures`, each [P]; none where nothing was measured."""


_PLAIN = tuple(field.name for field in fields(Row))[:14]
"""What one store each copies."""


class _Memory:
    """The mapped bytes, with their parts as arrays."""

    def __init__(self, info: RunInfo, slots: int, buffer: Any, names_at: int) -> None:
        self.info = info
        self.slots = slots
        self.buffer = buffer
        self.counters = np.frombuffer(buffer, "<u8", 2, BEGUN)
        self.names = np.frombuffer(buffer, f"S{NAME_BYTES}", NAMES, names_at)
        dtype = _slot_dtype(info)
        self.rows = np.frombuffer(buffer, dtype, slots, names_at + NAMES * NAME_BYTES)

    def copied(self, number: int) -> StepRecord | None:
        """The record with this number (from 1), or None where it is gone or being written."""
        row = self.rows[(number - 1) % self.slots]
        if row["after"] != number:
            return None
        copy = row.copy()
        if row["before"] != number or copy["before"] != number or copy["after"] != number:
            return None
        return self._record(copy)

    def _record(self, row: Any) -> StepRecord:
        info, bits = self.info, int(row["logged"])
        scalars = {
            bytes(self.names[i]).decode("utf-8", "replace"): float(row["scalars"][i])
            for i in range(bits.bit_length())
            if bits >> i & 1
        }
        fired, skipped = int(row["fired"]), int(row["skipped"])
        return StepRecord(
            step=int(row["step"]),
            time=float(row["time"]),
            layout=info.layout,
            total_norm=float(row["total_norm"]),
            total_norm_clipped=float(row["total_norm_clipped"]),
            clip_coef=float(row["clip_coef"]),
            fired=tuple(name for k, name in enumerate(info.rules) if fired >> k & 1),
            clipped=bool(row["clipped"]),
            skipped=info.reasons[skipped - 1] if 0 < skipped <= len(info.reasons) else None,
            tensor_norms_P=row["norms"],
            tensor_coefs_P=row["coefs"],
            present_P=row["present"].astype(np.bool_),
            limits=dict(zip(info.rules, row["limits"].tolist(), strict=True)),
            measures=dict(zip(info.measures, row["measures"], strict=True)),
            micro_batches=int(row["micro_batches"]),
            weight=float(row["weight"]),
            loss_scale=float(row["loss_scale"]),
            learning_rate=float(row["learning_rate"]),
            noise_scale=float(row["noise_scale"]),
            duration_seconds=float(row["duration_seconds"]),
            overhead_seconds=float(row["overhead_seconds"]),
            scalars=scalars,
        )


class Ring:
    """One producer, one consumer, any number of readers of the file."""

    def __init__(self, info: RunInfo, path: Path | None, slots: int = SLOTS) -> None:
        """A ring in a new file, or in anonymous memory where there is no path.

        Raises:
            OSError: the file cannot be made; it is never one that exists.
        """
        self.slots = slots
        self.path = path
        self.dropped = 0
        """Records that were overwritten before they were taken."""

        description = info_to_json(info).encode()
        names_at = -(-(HEADER.size + len(description)) // 64) * 64
        dtype = _slot_dtype(info)
        size = names_at + NAMES * NAME_BYTES + slots * dtype.itemsize
        buffer = mmap.mmap(-1, size) if path is None else _new_mapping(path, size)
        buffer[HEADER.size : HEADER.size + len(description)] = description
        HEADER.pack_into(buffer, 0, b"\0" * 16, slots, len(description), 0, 0)
        self._memory = _Memory(info, slots, buffer, names_at)
        buffer[: len(MAGIC)] = MAGIC  # last: a file with it is whole
        self._columns = {name: self._memory.rows[name] for name in dtype.names or ()}
        self._begun = 0
        self._closed = 0
        self._taken = 0
        self._name_index: dict[str, int] = {}
        self._refused: set[str] = set()

    def append(self, row: Row, scalars: Mapping[str, float]) -> None:
        """Begins the record of one step and closes the one before. Called by the producer."""
        self.close()
        number = self._begun + 1
        slot = (number - 1) % self.slots
        columns = self._columns
        columns["after"][slot] = 0
        columns["before"][slot] = number
        stored = self._memory.rows[slot]
        for name in _PLAIN:
            stored[name] = getattr(row, name)
        columns["limits"][slot] = row.limits
        columns["norms"][slot] = row.tensor_norms_P
        columns["coefs"][slot] = 1.0 if row.tensor_coefs_P is None else row.tensor_coefs_P
        if self._memory.info.measures:
            columns["measures"][slot] = row.measures if len(row.measures) else 0.0
        columns["present"][slot] = 1 if row.present_P is None else row.present_P
        columns["clipped"][slot] = row.tensor_coefs_P is not None
        columns["logged"][slot] = 0
        for name, value in scalars.items():
            self._set_scalar(slot, name, value)
        columns["after"][slot] = number
        self._begun = number
        self._memory.counters[0] = number

    def log(self, name: str, value: float) -> bool:
        """Adds a scalar to the newest record, unless that is closed. Called by the producer."""
        if self._begun == self._closed:
            return False
        self._set_scalar((self._begun - 1) % self.slots, name, value)
        return True

    def open_step(self) -> int | None:
        """The step of the newest record where it is not closed."""
        begun = self._begun
        if begun == self._closed:
            return None
        return int(self._memory.rows[(begun - 1) % self.slots]["step"])

    @property
    def all_taken(self) -> bool:
        return self._taken == self._begun

    def close(self) -> None:
        """Closes the newest record, so that it can be taken. Called by the producer."""
        if self._closed < self._begun:
            self._closed = self._begun
            self._memory.counters[1] = self._begun

    def take(self) -> list[StepRecord]:
        """The closed records since the last call, in order. Called by the consumer."""
        closed, records = self._closed, []
        for number in range(self._taken + 1, closed + 1):
            record = self._memory.copied(number)
            if record is None:
                self.dropped += 1
            else:
                records.append(record)
        self._taken = closed
        return records

    def peek(self, count: int) -> list[StepRecord]:
        """The newest records, oldest first, the open one included."""
        newest = self._begun
        first = max(1, newest - min(count, self.slots) + 1)
        copies = (self._memory.copied(number) for number in range(first, newest + 1))
        return [record for record in copies if record is not None]

    def release(self) -> None:
        """Removes the file: all of it is in the recording."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _set_scalar(self, slot: int, name: str, value: float) -> None:
        index = self._name_index.get(name)
        if index is None:
            index = self._new_name(name)
            if index is None:
                return
        self._columns["scalars"][slot, index] = value
        self._columns["logged"][slot] |= np.uint64(1 << index)

    def _new_name(self, name: str) -> int | None:
        index = len(self._name_index)
        encoded = name.encode()
        if index < NAMES and 0 < len(encoded) <= NAME_BYTES and not encoded.endswith(b"\0"):
            self._memory.names[index] = encoded
            self._name_index[name] = index
            return index
        if name not in self._refused and len(self._refused) < NAMES:
            self._refused.add(name)
            say(
                logging.WARNING,
                "watch.log: %.80r is left out. A run has %d names of 1 to %d bytes at most",
                name, NAMES, NAME_BYTES,
            )  # fmt: skip
        return None


def read_ring(path: str | os.PathLike[str]) -> tuple[RunInfo, list[StepRecord]]:
    """What a ring's file holds, oldest first; its writer may be alive or dead.

    Raises:
        RecordingError: the file is not a ring, or not all of one.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
        raise RecordingError(f"{path}: not a ring of gradwatch")
    _, slots, length, begun, _ = HEADER.unpack_from(content)
    try:
        info = info_from_json(content[HEADER.size : HEADER.size + length])
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from error
    names_at = -(-(HEADER.size + length) // 64) * 64
    dtype = _slot_dtype(info)
    if slots < 1 or len(content) < names_at + NAMES * NAME_BYTES + slots * dtype.itemsize:
        raise RecordingError(f"{path}: cut short")
    memory = _Memory(info, slots, content, names_at)
    # A record whose number was not counted yet when its writer died may be whole all the same.
    numbers = range(max(1, begun - slots + 1), begun + 2)
    copies = (memory.copied(number) for number in numbers)
    return info, [record for record in copies if record is not None]


def records_begun(path: str | os.PathLike[str]) -> int:
    """How many records a ring's file was given so far; its header alone is read.

    Raises:
        RecordingError: the file is not a ring.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror})") from error
    if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise RecordingError(f"{path}: not a ring of gradwatch")
    return int(HEADER.unpack(header)[3])


def _new_mapping(path: Path, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Allocated, not sparse: a store to a page that the disk has no room for would kill.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.write(descriptor, bytes(size))
        return mmap.mmap(descriptor, size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
