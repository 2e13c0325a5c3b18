"""`gradwatch report`: words on the terminal, or a file for others: HTML, Markdown, PNG."""

from __future__ import annotations

import importlib.util
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.errors import GradwatchError
from gradwatch.recording.reader import open_recording
from gradwatch.report.choosing import Named, chosen
from gradwatch.report.command import print_report
from gradwatch.saying import one_line

__all__ = ["report_command"]


class Format(StrEnum):
    """What a report is."""

    text = "text"
    html = "html"
    md = "md"
    png = "png"


SUFFIXES = {".html": Format.html, ".htm": Format.html, ".md": Format.md, ".png": Format.png,
            ".txt": Format.text}  # fmt: skip


def report_command(
    recording: Named = None,
    last_anomaly: Annotated[
        bool,
        typer.Option(
            "--last-anomaly",
            help="The whole card of the last alert; without one, of the last warning.",
        ),
    ] = False,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="The cards of step N.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="report.html, report.md or report.png.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            show_default="by the name of FILE, else text",
            help="html: one file with figures that works anywhere; md: for an issue tracker; png: "
            "the beginning of the html, drawn by a browser that is installed.",
        ),
    ] = None,
    browser: Annotated[
        str, typer.Option(metavar="PROGRAM", help="For png.", show_default="the first one found")
    ] = "",
) -> None:
    """Says what went wrong in a run: which layer, since when, what was done, what to do.

    On the terminal; with -o as a file to keep or to send, which needs the extra "page". Of a
    directory the run is taken that started last.
    """
    wanted = format or _by_name(output)
    if wanted is Format.text:
        if output is not None:
            raise typer.BadParameter("text goes to stdout", param_hint="'--output'")
        print_report(_chosen(recording), last_anomaly=last_anomaly, step=step)
        return
    if last_anomaly or step is not None:
        raise typer.BadParameter("goes with text only", param_hint="'--last-anomaly' or '--step'")
    if output is None and wanted is not Format.md:
        raise typer.BadParameter(f"{wanted} needs a file: -o report.{wanted}",
                                 param_hint="'--format'")  # fmt: skip
    missing = [name for name in ("bokeh", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise GradwatchError(
            f"this report needs {' and '.join(missing)}: pip install 'gradwatch[page]'"
        )
    _write(_chosen(recording), wanted, output, browser)


def _chosen(recording: Path | None) -> Path:
    path, which = chosen(recording)
    if which:
        print(f"{one_line(str(path))}: {which}", file=sys.stderr)
    return path


def _write(recording: Path, wanted: Format, output: Path | None, browser: str) -> None:
    from gradwatch.page.picture import take_picture
    from gradwatch.page.report import html_report, markdown_report

    with open_recording(recording) as opened:
        path = opened.path
    if output is None:
        print(markdown_report(path), end="")
        return
    if wanted is Format.png:
        take_picture(html_report(path, still=True), output, browser)
    else:
        made = html_report(path) if wanted is Format.html else markdown_report(path)
        output.write_text(made, encoding="utf-8", errors="replace")
    print(output)


def _by_name(output: Path | None) -> Format:
    if output is None:
        return Format.text
    found = SUFFIXES.get(output.suffix.lower())
    if found is None:
        raise typer.BadParameter(
            f"expected a name that ends in .html, .md or .png, or --format. Received: {output}",
            param_hint="'--output'",
        )
    return found
