"""One of several processes that is not like the others: what only they together can tell.

own gradient norm of each process [W], sampled    ->  Outlying  ->  rank_outlier
checksums of the weights that several hold        ->  DivergingRanks ->  rank_divergence
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwatch.policy.detectors import RankDivergence, RankOutlier
from gradwatch.records import Anomaly, Layout
from gradwatch.rules.episodes import Episodes

__all__ = ["DIVERGENCE", "OUTLIER", "DivergingRanks", "OutlyingRank", "Pieces"]

OUTLIER = "rank_outlier"
DIVERGENCE = "rank_divergence"
REMEMBERED = 64
"""Samples whose spread over the processes is the usual one."""

FARTHEST = 20.0
"""In log units: of a norm that is 0."""

LISTED = 5


class OutlyingRank:
    """`rank_outlier`: the gradient of one process, before it was averaged, against all of them."""

    def __init__(self, config: RankOutlier, num_ranks: int) -> None:
        self._config = config
        self._spreads: deque[float] = deque(maxlen=REMEMBERED)
        self._episodes = Episodes(num_ranks, need=config.need, of=config.of, clear_after=config.of)

    @property
    def is_open(self) -> bool:
        return self._episodes.any_open

    def observe(self, step: int, norms_W: Sequence[float]) -> Anomaly | None:
        """
        Args:
            norms_W: of one sample; NaN where a process has none.
        """
        norms = np.asarray(norms_W, dtype=np.float64)
        judged_W = np.isfinite(norms) & (np.count_nonzero(np.isfinite(norms)) > 2)
        if not judged_W.any():
            return None  # of two, nobody can say which one is odd
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(norms), -FARTHEST)
        middle = float(np.median(logs[judged_W]))
        away_W = np.where(judged_W, np.abs(logs - middle), 0.0)
        self._spreads.append(float(np.median(away_W[judged_W])))
        scale = max(self._config.floor, float(np.median(self._spreads)))
        hit_W = judged_W & (away_W > self._config.z * scale)
        calm_W = judged_W & (away_W < self._config.z * scale / 2)
        begins = self._episodes.update(step, hit_W, calm_W, judged_W)
        if not begins.size:
            return None
        rank = int(begins[np.argmax(away_W[begins])])
        times = math.exp(float(logs[rank]) - middle)
        return Anomaly(
            kind=OUTLIER, level="alert", step=step, value=float(norms[rank]),
            expected=math.exp(middle),
            message=f"{OUTLIER}: the gradient of rank {rank}, before it is averaged, has norm "
            f"{norms[rank]:.3g}, {times:.3g}x the median of {int(judged_W.sum())} ranks, in "
            f"{self._config.need} of {self._config.of} samples since step "
            f"{self._episodes.since_L[rank]}: look at its data, its seed and its hardware",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pieces:
    """Which process holds which piece of which parameter."""

    places_W: tuple[tuple[int, ...], ...]
    """By process: its parameters by their place in the layout."""

    ids_W: tuple[tuple[int, ...], ...]
    """By process, in the same order: what is the same number is the same piece."""

    @property
    def has_replicas(self) -> bool:
        """Whether any piece is held twice, so that there is something to compare."""
        held = Counter(one for ids in self.ids_W for one in ids)
        return any(count > 1 for count in held.values())


class DivergingRanks:
    """`rank_divergence`: weights that are to be the same on several processes, and are not."""

    def __init__(self, config: RankDivergence, layout: Layout, pieces: Pieces) -> None:
        self._config = config
        self._layout = layout
        self._pieces = pieces
        self.is_open = False

    def observe(self, step: int, sums_W: Sequence[npt.NDArray[np.int64]]) -> Anomaly | None:
        """
        Args:
            sums_W: by process, a checksum of each of its parameters.
        """
        held: dict[int, dict[int, list[int]]] = {}
        place_of: dict[int, int] = {}
        for rank, sums in enumerate(sums_W):
            ids, places = self._pieces.ids_W[rank], self._pieces.places_W[rank]
            for piece, place, total in zip(ids, places, sums.tolist(), strict=True):
                held.setdefault(piece, {}).setdefault(total, []).append(rank)
                place_of[piece] = place
        apart = {piece: by_sum for piece, by_sum in held.items() if len(by_sum) > 1}
        was_open, self.is_open = self.is_open, bool(apart)
        if not apart or was_open:
            return None
        layers = tuple(
            dict.fromkeys(
                self._layout.layers[self._layout.layer_of[place_of[piece]]] for piece in apart
            )
        )
        named = ", ".join(layers[:LISTED]) + (", ..." if len(layers) > LISTED else "")
        return Anomaly(
            kind=DIVERGENCE, level="alert", step=step, layer=layers[0], layers=layers,
            value=float(len(apart)), expected=0.0,
            message=f"{DIVERGENCE}: the weights of {named} are not the same on all ranks: "
            f"{_odd_ones(list(apart.values()))}. What is trained since step "
            f"{max(0, step - self._config.every)} is of no one model: go back to a checkpoint",
        )  # fmt: skip


def _odd_ones(apart: Sequence[dict[int, list[int]]]) -> str:
    """The processes that differ from most of the others."""
    odd: Counter[int] = Counter()
    for by_sum in apart:
        *few, most = sorted(by_sum.values(), key=len)
        if few and len(few[-1]) == len(most):
            return "ranks " + " and ".join(
                "/".join(map(str, ranks)) for ranks in sorted(by_sum.values())
            ) + " differ"  # fmt: skip
        odd.update(rank for ranks in few for rank in ranks)
    ranks = sorted(odd)
    s = "s" if len(ranks) > 1 else ""
    return f"rank{s} {', '.join(map(str, ranks))} differ{'' if s else 's'} from the others"
