"""Words between processes that nobody has to wait for, past the process group.

    post(topic, step, data)  ->  the store that the processes have met in  ->  posted, answers

A collective hangs where one process does not come. This does not: what is not there is not there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from gradwatch.torch.shares import Share, name_of, store_of_processes

__all__ = ["Mailbox"]

_made = itertools.count()


class Mailbox:
    """One watch's; every process makes as many, in the same order."""

    def __init__(self, share: Share) -> None:
        self.rank, self.size = share.rank, share.size
        self._store: Any = store_of_processes()
        self._prefix = f"gradwatch/mail/{name_of(share.group)}/{next(_made)}"

    @property
    def is_open(self) -> bool:
        """Whether there is a store at all."""
        return self._store is not None

    def post(self, topic: str, step: int, data: bytes) -> None:
        """
        Raises:
            Exception: whatever the store raises; the process that holds it may be gone.
        """
        self._store.set(self._key(topic, step, self.rank), data)

    def posted(self, topic: str, step: int) -> Sequence[bytes] | None:
        """What all have posted, at once; None where one has not yet."""
        keys = [self._key(topic, step, rank) for rank in range(self.size)]
        return [self._store.get(key) for key in keys] if self._store.check(keys) else None

    def answers(self, topic: str, step: int, seconds: float) -> list[bytes | None]:
        """What each has posted, after so long a wait at most; None of who has not."""
        keys = [self._key(topic, step, rank) for rank in range(self.size)]
        with suppress(Exception):  # by which it says that time is up
            self._store.wait(keys, timedelta(seconds=seconds))
        return [self._store.get(key) if self._store.check([key]) else None for key in keys]

    def forget(self, topic: str, step: int) -> None:
        """Takes one's own word back."""
        with suppress(Exception):  # not every store can
            self._store.delete_key(self._key(topic, step, self.rank))

    def _key(self, topic: str, step: int, rank: int) -> str:
        return f"{self._prefix}/{topic}/{step}/{rank}"
