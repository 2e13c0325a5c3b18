"""Log lines that cannot hurt the loop they are written from."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

__all__ = ["one_line", "say"]

_logger = logging.getLogger("gradwatch")


def say(level: int, message: str, *args: object, exc_info: Any = None) -> None:
    """Logs; a handler that raises is not a reason to end a training run.

    Where nobody has set up logging, Python prints the bare message: it says itself then who speaks.
    """
    with contextlib.suppress(Exception):
        if not _logger.hasHandlers():
            message = f"gradwatch {logging.getLevelName(level).lower()}: {message}"
        _logger.log(level, message, *args, exc_info=exc_info)


def one_line(text: str) -> str:
    """Text from outside on one line: other control characters than white space are replaced."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
