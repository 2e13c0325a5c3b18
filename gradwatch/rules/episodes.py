"""Abnormal steps in, episodes out: when a finding begins, lasts and ends.

    hit[L], calm[L], judged[L]  ->  the layers whose episode begins

An episode opens with `need` hits among the last `of` judged steps of a layer and closes after
`clear_after` calm ones in a row. Steps in which a layer is not judged (it had no gradient, or one
that is not finite) leave it as it is. Nothing here knows what a hit means.

Of a short array `np.count_nonzero` tells in a fifth of the time of `any` and `all` whether one is
true; here and in what else runs for each record.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradwatch.records import Bools, Indices

__all__ = ["SPREAD", "Episodes"]

SPREAD = 10
"""Records within which layers that follow the first one belong to the same report: an explosion
reaches layer after layer, and one sentence about it is enough."""

NOBODY: Indices = np.empty(0, dtype=np.intp)
NEVER = -(2**40)


class Episodes:
    """The episodes of one kind for L layers. Its arrays are updated in place."""

    def __init__(self, num_layers: int, *, need: int, of: int, clear_after: int) -> None:
        self.open_L: Bools = np.zeros(num_layers, dtype=np.bool_)
        self.since_L: Indices = np.zeros(num_layers, dtype=np.intp)
        """Step of the first hit of the present run of hits; meaningful where there are hits."""

        self.age_L: Indices = np.zeros(num_layers, dtype=np.intp)
        """Judged steps since an episode opened."""

        self.any_open = False
        self._need, self._of, self._clear_after = need, of, clear_after
        self._spread = max(SPREAD, of)
        self._hits_LN: Bools = np.zeros((num_layers, of), dtype=np.bool_)
        self._count_L: Indices = np.zeros(num_layers, dtype=np.intp)
        self._judged_L: Indices = np.zeros(num_layers, dtype=np.intp)
        self._calm_L: Indices = np.zeros(num_layers, dtype=np.intp)
        self._clock: Indices = np.array([0, NEVER], dtype=np.intp)  # records, last report
        self._quiet = True

    def passed_by(self, hit_L: Bools) -> bool:
        """Takes a record in of which nothing needs to be remembered; False where something does."""
        if not self._quiet or np.count_nonzero(hit_L):
            return False
        self._clock[0] += 1
        return True

    def update(self, step: int, hit_L: Bools, calm_L: Bools, judged_L: Bools) -> Indices:
        """Takes one record in.

        Args:
            step: of the record.
            hit_L: abnormal; only where judged.
            calm_L: well within the normal; the steps between are neither.
            judged_L: whether the record says anything about a layer.

        Returns:
            The layers to be reported: those whose episode begins, unless they only follow others
            within `SPREAD` records.
        """
        self._clock[0] += 1
        if self._quiet and not np.count_nonzero(hit_L):
            return NOBODY
        self._count(step, hit_L, judged_L)
        had_open = self.any_open
        begins_L = judged_L & ~self.open_L & (self._count_L >= self._need)
        self._age(begins_L, calm_L, judged_L)
        self._set_flags()
        begins = np.flatnonzero(begins_L)
        now, reported = self._clock
        if not begins.size or (had_open and now - reported <= self._spread):
            return NOBODY
        self._clock[1] = now
        return begins

    def close(self, layers_L: Bools) -> None:
        """Ends episodes and forgets the hits that led to them."""
        self.open_L[layers_L] = False
        self._hits_LN[layers_L] = False
        self._count_L[layers_L] = 0
        self._set_flags()

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The state, live."""
        return {
            "open": self.open_L,
            "since": self.since_L,
            "age": self.age_L,
            "hits": self._hits_LN,
            "count": self._count_L,
            "judged": self._judged_L,
            "calm": self._calm_L,
            "clock": self._clock,
        }

    def restored(self) -> None:
        """To be called when `arrays` were written to."""
        self._set_flags()

    def _count(self, step: int, hit_L: Bools, judged_L: Bools) -> None:
        rows = np.flatnonzero(judged_L)
        slot = self._judged_L[rows] % self._of
        hit = hit_L[rows]
        remembered = self._count_L[rows] - self._hits_LN[rows, slot]
        self.since_L[rows[hit & (remembered == 0)]] = step
        self._count_L[rows] = remembered + hit
        self._hits_LN[rows, slot] = hit
        self._judged_L[rows] += 1

    def _age(self, begins_L: Bools, calm_L: Bools, judged_L: Bools) -> None:
        going_on_L = self.open_L & judged_L
        self.age_L[going_on_L] += 1
        self._calm_L[going_on_L] = np.where(calm_L, self._calm_L + 1, 0)[going_on_L]
        self.open_L |= begins_L
        self.age_L[begins_L] = self._calm_L[begins_L] = 0
        over_L = self.open_L & (self._calm_L >= self._clear_after)
        if over_L.any():
            self.close(over_L)

    def _set_flags(self) -> None:
        self.any_open = bool(self.open_L.any())
        self._quiet = not self.any_open and not self._count_L.any()
