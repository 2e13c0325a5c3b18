"""Where along the backward pass norms have grown: from a few steps of them to an order of layers.

    norms [T, L] before the episode and in it, layers in backward order  ->  Culprit

The update was made, so nothing can be looked at again, and a growth that begins at a layer may come
from the weights before it: nothing is named. That the loss has grown as every layer has is said
where it was logged before the step; an exponential of the weights would make it do so, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradwatch.records import Culprit, Float64s

__all__ = ["GROWN", "of_explosion"]

GROWN = 4.0
"""Times its median that a norm or a loss must be to have grown: as `exploding` asks for."""

ALIKE = 2.0
"""Every layer has grown as the loss has where they are within this factor of it."""

LISTED = 8


def of_explosion(
    layers: Sequence[str],
    before_TL: Float64s,
    now_L: Float64s,
    losses_before: Sequence[float],
    loss: float | None,
) -> Culprit:
    """
    Args:
        layers: in backward order [L].
        before_TL: norms of the steps before the episode.
        now_L: norms of the step; 0 where a layer had no gradient.
        losses_before: of those steps.
        loss: as it was logged before the step, or None.
    """
    with np.errstate(all="ignore"):
        ratio_L = now_L / np.nanmedian(before_TL, axis=0) if len(before_TL) else now_L * math.nan
    known = [
        (layer, float(ratio))
        for layer, ratio in zip(layers, ratio_L, strict=True)
        if math.isfinite(ratio) and ratio > 0
    ]
    if not known:
        return Culprit(message="not determined: there is nothing to compare the norms with")
    first = next((i for i, (_, ratio) in enumerate(known) if ratio > GROWN), None)
    if first is None:
        return Culprit(message="not determined: no layer has grown to 4 times its median")
    listed = ", ".join(f"{layer} {ratio:.3g}x" for layer, ratio in known[first:][:LISTED])
    more = ", ..." if len(known) - first > LISTED else ""
    if first > 0:
        calm, ratio = known[first - 1]
        return Culprit(
            near=(known[first][0], calm),
            message=f"in backward order the norms have grown from {known[first][0]} on ({listed}"
            f"{more}), behind {calm} ({ratio:.3g}x)",
        )
    in_order = f"every layer has grown, from the one nearest the loss on ({listed}{more})"
    grown = _growth(losses_before, loss)
    spread = [ratio / grown for _, ratio in known] if math.isfinite(grown) else []
    if grown > GROWN and all(1 / ALIKE < one < ALIKE for one in spread):
        return Culprit(
            near=("the loss",),
            message=f"the loss is {grown:.3g}x its median, and every gradient has grown with it: "
            f"targets, scale, or an exponential of what the model puts out; {in_order}",
        )
    said = "" if math.isfinite(grown) else "; no loss was logged before the step"
    return Culprit(near=(known[0][0],), message=f"{in_order}{said}")


def _growth(before: Sequence[float], loss: float | None) -> float:
    finite = [one for one in before if math.isfinite(one)]
    if loss is None or not finite:
        return math.nan
    median = float(np.median(finite))
    return loss / median if median > 0 else math.nan
