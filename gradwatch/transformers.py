"""gradwatch as a callback of the Hugging Face Trainer: `Trainer(callbacks=[GradWatch(policy)])`.

It attaches when training begins, behind the restored checkpoint, and leaves a file of its state in
each checkpoint that the trainer saves.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
except ImportError as error:
    raise ImportError(
        "gradwatch.transformers needs transformers, torch and accelerate: "
        "pip install 'gradwatch[torch,transformers]'"
    ) from error

from gradwatch.contradictions import (
    refuse_other_windows,
    refuse_second_clipper,
    warn_of_clipped_norms,
)
from gradwatch.policy import Policy
from gradwatch.recording.finding import FOLDER
from gradwatch.trainers import Attachment, end, load_state, saved_state
from gradwatch.watch import Watch

__all__ = ["STATE_FILE", "GradWatch"]

STATE_FILE = "gradwatch.pt"
"""In each checkpoint folder; read without pickle."""


class GradWatch(TrainerCallback):  # type: ignore[misc]  # the package is not followed
    """Watches the gradients of each `train()`."""

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
        """The arguments of `gradwatch.attach`; the trainer knows model, optimizer and scaler.

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
        self.watch: Watch | None = None
        """Also after training; None before."""

        self._training = False
        self._clipping: _Clipping | None = None

    def on_train_begin(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._end(RuntimeError("the train() before did not end"))  # nothing is called when it fails
        policy = self._attachment.loaded
        steps = args.gradient_accumulation_steps
        setting = f"TrainingArguments(gradient_accumulation_steps={steps})"
        refuse_other_windows(policy, setting, steps)
        if args.max_grad_norm > 0:
            refuse_second_clipper(policy, _clips(args), "max_grad_norm=0")
        trainer, checkpoint = _calling()
        (self.watch,) = self._attachment.attach(model, [optimizer])
        self._training = True
        loop_divides = policy.accumulate is not None and policy.accumulate.drive == "loop"
        self.watch.window.is_exact = loop_divides and _divides_by_what_came(trainer)
        self._take_over(args, trainer, getattr(optimizer, "scaler", None))
        if state.global_step:
            guess = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._restore(guess if checkpoint is None else checkpoint)

    def _take_over(self, args: Arguments, trainer: Trainer | None, scaler: Any) -> None:
        assert self.watch is not None
        if args.max_grad_norm > 0 and (trainer is None or scaler is not None):
            why = "under a GradScaler it comes first" if trainer else "its trainer was not found"
            warn_of_clipped_norms(_clips(args), "max_grad_norm=0", why)
        elif trainer is not None:
            self._clipping = _Clipping(trainer.accelerator, self.watch)

    def on_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._clipping is not None:
            self._clipping.stepped()

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """The loss that the trainer has read anyway: the mean since its last log."""
        between = self._training and self.watch is not None and not self.watch.window.count
        if between and logs and "loss" in logs:
            assert self.watch is not None
            self.watch.log(loss=logs["loss"])

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (self._training and self.watch and state.is_world_process_zero and folder.is_dir()):
            return
        try:
            for saved in saved_state((self.watch,)):
                torch.save(saved, folder / STATE_FILE)
        except Exception:
            self.watch.pipeline.report("recording")

    def _restore(self, checkpoint: Path) -> None:
        assert self.watch is not None
        try:
            states = [torch.load(checkpoint / STATE_FILE, weights_only=True)]
        except FileNotFoundError:
            return  # a checkpoint from before gradwatch
        except Exception:
            self.watch.pipeline.report("recording")
            return
        load_state((self.watch,), states)

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._end()

    def _end(self, error: BaseException | None = None) -> None:
        if self._clipping is not None:
            self._clipping.give_back()
            self._clipping = None
        if self._training and self.watch is not None:
            self._training = False
            end((self.watch,), error)


class _Clipping:
    """The trainer's way to clip and to ask for the norm, while gradwatch is attached.

    With max_grad_norm=0 it still asks, by clipping to infinity: two passes over the gradients,
    which turn all of them into NaN where one is infinite. The watch knows the norm. A trainer that
    clips, where the policy does not, finds the gradients measured.
    """

    def __init__(self, accelerator: Any, watch: Watch) -> None:
        self._accelerator = accelerator
        self._watch = watch
        self._clip = accelerator.clip_grad_norm_
        self._norm = torch.full((), math.nan)
        accelerator.clip_grad_norm_ = self._clip_grad_norm_

    def _clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        if math.isinf(max_norm):
            # Filled when the step is taken: the trainer reads it behind that.
            self._norm = torch.full((), math.nan)
            return self._norm
        self._watch.process_ahead()  # type: ignore[attr-defined]
        return self._clip(parameters, max_norm, norm_type)

    def stepped(self) -> None:
        latest = self._watch.latest
        if latest is not None:
            self._norm.fill_(latest.total_norm)

    def give_back(self) -> None:
        vars(self._accelerator).pop("clip_grad_norm_", None)


def _clips(args: Arguments) -> str:
    return f"TrainingArguments(max_grad_norm={args.max_grad_norm})"


def _calling() -> tuple[Trainer | None, Path | None]:
    """The trainer whose callback runs, which callbacks are not given, and what it resumes from."""
    frame, trainer, checkpoint = sys._getframe(1), None, None
    while frame is not None and (trainer is None or checkpoint is None):
        known = frame.f_locals
        if trainer is None and isinstance(known.get("self"), Trainer):
            trainer = known["self"]
        if trainer is not None and isinstance(known.get("resume_from_checkpoint"), str):
            checkpoint = Path(known["resume_from_checkpoint"])
        frame = frame.f_back  # type: ignore[assignment]
    return trainer, checkpoint


def _divides_by_what_came(trainer: Trainer | None) -> bool:
    """Whether a short last window is a mean already; older versions divide by the setting."""
    counts = "current_gradient_accumulation_steps" in Trainer.training_step.__code__.co_names
    return counts or bool(getattr(trainer, "model_accepts_loss_kwargs", False))
