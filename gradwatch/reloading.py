"""A policy file that is written while a run goes on: its new numbers in, between two steps.

PolicyFile -> poll (gradwatch's thread) -> apply (before a step) -> Change -> the consumer
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gradwatch.errors import PolicyError
from gradwatch.policy import Policy, PolicyFile, number_changes
from gradwatch.records import POLICY, Anomaly, Level

__all__ = ["Change", "Reloading"]

LOOK_SECONDS = 1.0
"""Between two looks at the file. It is taken over at the second look that finds it the same."""


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a policy file that was written."""

    message: str
    policy: Policy | None = None
    """What is in force now; None where the file was refused."""

    step: int = -1
    """The first step that it holds for."""

    def event(self, step: int) -> Anomaly:
        level: Level = "warning" if self.policy is None else "event"
        return Anomaly(kind=POLICY, level=level, step=step, message=self.message)


class Reloading:
    """What a running policy may become."""

    def __init__(
        self,
        file: PolicyFile,
        tell: Callable[[Change], None],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tell: takes what became of the file, on either thread.
            report: takes the name of a part of gradwatch that failed.
        """
        self._file = file
        self._in_force = file.policy
        self._tell = tell
        self._report = report
        self._clock = clock
        self._looked = clock()
        self._offered: tuple[Policy, tuple[str, ...]] | None = None

    def poll(self) -> None:
        """Looks at the file, once a second; for gradwatch's own thread."""
        if self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        try:
            policy = self._file.poll()
            if policy is not None:
                changes = number_changes(self._in_force, policy)
                self._offered = (policy, changes) if changes else None
        except PolicyError as error:
            self._offered = None
            self._tell(Change(f"the policy file was refused, the policy stays as it is:\n{error}"))

    def apply(self, step: int, change: Callable[[Policy], None]) -> None:
        """Changes the policy from a step on, where the file says so; for the training thread."""
        offered, self._offered = self._offered, None
        if offered is None:
            return
        policy, numbers = offered
        try:
            change(policy)
        except Exception:
            self._report("apply")
            return
        self._in_force = policy
        said = f"the policy has changed from this step on: {', '.join(numbers)}"
        self._tell(Change(said, policy, step))
