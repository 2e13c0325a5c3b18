"""A directory in, its recordings out, by their path in it: how each run stands, and one to look at.

Nothing is opened but what `find` has found: a name from outside is looked up, never joined.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradwatch.errors import GradwatchError
from gradwatch.page.watched import Watched
from gradwatch.recording.finding import BEGIN_SECONDS, NAMED, Candidate, Refusal, find
from gradwatch.recording.reader import Recording
from gradwatch.records import RunInfo
from gradwatch.report.standing import Standing, Stands

__all__ = ["Catalogue", "Entry"]

MOST_WATCHED = 6
"""Recordings whose pictures are kept in memory."""

MOST_LISTED = 200
SCAN_SECONDS = 1.0
AGAIN_SECONDS = 5.0
"""A live run that writes nothing may have died meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recording in the list, or why it is none."""

    name: str
    """Its path in the directory."""

    stands: Stands | None
    reason: str = ""


class Catalogue:
    """Any thread may call; they take turns where they look at the same recording."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory.resolve()
        self._clock = clock
        self._lock = threading.Lock()
        self._listing = threading.Lock()
        self._scanned = float("-inf")
        self._found: dict[str, Candidate | Refusal] = {}
        self._standing: dict[str, tuple[Candidate, Standing, float, Entry]] = {}
        self._infos: dict[str, tuple[tuple[int, int], RunInfo]] = {}
        self._watched: OrderedDict[str, tuple[Candidate, Watched]] = OrderedDict()

    def entries(self) -> tuple[list[Entry], int]:
        """Runs that go on first, then the newest, and how many older ones are left out."""
        with self._listing:
            found = self._scan()
            readable = [one for one in found.items() if isinstance(one[1], Candidate)]
            readable.sort(key=lambda one: -one[1].written if isinstance(one[1], Candidate) else 0)
            for name in self._standing.keys() - found.keys():
                del self._standing[name]
            entries = [
                self._entry(name, candidate)
                for name, candidate in readable[:MOST_LISTED]
                if isinstance(candidate, Candidate)
            ]
        entries.sort(key=_order)
        refused = [
            Entry(name=name, stands=None, reason=one.reason)
            for name, one in found.items()
            if isinstance(one, Refusal)
        ]
        return entries + refused, max(0, len(readable) - MOST_LISTED)

    def watched(self, name: str) -> Watched | None:
        """The recording of that name, None where there is none.

        Raises:
            RecordingError: it cannot be read.
        """
        candidate = self._scan().get(name)
        if not isinstance(candidate, Candidate):
            return None
        with self._lock:
            known = self._watched.get(name)
            if known is not None and known[0].identity == candidate.identity:
                self._watched.move_to_end(name)
                return known[1]
        opened = Watched(candidate.path)
        with self._lock:
            # Two may have opened it at the same time.
            known = self._watched.get(name)
            if known is not None and known[0].identity == candidate.identity:
                return known[1]
            self._watched[name] = (candidate, opened)
            while len(self._watched) > MOST_WATCHED:
                self._watched.popitem(last=False)
        return opened

    def ranks(self, name: str) -> dict[int, str]:
        """The recordings of the same run, by rank: those that are named like it and began with it.

        Raises:
            RecordingError: it cannot be read.
        """
        found = self._scan()
        mine = found.get(name)
        if not isinstance(mine, Candidate):
            return {}
        info, stem = self._info(name, mine), _stem(name)
        ranks: dict[int, str] = {}
        for other, candidate in found.items():
            if not isinstance(candidate, Candidate) or _stem(other) != stem or other == name:
                continue
            try:
                one = self._info(other, candidate)
            except GradwatchError:
                continue
            began_with_it = abs(one.started - info.started) < BEGIN_SECONDS
            if one.run == info.run and one.rank != info.rank and began_with_it:
                ranks.setdefault(one.rank, other)
        ranks[info.rank] = name
        return dict(sorted(ranks.items()))

    def _info(self, name: str, candidate: Candidate) -> RunInfo:
        known = self._infos.get(name)
        if known is None or known[0] != candidate.identity:
            with Recording(candidate.path) as recording:
                known = self._infos[name] = (candidate.identity, recording.info)
        return known[1]

    def _scan(self) -> dict[str, Candidate | Refusal]:
        with self._lock:
            if self._clock() - self._scanned > SCAN_SECONDS:
                self._found = {
                    str(one.path.relative_to(self.directory)): one for one in find(self.directory)
                }
                self._scanned = self._clock()
                self._infos = {k: v for k, v in self._infos.items() if k in self._found}
            return self._found

    def _entry(self, name: str, candidate: Candidate) -> Entry:
        known = self._standing.get(name)
        now = self._clock()
        if known is not None and known[0] == candidate:
            _, _, looked, entry = known
            is_live = entry.stands is not None and entry.stands.state == "running"
            if not is_live or now - looked < AGAIN_SECONDS:
                return entry
        same = known is not None and known[0].identity == candidate.identity
        standing = known[1] if known is not None and same else Standing(candidate.path)
        try:
            entry = Entry(name=name, stands=standing.look())
        except GradwatchError as error:
            reason = str(error).removeprefix(f"{candidate.path}: ")
            entry = Entry(name=name, stands=None, reason=reason)
        except Exception as error:  # one that is damaged takes none of the others with it
            entry = Entry(name=name, stands=None, reason=f"{type(error).__name__}: {error}")
        self._standing[name] = (candidate, standing, now, entry)
        return entry


def _stem(name: str) -> str:
    """What the recordings of all ranks of a run have in common in their names."""
    found = NAMED.fullmatch(name)
    return found[1] if found else name


def _order(entry: Entry) -> tuple[bool, float, int]:
    if entry.stands is None:
        return True, 0.0, 0
    info = entry.stands.info
    return entry.stands.state != "running", -info.started, info.rank
