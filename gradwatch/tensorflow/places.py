"""Gradients in the order of a loop in, in the order of the layout out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from gradwatch.errors import AttachError
from gradwatch.tensorflow.gradients import Gradients
from gradwatch.tensorflow.layers import key_of

__all__ = ["Places"]


class Places:
    """Of the P watched variables."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self._index = {key_of(variable): i for i, variable in enumerate(variables)}

    def index(self, variable: Any) -> int:
        """
        Raises:
            AttachError: it is not watched.
        """
        index = self._index.get(key_of(variable))
        if index is None:
            raise AttachError(
                f"{getattr(variable, 'path', variable.name)} was not trainable or not there when "
                "the watch was attached, so that no rule of the policy looks at it. Attach again"
            )
        return index

    def gathered(
        self, grads: Sequence[Any], variables: Sequence[Any], scale: Any
    ) -> tuple[list[int], Gradients]:
        """The gradients that are there, and their places in the lists that were given.

        Args:
            scale: 0-d, what they are multiplied by; None where they are not.
        """
        found = {}
        for place, (grad, variable) in enumerate(zip(grads, variables, strict=True)):
            index = self.index(variable)
            if grad is not None:
                found[index] = place
        places = [found[index] for index in sorted(found)]
        scale = None if scale is None else tf.cast(scale, tf.float32)
        return places, Gradients(
            values=[grads[place] for place in places],
            weights=[variables[place] for place in places],
            present=bytes(index in found for index in range(len(self._index))),
            unit=None if scale is None else 1.0 / scale,
            loss_scale=scale,
        )
