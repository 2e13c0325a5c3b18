"""One run of the demo: attach, train, look, and read the recording back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import gradwatch
from gradwatch.demo.digits import digits_task
from gradwatch.demo.faults import FAULTS
from gradwatch.demo.findings import Findings, find
from gradwatch.demo.gpt import gpt_task
from gradwatch.demo.live import LiveView
from gradwatch.demo.monitor import Monitor
from gradwatch.demo.plain import PlainView, View, logged_to
from gradwatch.demo.summary import Setting
from gradwatch.demo.task import Task
from gradwatch.demo.training import paced, train

__all__ = ["Options", "run_once"]

TASKS: dict[str, Callable[[int], Task]] = {"digits": digits_task, "gpt": gpt_task}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one run needs to know."""

    model: str
    fault: str
    """A name of FAULTS, or `none`."""

    policy: gradwatch.Policy
    steps: int
    seed: int
    host: str
    port: int
    recording: Path
    discovery: Path | None
    step_seconds: float
    plain: bool

    @property
    def fault_step(self) -> int:
        """In the middle: enough before it to know what is usual, enough after it to recover."""
        return self.steps // 2


def run_once(
    options: Options, console: Console, stopping: Callable[[], bool]
) -> tuple[Findings, Setting]:
    """Trains, shows it, and finds in the recording what there is to say.

    Args:
        stopping: asked after each step; true ends the run there.

    Raises:
        GradwatchError: the policy does not fit the model, or nothing can be recorded.
    """
    task = TASKS[options.model](options.seed)
    stopped = None
    with logged_to(console):
        watch = gradwatch.attach(
            task.model,
            task.optimizer,
            policy=options.policy,
            run=f"demo-{task.name}",
            host=options.host,
            port=options.port,
            recording=options.recording,
            discovery=options.discovery,
        )
        if watch.recording is None:
            watch.close()
            raise gradwatch.GradwatchError(
                f"{options.recording}: no recording can be written there. Choose another directory "
                "with --recording"
            )
        try:
            with watch:
                _follow(watch, task, options, console, stopping)
        except gradwatch.TrainingStopped as error:
            stopped = str(error)
    recording = gradwatch.open_recording(watch.recording)
    findings = find(list(recording.records()), recording.anomalies())
    return findings, _setting(options, watch.recording, stopped)


def _follow(
    watch: gradwatch.Watch,
    task: Task,
    options: Options,
    console: Console,
    stopping: Callable[[], bool],
) -> None:
    fault = FAULTS.get(options.fault)
    monitor = Monitor(watch, options.steps)
    title = f"gradwatch demo: {task.title}"
    view: View = (PlainView if options.plain else LiveView)(console, title)
    steps = train(task, watch, options.steps, fault, options.fault_step)
    with view.shown(monitor):
        for step in paced(steps, options.step_seconds):
            view.step(monitor, step + 1)
            if stopping():
                return
        watch.flush()


def _setting(options: Options, recording: Path, stopped: str | None) -> Setting:
    fault = FAULTS.get(options.fault)
    return Setting(
        fault=None if fault is None else fault.sentence,
        expects=None if fault is None else fault.kind,
        fault_step=options.fault_step,
        policy=Path(options.policy.source).name,
        recording=recording,
        stopped=stopped,
    )
