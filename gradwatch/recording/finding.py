"""A directory in, the recordings in it out: `*.sqlite` there and one level below.

Nothing outside of the directory is opened, whatever links say.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BEGIN_SECONDS", "FOLDER", "MADE", "NAMED", "STAMP", "Candidate", "Refusal", "find",
    "in_file_name",
]  # fmt: skip

FOLDER = "gradwatch-runs"
"""Where recordings go where no other directory is named."""

MADE = f"A run makes {FOLDER}/ in the directory that it is started in"
"""For whoever looks for it elsewhere."""

NAMED = re.compile(r"(.*)-(\d{8}-\d{6})-rank(\d+)(?:-\d+)?\.sqlite")
"""A run, when it began, a rank."""

STAMP = "%Y%m%d-%H%M%S"
BEGIN_SECONDS = 600.0
"""Between the first rank of a run and the last one to begin."""


def in_file_name(run: str) -> str:
    """The name of a run as its files have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", run).strip("._")[:80] or "run"


SIDE_FILES = ("-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that has the name of a recording."""

    path: Path
    """Without links."""

    identity: tuple[int, int]
    """Device and inode: another file may come under the same name."""

    written: float
    """When anything of it was written last, in Unix time."""

    size: int
    has_ring: bool
    """A ring is removed when its run ends in order."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that has the name of a recording and must not be opened."""

    path: Path
    reason: str


def find(directory: Path) -> Iterator[Candidate | Refusal]:
    """In the order of their names; nothing where the directory is gone."""
    root = directory.resolve()
    for folder in (root, *_folders(root)):
        for entry in _entries(folder):
            if entry.name.endswith(".sqlite"):
                found = _looked_at(Path(entry.path), root)
                if found is not None:
                    yield found


def _folders(root: Path) -> Iterator[Path]:
    for entry in _entries(root):
        try:
            if entry.is_dir() and Path(entry.path).resolve().is_relative_to(root):
                yield Path(entry.path)
        except OSError:
            continue


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _looked_at(path: Path, root: Path) -> Candidate | Refusal | None:
    """None where it has vanished meanwhile."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            return Refusal(path, "a link that leads out of the directory")
        found = real.stat()
        if not stat.S_ISREG(found.st_mode):
            return Refusal(path, "not a regular file")
        sides = [_side(real.with_name(real.name + ending)) for ending in SIDE_FILES]
        ring = _side(real.with_suffix(".ring"))
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        return Refusal(path, f"cannot be looked at ({getattr(error, 'strerror', error)})")
    except _NotRegular as error:
        return Refusal(path, f"{error.args[0]} is not a regular file")
    times = [found.st_mtime, *(side.st_mtime for side in sides if side is not None)]
    return Candidate(
        real, (found.st_dev, found.st_ino), max(times), found.st_size, ring is not None
    )


class _NotRegular(Exception):
    """A file beside a recording that opening the recording would follow somewhere else."""


def _side(path: Path) -> os.stat_result | None:
    """
    Raises:
        _NotRegular: it is a link, a pipe or the like.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise _NotRegular(path.name)
    return found
