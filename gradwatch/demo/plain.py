"""The view for files and pipes: a line every tenth of the run, and what gradwatch logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console

from gradwatch.demo.monitor import RECENT, Monitor
from gradwatch.records import StepRecord

__all__ = ["PlainView", "View", "logged_to", "say"]


class View(Protocol):
    """Shows a run while it goes on."""

    def shown(self, monitor: Monitor) -> AbstractContextManager[None]: ...

    def step(self, monitor: Monitor, done: int) -> None:
        """After each step; `done` of them are."""


class PlainView:
    """Prints lines and never takes one back."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title

    def shown(self, monitor: Monitor) -> AbstractContextManager[None]:
        watch = monitor.watch
        say(self._console, self._title)
        say(self._console, f"metrics at {watch.url}, recording to {watch.recording}")
        return nullcontext()

    def step(self, monitor: Monitor, done: int) -> None:
        due = done % max(monitor.num_steps // 10, 1) == 0 or done == monitor.num_steps
        if due or done - monitor.done >= RECENT:
            monitor.update(done)
        if due and monitor.latest is not None:
            say(self._console, _status(monitor, monitor.latest))


def _status(monitor: Monitor, latest: StepRecord) -> str:
    return (
        f"step {monitor.done}/{monitor.num_steps}"
        f"  loss {latest.scalars.get('loss', float('nan')):.4g}"
        f"  total norm {latest.total_norm:.4g}"
        f"  clipped {monitor.share_clipped():.0%} of last {len(monitor.recent)}"
    )


def say(console: Console, text: str, style: str | None = None) -> None:
    """One line as it is: no markup, no wrapping, so that paths and commands can be copied."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        say(self._console, self.format(record), style)


@contextmanager
def logged_to(console: Console) -> Iterator[None]:
    """Shows what gradwatch logs, as the log of a training run would."""
    logger = logging.getLogger("gradwatch")
    handler = _ConsoleHandler(console)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
