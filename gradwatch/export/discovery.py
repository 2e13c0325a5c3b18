"""A file that tells Prometheus where this run is scraped (file_sd), for as long as it runs.

One file for each run and rank, put in place at once and touched now and then while the process
lives. A run that is killed leaves its file, so that Prometheus goes on asking for it and notices
that it is down; once nobody has touched a file for a day, the next run takes it away. Where a run
lived says nothing about that, so it holds for a folder that many machines share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gradwatch.export.series import clean
from gradwatch.records import RunInfo

__all__ = ["ABANDONED_SECONDS", "Discovery", "scheduler_labels"]

logger = logging.getLogger("gradwatch")

MOST_NAME_LENGTH = 100
TOUCH_SECONDS = 600.0
ABANDONED_SECONDS = 86_400.0
"""Longer than any alert remembers a run that is gone, and than a file server is ever away."""

FILE_NAME = re.compile(r"gradwatch-.*-rank\d+\.json")
SCHEDULER_LABELS = {"SLURM_JOB_ID": "slurm_job_id", "SLURM_JOB_USER": "slurm_user"}
"""Environment variable -> label: which job to look up, and whom to ask."""


def scheduler_labels(environment: Mapping[str, str]) -> dict[str, str]:
    """What the scheduler says of the job that this process is of; nothing outside of one."""
    return {
        label: clean(environment[name])
        for name, label in SCHEDULER_LABELS.items()
        if environment.get(name)
    }


class Discovery:
    """Writes the file when created, keeps it fresh, and removes it in `close`."""

    def __init__(
        self,
        directory: Path,
        info: RunInfo,
        authority: str,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            authority: `host:port` as Prometheus reaches it.
            labels: further ones of the target.

        Raises:
            OSError: the directory cannot be written to.
        """
        all_labels = {**(labels or {}), "run": clean(info.run), "rank": str(info.rank)}
        groups = [{"targets": [authority], "labels": all_labels}]
        self._body = (json.dumps(groups, indent=2) + "\n").encode()
        self._pid = os.getpid()
        self.path = directory / _file_name(clean(info.run), info.rank)
        directory.mkdir(parents=True, exist_ok=True)
        self._put()
        if info.rank == 0:
            self._remove_abandoned()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._touch_on, name="gradwatch-discovery", daemon=True).start()

    def touch(self) -> None:
        """Says that the run lives, and brings a file back that somebody removed.

        Leaves the file of a later run of that name alone.

        Raises:
            OSError: the directory cannot be written to.
        """
        with self._lock:
            if self._closed.is_set():
                return
            try:
                if self.path.read_bytes() == self._body:
                    os.utime(self.path)
            except FileNotFoundError:
                self._put()

    def close(self) -> None:
        """Removes the file, unless a later run of that name has replaced it meanwhile.

        Does nothing in a forked child.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed.set()
            with suppress(FileNotFoundError):
                if self.path.read_bytes() == self._body:
                    self.path.unlink()

    def _touch_on(self) -> None:
        while not self._closed.wait(TOUCH_SECONDS):
            with suppress(OSError):  # a file server that is away comes back
                self.touch()

    def _put(self) -> None:
        """Prometheus reads *.json as soon as it appears, so it appears whole."""
        number, name = tempfile.mkstemp(prefix=".gradwatch-", dir=self.path.parent)
        whole = Path(name)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(self._body)
            whole.chmod(0o644)  # Prometheus is another user
            whole.replace(self.path)
        except OSError:
            whole.unlink(missing_ok=True)
            raise

    def _remove_abandoned(self) -> None:
        """Ages are measured by the clock of the file server: what was just written is new."""
        now = self.path.stat().st_mtime
        for path in self.path.parent.glob("gradwatch-*.json"):
            with suppress(OSError):  # of another user, or removed by another run meanwhile
                if now - path.stat().st_mtime > ABANDONED_SECONDS and _is_ours(path):
                    path.unlink()
                    logger.info("removed %s: its run has been gone for a day", path)


def _is_ours(path: Path) -> bool:
    """Whether a run has written this file, and no person."""
    if not FILE_NAME.fullmatch(path.name):
        return False
    try:
        (entry,) = json.loads(path.read_text(encoding="utf-8"))
        labels = entry["labels"]
        return _file_name(labels["run"], int(labels["rank"])) == path.name
    except (ValueError, KeyError, TypeError):
        return False


def _file_name(run: str, rank: int) -> str:
    """With the run's name where it is a plain one, else with what is left of it and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", run)[:MOST_NAME_LENGTH]
    if plain != run or not run:
        plain += f"-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
    return f"gradwatch-{plain}-rank{rank}.json"
