"""`gradwatch demo`: the command line's edge of a run, and the loop around many.

torch is imported when a run begins, so that `gradwatch --help` is quick.
"""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradwatch.errors import GradwatchError
from gradwatch.policy import load_policy
from gradwatch.recording.finding import FOLDER

__all__ = ["POLICY", "demo"]

POLICY = Path(__file__).with_name("policy.yaml")
"""The policy of the README."""

STEPS = 600
LEAST_STEPS = 240
"""The fault comes at half of them; with fewer the norm has not settled by then."""

WATCHABLE_SECONDS = 0.04
"""A live run takes at least that long a step, so that there is something to see."""

LOOP_SECONDS = 0.25
"""With --loop: at the pace at which monitoring looks."""


class Model(StrEnum):
    """What is trained."""

    digits = "digits"
    gpt = "gpt"


class FaultName(StrEnum):
    """What breaks at half of the run."""

    lr = "lr"
    nan = "nan"
    loss = "loss"
    dead = "dead"
    none = "none"


def demo(
    model: Annotated[
        Model, typer.Option(help="A CNN on handwritten digits, or a GPT on Python's own source.")
    ] = Model.digits,
    fault: Annotated[
        FaultName,
        typer.Option(
            help="What breaks at half of the run: the learning rate (x100 for 4 steps), one NaN in "
            "a batch, the loss (x1000 for 10 steps), a layer that falls silent, or nothing."
        ),
    ] = FaultName.lr,
    policy: Annotated[
        Path,
        typer.Option(metavar="FILE", show_default="the one in the README", help="The policy file."),
    ] = POLICY,
    steps: Annotated[
        int, typer.Option(min=LEAST_STEPS, metavar="N", help=f"At least {LEAST_STEPS}.")
    ] = STEPS,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of weights and batches.")] = 0,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", envvar="GRADWATCH_HOST", help="Where metrics are served."),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="The next free one where it is taken."),
    ] = 9464,
    recording: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the recording goes.")
    ] = Path(FOLDER),
    discovery: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="GRADWATCH_DISCOVERY",
            help="Where Prometheus reads targets from (file_sd).",
        ),
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            show_default=f"{WATCHABLE_SECONDS} live, {LOOP_SECONDS} with --loop, else 0",
            help="The least time that a step takes.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Lines instead of the live view; so is any output that is no terminal."
        ),
    ] = False,
    loop: Annotated[
        bool,
        typer.Option("--loop", help="Run again and again until stopped; every fourth run breaks."),
    ] = False,
) -> None:
    """Trains a small model, breaks it halfway, and shows what gradwatch saw.

    Exit codes: 0 it saw what was broken and nothing else; 1 it did not;
    2 wrong arguments or policy; 130 interrupted.
    """
    _require_packages()
    loaded = load_policy(policy)
    from gradwatch.demo.outcome import forever, once
    from gradwatch.demo.session import Options

    console = Console()
    plain = plain or not console.is_terminal
    if step_seconds is None:
        step_seconds = LOOP_SECONDS if loop else 0.0 if plain else WATCHABLE_SECONDS
    options = Options(
        model=model.value,
        fault=fault.value,
        policy=loaded,
        steps=steps,
        seed=seed,
        host=host,
        port=port,
        recording=recording,
        discovery=discovery,
        step_seconds=step_seconds,
        plain=plain,
    )
    raise typer.Exit(forever(options, console) if loop else once(options, console))


def _require_packages() -> None:
    missing = [name for name in ("torch", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise GradwatchError(
            f"the demo needs {' and '.join(missing)}: pip install 'gradwatch[torch,demo]'"
        )
