"""A terminal in, the keys that are typed out, without an echo and without Enter."""

from __future__ import annotations

import importlib.util
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["typed_keys"]

Typed = Callable[[float], str]
"""Waits so many seconds at most for a key; what was typed, or nothing."""


@contextmanager
def typed_keys() -> Iterator[Typed | None]:
    """None where stdin is no terminal, or not ours to read from, as in the background."""
    terminal = _terminal()
    if terminal is None:
        yield None
        return
    import termios

    before = termios.tcgetattr(terminal)
    modes = termios.tcgetattr(terminal)
    modes[3] &= ~(termios.ECHO | termios.ICANON)
    modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(terminal, termios.TCSANOW, modes)

    def typed(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        with suppress(OSError):
            if keys := os.read(terminal, 1024):
                return keys.decode(errors="replace")
        time.sleep(seconds)  # a terminal that is gone is always ready
        return ""

    try:
        yield typed
    finally:
        with suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _terminal() -> int | None:
    if importlib.util.find_spec("termios") is None:  # Windows
        return None
    try:
        if sys.stdin is None or not sys.stdin.isatty():
            return None
        terminal = sys.stdin.fileno()
    except (OSError, ValueError):
        return None
    # Of one that does not control this process there is no foreground.
    with suppress(OSError):
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return None
    return terminal
