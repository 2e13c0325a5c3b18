"""`gradwatch serve`: from options to an endpoint, until somebody asks it to stop."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.export.addresses import is_loopback, listening
from gradwatch.export.endpoint import Endpoint
from gradwatch.serve.agent import Agent
from gradwatch.stopping import stoppable

__all__ = ["serve", "serve_command"]

PORT = 8050
LOOK_SECONDS = 1.0
DOZE_SECONDS = 0.1
"""How soon a signal is heard."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def serve_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Where recordings are, there or one level below.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes any free one and says which.")
    ] = PORT,
    host: Annotated[
        str, typer.Option(help="The address that is listened on; there is no login.")
    ] = "127.0.0.1",
    keep: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long an ended run is shown: 90s, 1h, 2d."),
    ] = "1h",
) -> None:
    """Serves one /metrics for the recordings of all runs and ranks in a directory.

    For Prometheus to scrape one target per machine. Runs may begin, end and die meanwhile. It
    reads what they record and has no part in them.
    """
    seconds = _seconds(keep)
    try:
        listener = listening(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(
            f"cannot listen on {host}:{port} ({reason}). Choose another one",
            param_hint="'--port' or '--host'",
        ) from error
    agent = Agent(directory, keep_seconds=seconds, tell=_tell)
    endpoint = Endpoint(
        agent.render,
        health=agent.health,
        title=str(directory),
        page=agent.page,
        on_error=agent.failed,
        listener=listener,
    )
    if not is_loopback(listener.getsockname()[0]):
        _tell("this address is open to others, and there is no login")
    with stoppable() as stop:
        print(f"serving {directory} at {endpoint.url}; Ctrl-C stops", flush=True)
        serve(agent, stop)
    endpoint.close()


def serve(agent: Agent, stop: Callable[[], bool]) -> None:
    """Looks for news once a second until it is told to stop."""
    while not stop():
        more = agent.look()
        next_look = time.monotonic() + (DOZE_SECONDS / 100 if more else LOOK_SECONDS)
        while not stop() and (left := next_look - time.monotonic()) > 0:
            time.sleep(min(left, DOZE_SECONDS))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else math.nan
    if not math.isfinite(seconds):
        raise typer.BadParameter(
            f"expected a number with s, m, h or d, such as 1h. Received: {text!r}",
            param_hint="'--keep'",
        )
    return seconds
