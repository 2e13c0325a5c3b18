"""`exploding` and `spike`: layers whose norm is far above their own baseline.

    exploding   3 of 5 steps are abnormal: ALERT
    spike       1 of 1: EVENT, since a single step is mostly data and harms nothing

Values of a layer with an open alert, whatever its kind, never enter the baseline: an explosion x10
would declare itself healthy after some 70 steps, and a layer that had vanished would explode on its
return. After `REBASED_AFTER` steps the new level is accepted, with an event.

References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013. arXiv:1211.5063
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import Outlier
from gradwatch.records import Anomaly, Bools, Indices, Level
from gradwatch.rules.baseline import Baseline, band_of
from gradwatch.rules.detect_reading import LISTED, Reading, named
from gradwatch.rules.detect_regime import after
from gradwatch.rules.episodes import Episodes

__all__ = ["LEVELS", "REBASED_AFTER", "Outliers"]

LEVELS: dict[str, Level] = {"exploding": "alert", "spike": "event"}
"""In this order: a layer that explodes is not also a row of spikes."""

REBASED_AFTER = 2000
"""Steps of an open alert after which its level is accepted as the new baseline."""


@dataclass(frozen=True, slots=True)
class _Track:
    kind: str
    level: Level
    episodes: Episodes
    watched_L: Bools | None
    """The layers that are looked at; None for all."""


class Outliers:
    """The outlier detectors that share one baseline."""

    def __init__(
        self,
        layers: tuple[str, ...],
        configs: Mapping[str, Outlier],
        watched: Mapping[str, Bools | None] | None = None,
    ) -> None:
        """
        Args:
            configs: by kind, all of one band.
            watched: by kind the layers that are looked at.
        """
        watched = watched or {}
        (band,) = {band_of(config) for config in configs.values()}
        self._layers = layers
        self._baseline = Baseline(len(layers), band)
        self._tracks = [
            _Track(kind, level, _episodes(len(layers), configs[kind]), watched.get(kind))
            for kind, level in LEVELS.items()
            if kind in configs
        ]
        self._excess_L = np.full(len(layers), -np.inf)
        """ln(norm / median) of each layer, where something is open or begins."""

    def observe(self, reading: Reading) -> list[Anomaly]:
        baseline = self._baseline
        y_L, judged_L = reading.log_norms_L, reading.judged_L
        bound_L = baseline.wary_bound_L if reading.odd else baseline.bound_L
        hit_L = (y_L > bound_L) & judged_L
        calm_L = y_L < baseline.calm_L
        anomalies = []
        for track in self._tracks:
            episodes, seen_L = track.episodes, judged_L
            if track.watched_L is not None:
                seen_L = judged_L & track.watched_L
            begins = episodes.update(reading.record.step, hit_L & seen_L, calm_L, seen_L)
            if episodes.any_open:
                np.subtract(y_L, baseline.center_L, out=self._excess_L, where=reading.judged_L)
            if begins.size:
                anomalies.append(self._anomaly(track, track.level, begins, reading))
            if track.level == "alert" and episodes.any_open:
                anomalies += self._rebased(track, reading)
                judged_L = judged_L & ~episodes.open_L
                hit_L = hit_L & judged_L
        self._learn(reading)
        return anomalies

    def begin_anew(self, *, rescales: bool) -> None:
        self._baseline.begin_anew(wary=rescales)

    def active(self) -> dict[str, tuple[str, ...]]:
        return {
            track.kind: self._names(self._worst_first(np.flatnonzero(track.episodes.open_L)))
            for track in self._alerts()
            if track.episodes.any_open
        }

    def open_alerts(self) -> dict[str, Bools]:
        return {
            track.kind: track.episodes.open_L.copy()
            for track in self._alerts()
            if track.episodes.any_open
        }

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        arrays = {f"baseline.{name}": array for name, array in self._baseline.arrays().items()}
        for track in self._tracks:
            episodes = track.episodes.arrays()
            arrays |= {f"{track.kind}.{name}": array for name, array in episodes.items()}
        return arrays | {"excess": self._excess_L}

    def restored(self) -> None:
        self._baseline.restored()
        for track in self._tracks:
            track.episodes.restored()

    def _alerts(self) -> list[_Track]:
        return [track for track in self._tracks if track.level == "alert"]

    def _learn(self, reading: Reading) -> None:
        """Takes in what is neither of an open alert nor of a record that does not teach."""
        if reading.learns:
            accepted_L = reading.usable_L
            if reading.stale:
                accepted_L = accepted_L & self._baseline.short_L()
            barred = {**reading.open_alerts, **self.open_alerts()}
            for open_L in barred.values():
                accepted_L = accepted_L & ~open_L
            everyone = reading.all_usable and not reading.stale and not barred
            self._baseline.accept(reading.log_norms_L, None if everyone else accepted_L)
        self._baseline.end_record()

    def _rebased(self, track: _Track, reading: Reading) -> list[Anomaly]:
        """Ends what has been open for so long that it is the new normal."""
        episodes = track.episodes
        due_L = episodes.open_L & (episodes.age_L >= REBASED_AFTER) & reading.usable_L
        if not due_L.any():
            return []
        accepted = f", rebaselined: it counts as normal after {REBASED_AFTER} steps"
        anomaly = self._anomaly(track, "event", np.flatnonzero(due_L), reading, accepted)
        episodes.close(due_L)
        self._baseline.rebase(due_L, reading.log_norms_L)
        return [anomaly]

    def _anomaly(
        self, track: _Track, level: Level, affected: Indices, reading: Reading, note: str = ""
    ) -> Anomaly:
        affected = self._worst_first(affected)
        worst, layers = affected[0], self._names(affected)
        norm, median = reading.norms_L[worst], math.exp(self._baseline.center_L[worst])
        since = int(track.episodes.since_L[worst])
        return Anomaly(
            kind=track.kind,
            level=level,
            step=reading.record.step,
            layer=layers[0],
            layers=layers[:LISTED],
            value=float(norm),
            expected=median,
            message=(
                f"{track.kind}: {named(layers)}: gradient norm {norm:.3g} is {norm / median:.3g}x "
                f"its median {median:.3g} since step {since}{note or after(reading.changes, since)}"
            ),
        )

    def _worst_first(self, affected: Indices) -> Indices:
        order = np.argsort(-self._excess_L[affected], kind="stable")
        return affected[order]

    def _names(self, affected: Indices) -> tuple[str, ...]:
        return tuple(self._layers[i] for i in affected)


def _episodes(num_layers: int, config: Outlier) -> Episodes:
    return Episodes(num_layers, need=config.need, of=config.of, clear_after=config.of)
