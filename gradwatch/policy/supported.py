"""What the format knows and this version does not do yet, refused by name.

Each entry of `REFUSED` is one such thing: decoded and checked like everything else, then refused.
A line that is deleted here is a feature that begins to work, in files and in the schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradwatch.policy.locating import Path, at, shown

__all__ = ["REFUSED", "Refusal", "refused"]


@dataclass(frozen=True)
class Refusal:
    """One thing that is refused."""

    at: str
    """The entry, `[]` for each item of a list: `clip[].limit`."""

    instead: str
    """What to do, a sentence without its full stop."""

    what: str = "{value} is"
    """Subject and verb of the message."""

    def message(self, value: object) -> str:
        what = self.what.format(value=shown(value))
        return f": {what} not supported by this version yet. {self.instead}"


REFUSED: tuple[Refusal, ...] = ()


def refused(data: Any) -> Iterator[tuple[Path, Refusal]]:
    """Each refused entry of a policy's plain data, with the path to it."""
    for refusal in REFUSED:
        for path in _paths(data, refusal.at):
            value = at(data, path)
            if value is not None:
                yield path, refusal


def _paths(data: Any, pattern: str) -> Iterator[Path]:
    """The entries that are there under a dotted path."""
    head, many, key = pattern.rpartition("[].")
    if not many:
        path = tuple(pattern.split("."))
        holder = at(data, path[:-1])
        if isinstance(holder, dict) and path[-1] in holder:
            yield path
        return
    items = at(data, (head,))
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict) and key in item:
            yield (head, index, key)
