"""The arguments of `attach` in, a watch out once a trainer has its model and its optimizers.

What the callbacks of all trainers share. Framework-free.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwatch.attaching import attach, run_name
from gradwatch.ends import Ends
from gradwatch.errors import GradwatchError
from gradwatch.policy import Policy, load_policy
from gradwatch.recording.finding import FOLDER
from gradwatch.saying import say
from gradwatch.watch import Watch

__all__ = ["Attachment", "end", "load_state", "saved_state"]


@dataclass(kw_only=True)
class Attachment:
    """`attach`, waiting for what a trainer makes; each field is the argument of that name."""

    policy: str | os.PathLike[str] | Mapping[str, Any] | Policy | None = None
    run: str | None = None
    host: str | None = None
    port: int | None = 9464
    recording: str | os.PathLike[str] | None = FOLDER
    discovery: str | os.PathLike[str] | None = None
    linger: float | None = None
    pushgateway: str | None = None
    alertmanager: str | Sequence[str] | None = None
    alert_labels: Mapping[str, str] | None = None
    scaler: Any = None
    distributed: bool | None = None
    shard_keys: Mapping[str, Hashable] | None = None
    loaded: Policy = field(init=False)

    def __post_init__(self) -> None:
        """
        Raises:
            PolicyError: the policy is wrong.
            AttachError: who is to hear of the end cannot be told.
        """
        Ends.of(self.linger, self.pushgateway, self.alertmanager, self.alert_labels)
        self.loaded = load_policy(self.policy)

    def attach(self, model: Any, optimizers: list[Any], *, scaler: Any = None) -> tuple[Watch, ...]:
        """A watch for each optimizer; where there are several, their runs are numbered.

        Args:
            scaler: the trainer's own, where the user has given none.

        Raises:
            PolicyError: the policy does not fit the model.
            AttachError: the model or an optimizer cannot be watched.
        """
        run = run_name() if self.run is None else self.run
        watches: list[Watch] = []
        try:
            for index, optimizer in enumerate(optimizers):
                watches.append(
                    attach(
                        model,
                        optimizer,
                        self.policy,
                        run=run if len(optimizers) == 1 else f"{run}-{index}",
                        host=self.host,
                        port=self.port,
                        recording=self.recording,
                        discovery=self.discovery,
                        linger=self.linger,
                        pushgateway=self.pushgateway,
                        alertmanager=self.alertmanager,
                        alert_labels=self.alert_labels,
                        scaler=scaler if self.scaler is None else self.scaler,
                        distributed=self.distributed,
                        shard_keys=self.shard_keys,
                    )
                )
        except GradwatchError as error:
            end(tuple(watches), error)
            raise
        return tuple(watches)


def end(watches: tuple[Watch, ...], error: BaseException | None = None) -> None:
    """Closes them: finished without an error, else stopped or crashed."""
    for watch in watches:
        watch.__exit__(None if error is None else type(error), error, None)


def saved_state(watches: tuple[Watch, ...]) -> list[dict[str, Any]]:
    """Their states for a checkpoint; empty, and said, in the middle of a window."""
    try:
        return [watch.state_dict() for watch in watches]
    except GradwatchError as error:
        say(logging.WARNING, "this checkpoint holds no state of gradwatch: %s", error)
    except Exception:
        for watch in watches[:1]:
            watch.pipeline.report("recording")
    return []


def load_state(watches: tuple[Watch, ...], states: list[Mapping[str, Any]]) -> None:
    """Goes on where `saved_state` was taken; begins anew, and says so, where that does not fit."""
    try:
        for watch, state in zip(watches, states, strict=True):
            watch.load_state_dict(state)
    except Exception as error:
        say(
            logging.WARNING,
            "the state of gradwatch in the checkpoint does not fit (%s: %s): statistics and "
            "detection begin anew", type(error).__name__, error,
        )  # fmt: skip
