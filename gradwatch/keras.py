"""gradwatch as a Keras callback: `model.fit(..., callbacks=[GradWatch("policy.yaml")])`.

It attaches when training begins, to the optimizer that the model is compiled with, and ends when
that does. Keras 3 on TensorFlow, and on torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import keras
except ImportError as error:
    raise ImportError(
        "gradwatch.keras needs Keras 3: pip install 'gradwatch[tensorflow]'"
    ) from error

from gradwatch.policy import Policy
from gradwatch.recording.finding import FOLDER
from gradwatch.trainers import Attachment, end, load_state, saved_state
from gradwatch.watch import Watch

__all__ = ["GradWatch"]


class GradWatch(keras.callbacks.Callback):  # type: ignore[misc]  # the package is not followed
    """Watches the gradients of a `fit`.

    Keras tells a callback nothing of an exception that ends `fit`: use it as a context manager, or
    call `close()`, where the recording is to say so at once rather than when the process ends.
    """

    def __init__(
        self,
        policy: str | os.PathLike[str] | Mapping[str, Any] | Policy | None = None,
        *,
        run: str | None = None,
        host: str | None = None,
        port: int | None = 9464,
        recording: str | os.PathLike[str] | None = FOLDER,
        discovery: str | os.PathLike[str] | None = None,
        linger: float | None = None,
        pushgateway: str | None = None,
        alertmanager: str | Sequence[str] | None = None,
        alert_labels: Mapping[str, str] | None = None,
    ) -> None:
        """The arguments of `gradwatch.attach`; Keras knows the model and its optimizer.

        Raises:
            PolicyError: the policy is wrong. What contradicts the optimizer or does not fit the
                model is raised when training begins.
        """
        super().__init__()
        self._attachment = Attachment(
            policy=policy, run=run, host=host, port=port, recording=recording,
            discovery=discovery, linger=linger, pushgateway=pushgateway,
            alertmanager=alertmanager, alert_labels=alert_labels,
        )  # fmt: skip
        self.watch: Watch | None = None
        """That of the last `fit`; None before."""

        self._training = False
        self._restored: list[Mapping[str, Any]] = []
        self._last: list[dict[str, Any]] = []

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._end()  # of a fit that an exception has ended
        (self.watch,) = self._attachment.attach(self.model, [None])
        if self._restored:
            load_state((self.watch,), self._restored)
        self._restored = []
        self._training = True

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of your own: what `load_state_dict` of a resumed run takes."""
        states = saved_state(self._watches) if self._training else self._last
        return {"watches": states} if states else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before `fit`: its watch goes on where the state was taken."""
        self._restored = list(state.get("watches", ()))

    def close(self, error: BaseException | None = None) -> None:
        """Ends the watch of a `fit` that an exception has ended."""
        self._end(error)

    def __enter__(self) -> GradWatch:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._end(error)

    @property
    def _watches(self) -> tuple[Watch, ...]:
        return () if self.watch is None else (self.watch,)

    def _end(self, error: BaseException | None = None) -> None:
        if self._training:
            self._training = False
            self._last = saved_state(self._watches)
            end(self._watches, error)
