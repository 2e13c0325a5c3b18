"""The command line: each command a thin edge around a function of the library.

Exit codes: 0 done, 1 a demo that did not show what it should, or output that nobody took,
2 a mistake in arguments or input, said in one line each on stderr.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer

from gradwatch.dashboards.command import dashboards, rules
from gradwatch.demo.command import demo
from gradwatch.errors import GradwatchError
from gradwatch.export.command import forget_command
from gradwatch.grafana.command import push_command
from gradwatch.page.command import report_command
from gradwatch.policy import load_policy
from gradwatch.policy.schema import schema_text
from gradwatch.policy.sentences import sentences
from gradwatch.progress import shown_recording
from gradwatch.recording.export import export_recording
from gradwatch.serve.command import serve_command
from gradwatch.top import top_command
from gradwatch.whatif.command import advise_command, replay_command
from gradwatch.whatif.tune_command import tune_command

__all__ = ["app", "commands"]

# click's, wherever this version of typer keeps it.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

commands = typer.Typer(
    help="A gradient norm you can trust: watch, clip by policy, record, alert.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
commands.command()(demo)
commands.command("replay")(replay_command)
commands.command("advise")(advise_command)
commands.command("report")(report_command)
commands.command("tune")(tune_command)
commands.command("serve")(serve_command)
commands.command("forget")(forget_command)
commands.command("top")(top_command)
dashboards.command("push")(push_command)
commands.add_typer(dashboards, name="dashboards")
commands.add_typer(rules, name="rules")


def app(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command; without any, prints the help."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = typer.main.get_command(commands)(given, prog_name="gradwatch", standalone_mode=False)
    except GradwatchError as error:
        _refuse(str(error))
    except UsageError as error:
        _refuse(_usage(error))
    except OSError as error:
        if error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _usage(error: Exception) -> str:
    """`gradwatch demo: No such option: --stepz (see gradwatch demo --help)`"""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "gradwatch"
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    return f"{path}: {message} (see {path} --help)"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("gradwatch"))
        raise typer.Exit


@commands.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """A gradient norm you can trust: watch, clip by policy, record, alert."""


@commands.command()
def check(
    policy: Annotated[Path, typer.Argument(help="A policy file.", show_default=False)],
) -> None:
    """Says a policy back in words, or every mistake in it with its line.

    What depends on the model, such as a selector that matches nothing, is checked where the policy
    is attached.
    """
    loaded = load_policy(policy)
    print(f"{policy}: version {loaded.version}, sha256 {loaded.sha256}")
    for sentence in sentences(loaded):
        print(f"  {sentence}")


@commands.command()
def explain(
    policy: Annotated[Path, typer.Argument(help="A policy file.", show_default=False)],
) -> None:
    """Prints a policy with its presets written out, as a policy file that means the same.

    What it does stands above it in words.
    """
    loaded = load_policy(policy)
    print(f"# {policy}, explained: version {loaded.version}, sha256 {loaded.sha256}")
    for sentence in sentences(loaded):
        print(f"#   {sentence}")
    print(loaded.canonical_yaml(), end="")


class Format(StrEnum):
    """What a recording is exported to."""

    csv = "csv"
    parquet = "parquet"


@commands.command()
def export(
    recording: Annotated[
        Path,
        typer.Argument(help="A recording, or a directory of them: its newest.", show_default=False),
    ],
    format: Annotated[
        Format, typer.Option("--format", help="Parquet needs a file to go to.")
    ] = Format.csv,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of stdout.")
    ] = None,
    no_layers: Annotated[
        bool, typer.Option("--no-layers", help="Leave out the norm of each layer.")
    ] = False,
) -> None:
    """Writes a recording as a table: one row a step.

    The norm of a layer is the column grad_norm/LAYER, what was logged is scalar/NAME.
    """
    with shown_recording(recording) as shown:
        export_recording(shown, output or sys.stdout, format.value, layers=not no_layers)


@commands.command()
def schema() -> None:
    """Prints the JSON Schema of policy files, for editors."""
    print(schema_text(), end="")
