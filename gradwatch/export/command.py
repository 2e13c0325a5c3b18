"""`gradwatch forget`: a thin edge around what is at a Pushgateway."""

from __future__ import annotations

import os
import re
import time
from typing import Annotated

import typer

from gradwatch.errors import GradwatchError
from gradwatch.export.pushgateway import delete, left_behind
from gradwatch.export.urls import ServerUrl

__all__ = ["forget_command"]

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def forget_command(
    run: Annotated[
        str | None, typer.Argument(help="A run, all of its ranks.", show_default=False)
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only what was pushed that long ago, e.g. 7d or 12h."),
    ] = None,
    pushgateway: Annotated[
        str | None,
        typer.Option(metavar="URL", help="By default GRADWATCH_PUSHGATEWAY.", show_default=False),
    ] = None,
) -> None:
    """Deletes what runs that have ended left at a Pushgateway, and names it.

    What was pushed never goes stale by itself. Give a run, or an age, or both.
    """
    if run is None and older_than is None:
        raise GradwatchError("forget: give a RUN, or --older-than, or both")
    before = time.time() - (0.0 if older_than is None else _seconds(older_than))
    server = _server(pushgateway)
    try:
        for group in left_behind(server):
            if run in (None, group.run) and group.pushed <= before:
                delete(server, group)
                print(f"{group.job} {group.run} rank {group.rank}")
    except OSError as error:
        raise GradwatchError(f"the Pushgateway {server} cannot be asked: {error}") from error


def _server(given: str | None) -> ServerUrl:
    address = given or os.environ.get("GRADWATCH_PUSHGATEWAY")
    if not address:
        raise GradwatchError("forget: give --pushgateway, or set GRADWATCH_PUSHGATEWAY")
    try:
        return ServerUrl.of(address, "pushgateway")
    except ValueError as error:
        raise GradwatchError(str(error)) from error


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if found is None:
        raise GradwatchError(f"--older-than must be a time such as 7d or 12h. Received: {text!r}")
    return int(found[1]) * UNITS[found[2]]
