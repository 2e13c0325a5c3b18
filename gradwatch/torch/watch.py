"""A watch on a torch model: hooked to the optimizer's step."""

from __future__ import annotations

import logging
import math
from typing import Any, SupportsFloat

import torch

from gradwatch.engine import StepContext
from gradwatch.policy import Policy, check_against
from gradwatch.records import Layout, RunInfo
from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.hooks import BackwardCounter, StepHooks, innermost, refuse_watched
from gradwatch.torch.layers import watched_parameters
from gradwatch.torch.plan import plan_for
from gradwatch.torch.scaling import ScalerFollower
from gradwatch.watch import Watch

__all__ = ["TorchWatch"]

logger = logging.getLogger("gradwatch")


class TorchWatch(Watch):
    """Watches the parameters that an optimizer updates; without one, all of the model's."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        policy: Policy,
        *,
        run: str,
        recording: str | None,
        version: str,
        started: float,
        pid: int,
        scaler: Any = None,
    ) -> None:
        """
        Raises:
            AttachError: this model or optimizer cannot be watched.
            PolicyError: the policy does not fit the model.
        """
        self._optimizer = None if optimizer is None else innermost(optimizer)
        if self._optimizer is not None:
            refuse_watched(self._optimizer)
        tensors, parameters = watched_parameters(model, self._optimizer)
        layout = Layout.of(parameters, policy.grouping)
        check_against(policy, layout)
        info = RunInfo(
            run=run,
            layout=layout,
            rules=tuple(rule.name for rule in policy.clip),
            mode=policy.effective_mode,
            policy=policy.canonical_yaml(),
            policy_sha256=policy.sha256,
            framework=f"torch {torch.__version__}",
            model=type(model).__name__,
            version=version,
            started=started,
            pid=pid,
        )
        self._scaler = None if scaler is None else ScalerFollower(scaler)
        self.plan = plan_for(policy, layout, self._optimizer, tensors)
        self._backend = TorchBackend(tensors, self._optimizer, self.plan)
        super().__init__(info, policy, self._backend, recording)
        if self.plan.reason:
            logger.warning("gradwatch %s", self.plan)
        self._counter = BackwardCounter(tensors)
        self._hooks: StepHooks | None = None
        if self._optimizer is not None:
            self._hooks = StepHooks(self._optimizer, self.process, self._backend.disarm)

    @torch.no_grad()
    def process(self) -> None:
        super().process()

    def _context(self) -> StepContext:
        loss_scale, dropped = math.nan, 0
        passes = self._counter.take()
        if self._scaler is not None:
            loss_scale, dropped = self._scaler.step()
            dropped = min(dropped, passes - 1)  # the scaler of several optimizers backs off for any
        return StepContext(
            micro_batches=passes - dropped,
            weight=float(passes - dropped),
            learning_rate=_learning_rate(self._optimizer),
            loss_scale=loss_scale,
            overflows=dropped,
        )

    def _number(self, value: SupportsFloat) -> float:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)

    def _backward_seen(self) -> bool:
        return self._counter.count > 0

    def _detach(self) -> None:
        self._counter.remove()
        self._backend.disarm()
        if self._hooks is not None:
            self._hooks.remove()


def _learning_rate(optimizer: torch.optim.Optimizer | None) -> float:
    """Of the first group; NaN where there is none or where reading it would wait for a device."""
    rate = math.nan if optimizer is None else optimizer.param_groups[0].get("lr", math.nan)
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return math.nan
    return float(rate)
