"""A directory in, one /metrics for all of its recordings out.

    find -> Follower, a recording each -> tallies -> one exposition

One thread calls `look`, another one asks for answers; a lock is held for a chunk of rows at most.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gradwatch.errors import GradwatchError
from gradwatch.export.exporter import content_type
from gradwatch.export.renderer import Lines, agent_lines, exposition
from gradwatch.recording.finding import Candidate, Refusal, find
from gradwatch.recording.tail import Tail
from gradwatch.recording.writer import writer_lives
from gradwatch.report.card import printable
from gradwatch.serve.page import Line, page
from gradwatch.serve.run import Run, chosen
from gradwatch.tally import STATES

__all__ = ["Agent"]

CHUNK = 500
"""Rows that are read of one recording before the others have their turn."""

SETTLED_SECONDS = 5.0
"""A file that is no recording yet for so long never will be; until then it is being made."""

FRESH_SECONDS = 0.05
"""A scrape takes what was looked at just before as it is."""

SCAN_SHARE = 0.02
"""Of the time, at most, goes into listing the directory."""

WIDEST = 300


class Agent:
    """Follows every recording in a directory."""

    def __init__(
        self,
        directory: Path,
        *,
        keep_seconds: float = 3600.0,
        tell: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            keep_seconds: how long a run is shown after its end.
            tell: told once of each file that cannot be read and why.
        """
        self.directory = directory.resolve()
        self._keep = keep_seconds
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._runs: dict[Path, Run] = {}
        self._aged: dict[Path, Candidate] = {}
        """What was ended for too long already when it was looked at last."""

        self._first_seen: dict[Path, float] = {}
        self._refused: dict[Path, tuple[object, str]] = {}
        """What it was like then, and why it was refused."""

        self._errors = 0
        self._next_scan = float("-inf")

    def look(self) -> bool:
        """Reads what is new; whether there is more to be read at once."""
        with self._lock:
            self._scan()
        more = False
        for run in tuple(self._runs.values()):
            with self._lock:
                self._read(run)
                self._age(run)
                more |= not run.caught_up and not run.trouble
            time.sleep(0)  # a scrape may have its turn
        return more

    def render(self, accept: str) -> tuple[str, bytes]:
        """What a scrape is answered: its content type and the body."""
        form = content_type(accept)
        with self._lock:
            for run in self._runs.values():
                if run.caught_up and time.monotonic() - run.looked > FRESH_SECONDS:
                    self._read(run)
            shown = chosen(self._runs.values(), self._clock())
            lines = [self._lines(run, form) for run in shown]
            lines.append(agent_lines(self._own(shown)))
        return form, exposition(lines, form)

    def health(self) -> Mapping[str, object]:
        """What /healthz tells."""
        with self._lock:
            shown = chosen(self._runs.values(), self._clock())
            return {
                "directory": printable(str(self.directory), WIDEST),
                "recordings": len(self._runs),
                "running": sum(run.state == "running" for run in shown),
                "unreadable": len(self._unreadable()),
            }

    def page(self) -> str:
        """The list of runs, as HTML."""
        with self._lock:
            shown = set(map(id, chosen(self._runs.values(), self._clock())))
            lines = [
                Line(
                    run.tally.snapshot(),
                    "" if id(run) in shown or not run.caught_up else "hidden",
                    str(run.path.relative_to(self.directory)),
                    run.trouble or run.unjudged or ("" if run.caught_up else "is being read"),
                )
                for run in self._runs.values()
            ]
            refused = [(str(path), reason) for path, (_, reason) in self._refused.items()]
        return page(lines, refused)

    def failed(self, error: Exception) -> None:
        """Counts an error of the endpoint."""
        self._errors += 1

    def _lines(self, run: Run, form: str) -> Lines:
        """A run that cannot be shown takes none of the others with it."""
        try:
            lines = run.renderer.lines(run.tally.snapshot(), form)
        except Exception as error:
            self._errors += 1
            self._trouble(run, f"{type(error).__name__}: {error}")
            return {}
        run.was_shown |= run.ended
        return lines

    def _own(self, shown: Iterable[Run]) -> dict[str, dict[tuple[str, ...], float]]:
        states = Counter(run.state for run in shown)
        reading = sum(not run.caught_up and not run.trouble for run in self._runs.values())
        hidden = sum(run.caught_up for run in self._runs.values()) - states.total()
        counts = {state: states[state] for state in STATES} | {"reading": reading, "hidden": hidden}
        return {
            "agent_recordings": {(state,): count for state, count in counts.items()},
            "agent_unreadable_files": {(): len(self._unreadable())},
            "agent_errors_total": {(): self._errors},
        }

    def _unreadable(self) -> set[Path]:
        return {*self._refused, *(run.path for run in self._runs.values() if run.trouble)}

    def _scan(self) -> None:
        started = time.monotonic()
        if started < self._next_scan:
            return
        found = list(find(self.directory))
        candidates = {one.path: one for one in found if isinstance(one, Candidate)}
        for path, run in tuple(self._runs.items()):
            now = candidates.get(path)
            if now is None or now.identity != run.identity:
                del self._runs[path]
        paths = {one.path for one in found}
        for known in (self._refused, self._aged, self._first_seen):
            for path in known.keys() - paths:
                del known[path]
        for path in paths:
            self._first_seen.setdefault(path, self._clock())
        for one in found:
            if isinstance(one, Refusal):
                self._refuse(one.path, one.reason, one.reason)
            else:
                self._consider(one)
        self._next_scan = started + (time.monotonic() - started) / SCAN_SHARE

    def _consider(self, one: Candidate) -> None:
        """Begins to follow a file, where that is new and worth it."""
        if (run := self._runs.get(one.path)) is not None:
            run.written = one.written
            return
        refused = self._refused.get(one.path)
        if self._aged.get(one.path) == one or (refused is not None and refused[0] == one):
            return
        try:
            tail = self._worth_following(one)
            if tail is not None:
                self._runs[one.path] = Run(one, tail)
                self._refused.pop(one.path, None)
        except GradwatchError as error:
            if self._clock() - self._first_seen[one.path] >= SETTLED_SECONDS:
                self._refuse(one.path, one, str(error))
        except Exception as error:
            self._errors += 1
            self._refuse(one.path, one, f"{type(error).__name__}: {error}")

    def _worth_following(self, one: Candidate) -> Tail | None:
        """None where its run has ended for too long already.

        Raises:
            RecordingError: it is none that can be read.
        """
        is_old = self._clock() - one.written > self._keep
        if not is_old or one.has_ring:
            tail = Tail(one.path)
            # A run without a step for so long is shown while it lives: it may hang.
            if not is_old or writer_lives(tail.info):
                return tail
        self._aged[one.path] = one
        return None

    def _refuse(self, path: Path, like: object, reason: str) -> None:
        before = self._refused.get(path)
        self._refused[path] = (like, reason)
        if before is None or before[1] != reason:
            self._say(path, reason)

    def _say(self, path: Path, reason: str) -> None:
        # A message of the reader begins with the path.
        reason = reason.removeprefix(f"{path}: ")
        self._tell(f"{printable(str(path), WIDEST)}: not shown: {printable(reason, WIDEST)}")

    def _read(self, run: Run) -> None:
        try:
            run.look(CHUNK, self._clock())
        except GradwatchError as error:
            self._trouble(run, str(error))
        except Exception as error:
            self._errors += 1
            self._trouble(run, f"{type(error).__name__}: {error}")
        run.looked = time.monotonic()

    def _trouble(self, run: Run, reason: str) -> None:
        if reason not in run.troubles:
            run.troubles.add(reason)
            self._say(run.path, reason)
        run.trouble = reason

    def _age(self, run: Run) -> None:
        """Forgets a run whose end is long ago."""
        since = run.silent_since
        if since is not None and self._clock() - since > self._keep:
            self._runs.pop(run.path, None)
            self._aged[run.path] = run.candidate
