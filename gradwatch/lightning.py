"""gradwatch as a Lightning callback: `Trainer(callbacks=[GradWatch("policy.yaml")])`.

It attaches when training begins, behind the restored checkpoint, and puts its state into those that
the trainer saves. Automatic and manual optimization.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

try:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
except ImportError as error:
    raise ImportError(
        "gradwatch.lightning needs Lightning: pip install 'gradwatch[lightning]'"
    ) from error

from gradwatch.contradictions import (
    clips,
    refuse_other_windows,
    refuse_second_clipper,
    warn_of_clipped_norms,
)
from gradwatch.policy import Policy
from gradwatch.recording.finding import FOLDER
from gradwatch.saying import say
from gradwatch.trainers import Attachment, end, load_state, saved_state
from gradwatch.watch import Watch

__all__ = ["GradWatch"]


class GradWatch(Callback):  # type: ignore[misc]  # the package is not followed
    """Watches the gradients of a `fit`; a watch for each optimizer."""

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
        scaler: Any = None,
        distributed: bool | None = None,
        shard_keys: Mapping[str, Hashable] | None = None,
    ) -> None:
        """The arguments of `gradwatch.attach`; the trainer knows model, optimizers and scaler.

        Raises:
            PolicyError: the policy is wrong. What contradicts the trainer or does not fit the model
                is raised when training begins.
        """
        self._attachment = Attachment(
            policy=policy, run=run, host=host, port=port, recording=recording,
            discovery=discovery, linger=linger, pushgateway=pushgateway,
            alertmanager=alertmanager, alert_labels=alert_labels, scaler=scaler,
            distributed=distributed, shard_keys=shard_keys,
        )  # fmt: skip
        self.watches: tuple[Watch, ...] = ()
        """One for each optimizer, in the order of `trainer.optimizers`; empty before training."""

        self._training = False
        self._restored: list[Mapping[str, Any]] = []
        self._last: list[dict[str, Any]] = []
        self._measures_ahead = False
        self._losses: list[Any] = []
        self._num_steps = 0
        self._num_losses = 0

    @property
    def watch(self) -> Watch | None:
        """That of the first optimizer, also after training; None before."""
        return self.watches[0] if self.watches else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy = self._attachment.loaded
        _refuse_contradictions(policy, trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._measures_ahead = _clips(trainer, pl_module) and scaler is None
        if _clips(trainer, pl_module) and scaler is not None:
            warn_of_clipped_norms(
                _clipping(trainer), "gradient_clip_val=None", "under a GradScaler it comes first"
            )
        self.watches = self._attachment.attach(pl_module, trainer.optimizers, scaler=scaler)
        if self._restored:
            load_state(self.watches, self._restored)
        self._restored, self._losses = [], []
        self._num_steps, self._num_losses = trainer.global_step, 0
        self._training = True

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Behind the last backward pass of a window, and before the trainer clips."""
        if self._measures_ahead and self._training:
            for watch, watched in zip(self.watches, trainer.optimizers, strict=True):
                if watched is getattr(optimizer, "optimizer", optimizer):
                    watch.process_ahead()  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not (self._training and isinstance(loss, torch.Tensor) and loss.numel() == 1):
            return
        self._losses.append(loss.detach().reshape(()))
        if trainer.global_step == self._num_steps or any(w.window.count for w in self.watches):
            return
        losses, self._losses = self._losses, []
        self._num_steps = trainer.global_step
        self._num_losses += 1
        # Elsewhere than on the CPU reading waits; every so often the trainer's own log does too.
        if loss.device.type == "cpu" or self._num_losses % max(1, trainer.log_every_n_steps) == 0:
            count = 1 if pl_module.automatic_optimization else len(losses)
            for watch in self.watches:
                watch.log(loss=torch.stack(losses).sum() / count)  # automatic: divided already

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end(exception)

    def _end(self, error: BaseException | None = None) -> None:
        if self._training:
            self._training = False
            self._last = saved_state(self.watches)
            end(self.watches, error)

    def state_dict(self) -> dict[str, Any]:
        """What the trainer puts into its checkpoint."""
        states = saved_state(self.watches) if self._training else self._last
        return {"watches": states} if states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before the optimizers exist: the state waits for training to begin."""
        self._restored = list(state_dict.get("watches", ()))


def _refuse_contradictions(policy: Policy, trainer: Trainer, module: LightningModule) -> None:
    """
    Raises:
        TwoClippersError: trainer and policy clip.
        PolicyError: trainer and policy accumulate, and not in the same way.
    """
    if trainer.gradient_clip_val:
        refuse_second_clipper(policy, _clipping(trainer), "gradient_clip_val=None")
    if not module.automatic_optimization:
        return
    if _overrides_clipping(module) and clips(policy):
        say(
            logging.WARNING,
            "%s.configure_gradient_clipping is its own and runs behind the policy %s: what it "
            "clips is not in the records. Remove it if the policy is to be the only clipper",
            type(module).__name__, policy.source,
        )  # fmt: skip
    refuse_other_windows(policy, *_windows(trainer))


def _windows(trainer: Trainer) -> tuple[str, int | None]:
    """What accumulates, and how many micro-batches; None where that changes by epoch."""
    for callback in trainer.callbacks:
        by_epoch = isinstance(callback, GradientAccumulationScheduler)
        if by_epoch and callback.going_to_accumulate_grad_batches():
            return f"GradientAccumulationScheduler({callback.scheduling})", None
    steps = trainer.accumulate_grad_batches
    return f"Trainer(accumulate_grad_batches={steps})", steps


def _clips(trainer: Trainer, module: LightningModule) -> bool:
    return bool(trainer.gradient_clip_val) or _overrides_clipping(module)


def _overrides_clipping(module: LightningModule) -> bool:
    own = type(module).configure_gradient_clipping
    return own is not LightningModule.configure_gradient_clipping


def _clipping(trainer: Trainer) -> str:
    if not trainer.gradient_clip_val:
        return "configure_gradient_clipping"
    algorithm = trainer.gradient_clip_algorithm
    how = f", gradient_clip_algorithm={str(algorithm.value)!r}" if algorithm else ""
    return f"Trainer(gradient_clip_val={trainer.gradient_clip_val}{how})"
