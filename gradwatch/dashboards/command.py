"""`gradwatch dashboards` and `gradwatch rules`: the command line's edge of this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwatch.dashboards import (
    RUNBOOK_URL,
    Thresholds,
    build_rules,
    prometheus_rule,
    write_dashboards,
)
from gradwatch.dashboards.check_command import check_dashboards_command, check_rules_command

__all__ = ["dashboards", "rules"]

dashboards = typer.Typer(help="Grafana dashboards.")
rules = typer.Typer(help="Prometheus recording and alert rules.")
dashboards.command("check")(check_dashboards_command)
rules.command("check")(check_rules_command)

RunbookUrl = Annotated[str, typer.Option(metavar="URL", help="Where the links to the runbook go.")]
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Thresholds)}


@dashboards.command()
def build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if need be.")],
    runbook_url: RunbookUrl = RUNBOOK_URL,
) -> None:
    """Writes the dashboards as JSON files for Grafana, and names them."""
    for path in write_dashboards(directory, runbook_url=runbook_url):
        print(path)


class Format(StrEnum):
    """What the rules are written for."""

    prometheus = "prometheus"
    kubernetes = "kubernetes"


@rules.command()
def render(
    format: Annotated[
        Format,
        typer.Option("--format", help="A rule file, or a PrometheusRule for the operator."),
    ] = Format.prometheus,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of stdout.")
    ] = None,
    runbook_url: RunbookUrl = RUNBOOK_URL,
    grafana_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where Grafana is: each alert then links to it."),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="May be given several times. "
            + ", ".join(f"{name}={value:g}" for name, value in _DEFAULTS.items())
            + ".",
        ),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the PrometheusRule.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Of the PrometheusRule, as your operator looks for: release=prometheus.",
        ),
    ] = None,
) -> None:
    """Prints the rules for Prometheus."""
    thresholds = _thresholds(threshold or ())
    if format is Format.kubernetes:
        text = prometheus_rule(
            thresholds,
            runbook_url=runbook_url,
            grafana_url=grafana_url,
            namespace=namespace,
            labels=dict(_pair(one, "--label") for one in label or ()),
        )
    elif namespace is not None or label:
        raise typer.BadParameter("--namespace and --label are for --format kubernetes")
    else:
        built = build_rules(thresholds, runbook_url=runbook_url, grafana_url=grafana_url)
        text = "".join(built.values())
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"{option} must be NAME=VALUE. Received: {text!r}")
    return name, value


def _thresholds(given: Iterable[str]) -> Thresholds:
    changed: dict[str, Any] = {}
    for text in given:
        name, value = _pair(text, "--threshold")
        if name not in _DEFAULTS:
            raise typer.BadParameter(
                f"--threshold must name one of {', '.join(_DEFAULTS)}. Received: {name!r}"
            )
        changed[name] = _number(name, value, whole=isinstance(_DEFAULTS[name], int))
    return dataclasses.replace(Thresholds(), **changed)


def _number(name: str, value: str, *, whole: bool) -> float:
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        kind = "a whole number" if whole else "a number"
        raise typer.BadParameter(f"--threshold {name} must be {kind} above 0. Received: {value!r}")
    return number
