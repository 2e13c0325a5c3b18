"""`vanishing`: modules whose norm is a tiny share of the largest one's.

    norm / max(norm) < share in 20 of 25 steps: ALERT

It is judged per module even where layers are finer: the bias before a normalisation has no
gradient by construction, and its module is well. A layer without a gradient is not judged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import Vanishing as Config
from gradwatch.records import Anomaly, Bools, Float64s, Indices, Layout
from gradwatch.rules.detect_reading import LISTED, Reading, named
from gradwatch.rules.detect_regime import after
from gradwatch.rules.episodes import Episodes

__all__ = ["Vanishing"]

KIND = "vanishing"
CALM_SHARES = 2.0
"""How many times `share` a module must reach to count towards the end of an episode."""


class Vanishing:
    def __init__(self, layout: Layout, config: Config, watched_L: Bools | None = None) -> None:
        """
        Args:
            watched_L: the layers that are looked at; None for all.
        """
        self._watched_L = watched_L
        self._layers = layout.layers
        self._config = config
        self._module_of_L = _module_of_layer(layout)
        self._episodes = Episodes(
            len(layout.layers), need=config.need, of=config.of, clear_after=config.of
        )
        self._share_L: Float64s = np.ones(len(layout.layers))
        """Of each layer, at the last record that was judged."""

    def observe(self, reading: Reading) -> list[Anomaly]:
        judged_L = reading.judged_L
        if reading.record.step < self._config.after:
            return []
        norms_L = np.where(judged_L, reading.norms_L, 0.0)
        norms_L = norms_L if self._module_of_L is None else self._of_modules(norms_L)
        largest = self._largest(norms_L, reading)
        if norms_L[largest] == 0:
            return []
        limit = self._config.share * norms_L[largest]
        low_L = norms_L < limit
        calm_L = norms_L >= CALM_SHARES * limit
        if self._watched_L is not None:
            judged_L = judged_L & self._watched_L
        begins = self._episodes.update(reading.record.step, low_L & judged_L, calm_L, judged_L)
        if self._episodes.any_open:
            np.divide(norms_L, norms_L[largest], out=self._share_L, where=judged_L)
        return [self._anomaly(begins, norms_L, largest, reading)] if begins.size else []

    def begin_anew(self, *, rescales: bool) -> None:
        """Nothing to begin: a share of the same step needs no baseline."""

    def active(self) -> dict[str, tuple[str, ...]]:
        if not self._episodes.any_open:
            return {}
        affected = self._worst_first(np.flatnonzero(self._episodes.open_L))
        return {KIND: tuple(self._layers[i] for i in affected)}

    def open_alerts(self) -> dict[str, Bools]:
        return {KIND: self._episodes.open_L.copy()} if self._episodes.any_open else {}

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {**self._episodes.arrays(), "share": self._share_L}

    def restored(self) -> None:
        self._episodes.restored()

    def _largest(self, norms_L: Float64s, reading: Reading) -> int:
        """The layer to compare with: not one that explodes, beside which all others vanish."""
        if "exploding" in reading.open_alerts:
            norms_L = np.where(reading.open_alerts["exploding"], 0.0, norms_L)
        return int(norms_L.argmax())

    def _of_modules(self, norms_L: Float64s) -> Float64s:
        """[L] the norm of each layer's module."""
        assert self._module_of_L is not None
        return np.sqrt(np.bincount(self._module_of_L, np.square(norms_L)))[self._module_of_L]

    def _worst_first(self, affected: Indices) -> Indices:
        return affected[np.argsort(self._share_L[affected], kind="stable")]

    def _anomaly(
        self, begins: Indices, norms_L: Float64s, largest: int, reading: Reading
    ) -> Anomaly:
        affected = self._worst_first(begins)
        worst = affected[0]
        since = int(self._episodes.since_L[worst])
        layers = tuple(self._layers[i] for i in affected)
        return Anomaly(
            kind=KIND,
            level="alert",
            step=reading.record.step,
            layer=layers[0],
            layers=layers[:LISTED],
            value=float(norms_L[worst]),
            expected=float(self._config.share * norms_L[largest]),
            message=(
                f"{KIND}: {named(layers)}: gradient norm {norms_L[worst]:.3g} is "
                f"{self._share_L[worst]:.2g}x the largest, {norms_L[largest]:.3g} in "
                f"{self._layers[largest]}, since step {since}{after(reading.changes, since)}"
            ),
        )


def _module_of_layer(layout: Layout) -> Indices | None:
    """[L] the module of each layer, or None where layers are modules or coarser."""
    modules = Layout.of(layout.parameters, "module")
    if len(modules.layers) >= len(layout.layers):
        return None
    module_of_L = np.zeros(len(layout.layers), dtype=np.intp)
    module_of_L[layout.layer_of_P] = modules.layer_of_P
    return module_of_L
