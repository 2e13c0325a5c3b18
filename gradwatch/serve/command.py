"""`gradwatch serve`: from options to the live page and /metrics, until somebody asks it to stop."""

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
from gradwatch.recording.finding import FOLDER, MADE
from gradwatch.serve.agent import Agent
from gradwatch.serve.front import Front, pages_of
from gradwatch.stopping import stoppable

__all__ = ["serve", "serve_command"]

PORT = 8050
LOOK_SECONDS = 1.0
DOZE_SECONDS = 0.1
"""How soon a signal is heard."""

TOKEN = r"[A-Za-z0-9._-]{16,200}"
PATIENCE_SECONDS = 5.0
"""For which the metrics may fall behind while a page is made."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def serve_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Where recordings are, there or one level below.",
        ),
    ] = Path(FOLDER),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 takes any free one and says which.")
    ] = PORT,
    host: Annotated[
        str, typer.Option(help="The address that is listened on; see --token for others' access.")
    ] = "127.0.0.1",
    keep: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long an ended run is shown: 90s, 1h, 2d."),
    ] = "1h",
    token: Annotated[
        str,
        typer.Option(
            envvar="GRADWATCH_TOKEN",
            show_default=False,
            help="Asked of everybody who wants the page or the metrics. The environment variable "
            "is the better place: a command line can be seen by others.",
        ),
    ] = "",
) -> None:
    """Serves a live page and one /metrics for the recordings of all runs in a directory.

    The page shows every recording there, live or ended; it needs the extra "page".

    The metrics are for Prometheus to scrape one target per machine. Runs may begin, end and die
    meanwhile: it reads what they record and has no part in them.
    """
    if not directory.is_dir():
        raise typer.BadParameter(
            f"{directory} does not exist, or is no directory. {MADE}", param_hint="'DIR'"
        )
    seconds = _seconds(keep)
    if token and not re.fullmatch(TOKEN, token):
        raise typer.BadParameter(
            "expected 16 to 200 letters, digits, dots, dashes and underscores, such as "
            "python -c 'import secrets; print(secrets.token_urlsafe())' prints",
            param_hint="'--token'",
        )
    try:
        listener = listening(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(
            f"cannot listen on {host}:{port} ({reason}). Choose another one",
            param_hint="'--port' or '--host'",
        ) from error
    agent = Agent(directory, keep_seconds=seconds, tell=_tell)
    pages = pages_of(directory, agent.failed)
    is_local = is_loopback(listener.getsockname()[0])
    front = Front(pages, agent_page=agent.page, token=token, compress=not is_local)
    endpoint = Endpoint(
        agent.render,
        health=agent.health,
        title=str(directory),
        page=agent.page,
        beside=front.answer,
        on_error=agent.failed,
        listener=listener,
    )
    if pages is None:
        _tell("metrics only: the page needs pip install 'gradwatch[page]'")
    if not (is_local or token):
        _tell("this address is open to others, and no token is asked for (--token)")
    with stoppable() as stop:
        print(f"serving {directory} at {endpoint.url}; Ctrl-C stops", flush=True)
        if pages is not None:
            print(f"the page is at http://{endpoint.authority}/", flush=True)
        serve(agent, stop, busy=lambda: front.busy)
    endpoint.close()
    front.close()


def serve(agent: Agent, stop: Callable[[], bool], busy: Callable[[], bool] = lambda: False) -> None:
    """Looks for news once a second until it is told to stop.

    Args:
        busy: whether somebody waits for a page, who goes first: reading a long recording for the
            first time takes all of a core for seconds.
    """
    while not stop():
        until = time.monotonic() + PATIENCE_SECONDS
        while busy() and not stop() and time.monotonic() < until:
            time.sleep(DOZE_SECONDS / 10)
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
