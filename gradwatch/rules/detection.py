"""Records in, anomalies out: every detector of the policy over one layout.

    StepRecord, state  ->  the anomalies that begin with it, new state

Detectors see a record once it is on the host. There is no clock and no chance in them: the same
records give the same anomalies again, whether live, from a recording or after a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.policy import KINDS, Detect, layers_of
from gradwatch.policy.detectors import Outlier
from gradwatch.records import Anomaly, Bools, Layout, StepRecord
from gradwatch.rules.baseline import band_of
from gradwatch.rules.detect_kinds import persistent
from gradwatch.rules.detect_nonfinite import Nonfinite
from gradwatch.rules.detect_outliers import Outliers
from gradwatch.rules.detect_reading import Detector, read
from gradwatch.rules.detect_regime import Change, Regime
from gradwatch.rules.detect_sampled import SAMPLED
from gradwatch.rules.detect_vanishing import Vanishing

__all__ = ["KINDS", "Detection"]

STATE_VERSION = 1
KEPT_CHANGES = 4
"""The last changes by intention that are remembered, for messages only: those with a reason."""


class Detection:
    """The detectors of one run; holds their state, which is updated in place."""

    def __init__(
        self, layout: Layout, config: Detect | None = None, *, is_shadow: bool = False
    ) -> None:
        """
        Args:
            is_shadow: whether a step that a record says is skipped was taken all the same.
        """
        self._layout = self._known_layout = layout
        self._is_shadow = is_shadow
        self._detectors = _detectors(layout, config or Detect(), is_shadow)
        self._regime = Regime()
        self._last_norms_P = np.full(len(layout.parameters), np.nan, dtype=np.float32)
        self._last_step = -1
        self._changes: deque[Change] = deque(maxlen=KEPT_CHANGES)

    def observe(self, record: StepRecord) -> tuple[Anomaly, ...]:
        """Takes one record in; the anomalies that begin with it.

        An episode is reported when it begins and, where it gets worse, once more at the higher
        level. What lasts is in `active`.

        Raises:
            ValueError: the record is of other layers.
        """
        self._require_same_layers(record.layout)
        self._last_step = record.step
        for change in self._regime.update(record):
            self._begin_anew(change)
        stale = not np.count_nonzero(record.tensor_norms_P != self._last_norms_P)
        np.copyto(self._last_norms_P, record.tensor_norms_P)
        reading = read(
            self._layout,
            record,
            stale=stale,
            odd=self._regime.odd,
            open_alerts=self._open_alerts(),
            changes=self._changes,
        )
        found: list[Anomaly] = []
        for detector in self._detectors.values():
            found += detector.observe(reading)
        return tuple(found)

    def observe_samples(self, record: StepRecord) -> tuple[Anomaly, ...]:
        """Takes in what was sampled in a record that was observed before its sample had come.

        The state and the anomalies are then as if it had been there at once.
        """
        reading = read(
            self._layout, record, stale=False, odd=False, open_alerts={}, changes=self._changes
        )
        sampled = (self._detectors[kind] for kind in SAMPLED if kind in self._detectors)
        return tuple(found for detector in sampled for found in detector.observe(reading))

    def announce(self, reason: str, *, rescales: bool = False) -> None:
        """Something changes by intention with the next record, such as a resume.

        Every baseline begins anew, and the one from before goes on judging until it has. Jumps of
        the learning rate and of the micro-batches in a record are noticed without this.

        Args:
            reason: a clause for messages, e.g. `the run was resumed`.
            rescales: the change may move norms by itself (batch size, reduction), so that for
                the length of a warm-up only 100 times the median is abnormal.
        """
        self._begin_anew(Change(self._last_step + 1, reason, rescales=rescales))

    def active(self) -> dict[str, tuple[str, ...]]:
        """Kinds with an open alert, each with its layers, worst first.

        No layer is named where only the total norm is affected.
        """
        active: dict[str, tuple[str, ...]] = {}
        for detector in self._detectors.values():
            active |= detector.active()
        return active

    def state_dict(self) -> dict[str, Any]:
        """The state as a flat dict of NumPy arrays and plain values: no object needs pickling."""
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "layers": list(self._layout.layers),
            "last_step": self._last_step,
            "changes": [[change.step, change.reason] for change in self._changes],
        }
        return state | {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the state is of another version, of other layers, or of other detectors
                than these; nothing was changed.
        """
        live = self._arrays()
        _check(state, self._layout.layers, live)
        for name, array in live.items():
            np.copyto(array, np.asarray(state[name]))
        self._last_step = int(state["last_step"])
        self._changes.clear()
        self._changes += (Change(step, reason, rescales=False) for step, reason in state["changes"])
        for detector in self._detectors.values():
            detector.restored()

    def reconfigured(self, config: Detect) -> Detection:
        """The same detection with other parameters: baselines and episodes go on, but for those
        that are kept in another shape now."""
        new = Detection(self._layout, config, is_shadow=self._is_shadow)
        _copy_fitting(self._regime.arrays(), new._regime.arrays())
        np.copyto(new._last_norms_P, self._last_norms_P)
        for kinds, detector in new._detectors.items():
            for others, before in self._detectors.items():
                if set(kinds.split("+")) & set(others.split("+")):
                    _copy_fitting(before.arrays(), detector.arrays())
            detector.restored()
        new._last_step = self._last_step
        new._changes += self._changes
        return new

    def _begin_anew(self, change: Change) -> None:
        if change.reason:
            self._changes.append(change)
        for detector in self._detectors.values():
            detector.begin_anew(rescales=change.rescales)

    def _open_alerts(self) -> dict[str, Bools]:
        masks: dict[str, Bools] = {}
        for detector in self._detectors.values():
            masks |= detector.open_alerts()
        return masks

    def _require_same_layers(self, layout: Layout) -> None:
        if layout is self._known_layout:
            return
        if (layout.layers, layout.layer_of) != (self._layout.layers, self._layout.layer_of):
            raise ValueError(
                f"a record of {len(layout.layers)} layers ({', '.join(layout.layers[:3])}, ...) "
                f"came to the detection of {len(self._layout.layers)} others "
                f"({', '.join(self._layout.layers[:3])}, ...). Use one Detection for each run"
            )
        self._known_layout = layout

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {"last_norms": self._last_norms_P}
        parts: Iterable[tuple[str, Detector | Regime]] = (
            ("regime", self._regime),
            *self._detectors.items(),
        )
        for name, part in parts:
            arrays |= {f"{name}.{key}": array for key, array in part.arrays().items()}
        return arrays


def _detectors(layout: Layout, config: Detect, is_shadow: bool) -> dict[str, Detector]:
    """By the kinds they know, joined with +; in the order that they see a record."""
    detectors: dict[str, Detector] = {}
    nonfinite = [kind for kind in ("nonfinite", "overflow") if config[kind] is not None]
    if nonfinite:
        detectors["+".join(nonfinite)] = Nonfinite(layout.layers, nonfinite, is_shadow)
    for outliers in _of_one_band(config):
        watched = {kind: layers_of(found, layout) for kind, found in outliers.items()}
        detectors["+".join(outliers)] = Outliers(layout.layers, outliers, watched)
    if config.vanishing is not None:
        detectors["vanishing"] = Vanishing(
            layout, config.vanishing, layers_of(config.vanishing, layout)
        )
    return detectors | dict(persistent(layout, config))


def _of_one_band(config: Detect) -> list[dict[str, Outlier]]:
    """Outlier detectors that can share a baseline, together."""
    wanted = {"exploding": config.exploding, "spike": config.spike}
    configs = {kind: found for kind, found in wanted.items() if found is not None}
    groups: dict[object, dict[str, Outlier]] = {}
    for kind, found in configs.items():
        groups.setdefault(band_of(found), {})[kind] = found
    return list(groups.values())


def _copy_fitting(
    before: Mapping[str, npt.NDArray[Any]], after: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Copies what has the same shape; of a part, such as a baseline, all of it or nothing."""
    parts: dict[str, list[str]] = {}
    for name in after:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    for names in parts.values():
        if all(name in before and before[name].shape == after[name].shape for name in names):
            for name in names:
                np.copyto(after[name], before[name])


def _check(
    state: Mapping[str, Any], layers: tuple[str, ...], live: Mapping[str, npt.NDArray[Any]]
) -> None:
    advice = "Leave the state out to begin with new baselines"
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"detection state must be of version {STATE_VERSION}. "
            f"Received: {state.get('version')!r}. {advice}"
        )
    if tuple(state["layers"]) != layers:
        raise ValueError(
            f"detection state is of {len(state['layers'])} layers, which are not the "
            f"{len(layers)} watched ones. {advice}"
        )
    for name, array in live.items():
        saved = np.asarray(state.get(name, np.nan))
        fits = saved.shape == array.shape and np.can_cast(saved.dtype, array.dtype, "same_kind")
        if name not in state or not fits:
            received = f"{saved.dtype} {saved.shape}" if name in state else "nothing"
            raise ValueError(
                f"detection state does not fit the detectors of this policy: {name} must be "
                f"{array.dtype} {array.shape}. Received: {received}. {advice}"
            )
