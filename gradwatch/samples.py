"""When a step is sampled for what norms do not tell, and where the sample goes.

before (gradients are due) -> the optimizer's update -> stepped -> record
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gradwatch.backend import Backend
from gradwatch.due_step import DueStep
from gradwatch.recorder import Recorder
from gradwatch.records import SAMPLES

__all__ = ["Samples"]


class Samples:
    """The samples of one run; a failure of theirs is counted and costs nothing else."""

    def __init__(
        self, recorder: Recorder, num_parameters: int, on_error: Callable[[str], None]
    ) -> None:
        self.every = 0
        """Steps between two of them. 0 takes none: whoever knows when a step is over sets it."""

        self._recorder = recorder
        self._num_parameters = num_parameters
        self._on_error = on_error
        self._step: int | None = None

    def before(self, backend: Backend, step: DueStep, gradients: Any) -> None:
        """A step is due, and its gradients are as they came."""
        if not self.every or step.number % self.every:
            return
        try:
            backend.sample(gradients, step.context.loss_scale)
        except Exception:
            self._on_error("measure")
        else:
            self._step = step.number

    def forget(self, backend: Backend) -> None:
        """The step is not taken."""
        if self._step is not None:
            self._step = None
            backend.forget_sample()

    def stepped(self, backend: Backend) -> None:
        """The optimizer has made its update."""
        step, self._step = self._step, None
        if step is None:
            return
        try:
            sampled = backend.sampled()
            if sampled is None:
                return
            if backend.reads_host:
                self.record(step, sampled)
            else:
                backend.send(sampled.reshape(-1), functools.partial(self.record, step))
        except Exception:
            self._on_error("measure")

    def record(self, step: int, sampled: Any) -> None:
        """Hands a sample over, which is on the host now."""
        samples_SP = np.asarray(sampled, dtype=np.float32).reshape(len(SAMPLES), -1)
        self._recorder.sampled(step, samples_SP[:, : self._num_parameters])
