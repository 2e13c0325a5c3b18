"""What becomes of an error of gradwatch itself: counted, said once, and training goes on."""

from __future__ import annotations

import logging
import sys

from gradwatch.saying import say
from gradwatch.tally import Tally

__all__ = ["Reporter"]


class Reporter:
    """Counts the errors of gradwatch itself and logs each kind once."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._logged: set[tuple[str, str]] = set()

    def __call__(self, component: str) -> None:
        """Called where an exception is handled; its traceback is logged the first time."""
        self._tally.hook_error(component)
        error = sys.exc_info()[1]
        kind = (component, type(error).__name__)
        if kind in self._logged:
            return
        self._logged.add(kind)
        say(
            logging.ERROR,
            "gradwatch failed to do its %s (%s: %s); training goes on, and further failures of "
            "this kind are counted in gradwatch_hook_errors_total only",
            component, type(error).__name__, error, exc_info=error,
        )  # fmt: skip
