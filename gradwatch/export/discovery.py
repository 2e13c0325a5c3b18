"""A file that tells Prometheus where this run is scraped (file_sd), for as long as it runs.

One file for each run and rank, put in place at once. A run that is killed leaves its file, so
that Prometheus goes on asking for it and notices that it is down.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from gradwatch.export.series import clean
from gradwatch.records import RunInfo

__all__ = ["Discovery"]

MOST_NAME_LENGTH = 100


class Discovery:
    """Writes the file when created; `close` removes it."""

    def __init__(self, directory: Path, info: RunInfo, authority: str) -> None:
        """
        Args:
            authority: `host:port` as Prometheus reaches it.

        Raises:
            OSError: the directory cannot be written to.
        """
        labels = {"run": clean(info.run), "rank": str(info.rank)}
        self._text = json.dumps([{"targets": [authority], "labels": labels}], indent=2) + "\n"
        self._pid = os.getpid()
        self.path = directory / f"{_file_name(info.run)}-rank{info.rank}.json"
        directory.mkdir(parents=True, exist_ok=True)
        # Prometheus reads *.json as soon as it appears; other users must be able to.
        whole = self.path.with_name(f".{self.path.name}.{self._pid}")
        whole.write_text(self._text, encoding="utf-8")
        whole.replace(self.path)

    def close(self) -> None:
        """Removes the file, unless a later run of that name has replaced it meanwhile.

        Does nothing in a forked child.
        """
        if os.getpid() != self._pid or not self.path.exists():
            return
        if self.path.read_text(encoding="utf-8") == self._text:
            self.path.unlink(missing_ok=True)


def _file_name(run: str) -> str:
    """The run's name where it is a plain one, else what is left of it and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", run).lstrip(".")[:MOST_NAME_LENGTH]
    if plain == run and run:
        return plain
    return f"{plain}-{hashlib.sha256(clean(run).encode()).hexdigest()[:8]}"
