"""A condition in, a detector out: what all but the oldest detectors have in common.

    Reading -> Condition.judge -> Judgement -> Episodes -> Anomaly

A condition says what is abnormal in one record, for each of its subjects: layers, parameters, or
the run as one. That it persists, begins, ends and is said once is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gradwatch.records import Anomaly, Bools, Float64s, Indices, Level
from gradwatch.rules.detect_reading import LISTED, Reading, named
from gradwatch.rules.detect_regime import after
from gradwatch.rules.episodes import Episodes

__all__ = ["ALL", "Condition", "Judgement", "Persistent"]

ALL: Bools = np.ones(1, dtype=np.bool_)
"""The run as the only subject, judged."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a condition says of one record. All [S], one for each subject."""

    hit_S: Bools
    calm_S: Bools
    """Well within the normal; what is neither changes nothing."""

    judged_S: Bools
    value_S: Float64s
    expected_S: Float64s
    """What is compared: the value of each subject, and what it would be or may be at most."""

    begins_anew: bool = False
    """Whether earlier hits say nothing any more, where they have not led to an episode."""


class Condition(Protocol):
    """What is abnormal: a function of the reading and its arrays, which it updates in place."""

    def judge(self, reading: Reading) -> Judgement | None:
        """None where the record says nothing, such as one without a loss."""

    def learn(self, reading: Reading, open_S: Bools) -> None:
        """Takes the record in once it was judged; nothing of a subject with an open episode."""

    def begin_anew(self, *, rescales: bool) -> None:
        """A change by intention was announced, which may rescale the norm or not."""

    def said(self, subject: int, value: float, expected: float) -> str:
        """What is wrong with a subject, as a clause."""

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The state, live; {} without any."""

    def restored(self) -> None:
        """To be called when `arrays` were written to."""


class Persistent:
    """A detector of one kind that persists."""

    def __init__(
        self,
        kind: str,
        level: Level,
        condition: Condition,
        episodes: Episodes,
        *,
        subjects: Sequence[str] = (),
        watched_S: Bools | None = None,
        layer_of_S: Indices | None = None,
        num_layers: int = 0,
    ) -> None:
        """
        Args:
            subjects: names; none for the run as one.
            watched_S: which of them are looked at; None for all.
            layer_of_S: the layer of each subject; None where subjects are no layers either.
        """
        self._kind, self._level = kind, level
        self._condition, self._episodes = condition, episodes
        self._subjects = tuple(subjects)
        self._watched_S = watched_S
        self._layer_of_S, self._num_layers = layer_of_S, num_layers
        self._score_S: Float64s = np.zeros(len(episodes.open_L))
        """How far from what is expected each subject is, while any episode is open."""

    def observe(self, reading: Reading) -> list[Anomaly]:
        found = self._condition.judge(reading)
        if found is None:
            return []
        if found.begins_anew:
            self._episodes.close(~self._episodes.open_L)
        if self._episodes.passed_by(found.hit_S):
            self._condition.learn(reading, self._episodes.open_L)
            return []
        judged_S = found.judged_S if self._watched_S is None else found.judged_S & self._watched_S
        hit_S = found.hit_S & judged_S
        begins = self._episodes.update(reading.record.step, hit_S, found.calm_S, judged_S)
        if self._episodes.any_open:
            self._note_scores(found, judged_S)
        anomalies = [self._anomaly(begins, found, reading)] if begins.size else []
        self._condition.learn(reading, self._episodes.open_L)
        return anomalies

    def begin_anew(self, *, rescales: bool) -> None:
        self._condition.begin_anew(rescales=rescales)

    def active(self) -> dict[str, tuple[str, ...]]:
        if self._level != "alert" or not self._episodes.any_open:
            return {}
        return {self._kind: self._names(self._worst_first(np.flatnonzero(self._episodes.open_L)))}

    def open_alerts(self) -> dict[str, Bools]:
        if self._level != "alert" or not self._episodes.any_open or self._layer_of_S is None:
            return {}
        open_L = np.zeros(self._num_layers, dtype=np.bool_)
        open_L[self._layer_of_S[self._episodes.open_L]] = True
        return {self._kind: open_L}

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        condition = {f"condition.{key}": a for key, a in self._condition.arrays().items()}
        episodes = {f"episodes.{key}": a for key, a in self._episodes.arrays().items()}
        return {**condition, **episodes, "score": self._score_S}

    def restored(self) -> None:
        self._condition.restored()
        self._episodes.restored()

    def _note_scores(self, found: Judgement, judged_S: Bools) -> None:
        with np.errstate(all="ignore"):
            ratio_S = np.abs(np.log(found.value_S) - np.log(found.expected_S))
        score_S = np.where(np.isnan(ratio_S), np.inf, ratio_S)
        np.copyto(self._score_S, score_S, where=judged_S)

    def _worst_first(self, affected: Indices) -> Indices:
        return affected[np.argsort(-self._score_S[affected], kind="stable")]

    def _names(self, affected: Indices) -> tuple[str, ...]:
        return tuple(self._subjects[i] for i in affected) if self._subjects else ()

    def _anomaly(self, begins: Indices, found: Judgement, reading: Reading) -> Anomaly:
        affected = self._worst_first(begins)
        worst = int(affected[0])
        names = self._names(affected)
        since = int(self._episodes.since_L[worst])
        value, expected = float(found.value_S[worst]), float(found.expected_S[worst])
        who = f"{named(names)}: " if names else ""
        said = self._condition.said(worst, value, expected)
        return Anomaly(
            kind=self._kind,
            level=self._level,
            step=reading.record.step,
            layer=names[0] if names else None,
            layers=names[:LISTED],
            value=value,
            expected=expected,
            message=f"{self._kind}: {who}{said} since step {since}{after(reading.changes, since)}",
        )
