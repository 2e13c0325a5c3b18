"""A policy file that is looked at again while a run goes on."""

from __future__ import annotations

import os
from pathlib import Path

from gradwatch.policy.loading import load_policy, read_policy
from gradwatch.policy.models import Policy

__all__ = ["PolicyFile"]

Stamp = tuple[int, int, int]


class PolicyFile:
    """Tells when the file was written, once it rests: an editor may be in the middle of it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            PolicyError: it is not a policy.
        """
        self._path = Path(os.fsdecode(path)).absolute()
        self._seen = self._loaded = self._stamp()
        self.policy = load_policy(path)
        """What it held at first."""

    def poll(self) -> Policy | None:
        """The policy that it holds now, where it was written since it was loaded and has not
        changed since the last call. A file that is gone is no news.

        Raises:
            PolicyError: it is not a policy; said once for each time that it is written.
        """
        stamp = self._stamp()
        if stamp is None or stamp == self._loaded:
            return None
        if stamp != self._seen:
            self._seen = stamp
            return None
        self._loaded = stamp
        return read_policy(str(self._path), self.policy.source)

    def _stamp(self) -> Stamp | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
