"""`gradwatch dashboards check` and `gradwatch rules check`: is what a team relies on there?"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gradwatch.dashboards.alert import THRESHOLDS
from gradwatch.dashboards.check import Answer, Window, check_dashboard, read_dashboards
from gradwatch.dashboards.prometheus import Prometheus
from gradwatch.dashboards.rules import rule_groups
from gradwatch.export.urls import FAILURES, ServerUrl

__all__ = ["check_dashboards_command", "check_rules_command"]

PrometheusUrl = Annotated[
    str, typer.Option("--prometheus", metavar="URL", help="The Prometheus that scrapes the runs.")
]
READY_SECONDS = 5.0
_MARKS = {"data": "ok   ", "needs": "-    ", "empty": "EMPTY", "error": "ERROR"}


def check_dashboards_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="With dashboards as JSON files.")
    ] = Path("dashboards"),
    prometheus: PrometheusUrl = "http://127.0.0.1:9090",
    hours: Annotated[
        float, typer.Option(min=0.01, metavar="HOURS", help="How far back panels look.")
    ] = 1.0,
    scrape_interval: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="How often Prometheus scrapes the runs."),
    ] = 15.0,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail on what is empty because no run here has a loss scaler, several ranks or "
            "whatever else its metric needs.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="A line for each query, not only for what fails."),
    ] = False,
) -> None:
    """Asks every query of every dashboard of a real Prometheus.

    Exit codes: 0 all have data; 1 a query has none or is refused; 2 Prometheus does not answer.
    """
    server = Prometheus(prometheus)
    window = Window(end=time.time(), seconds=hours * 3600, scrape_seconds=scrape_interval)
    bad = False
    for name, dashboard in read_dashboards(directory).items():
        answers = list(check_dashboard(dashboard, server, window))
        failed = [one for one in answers if one.status in _failing(strict)]
        needing = sum(one.status == "needs" for one in answers)
        print(
            f"{name}: {len(answers)} queries, {sum(one.status == 'data' for one in answers)} with "
            f"data, {needing} without what they need, {len(failed)} failed"
        )
        for one in answers:
            if verbose or one in failed:
                print(_line(one))
        bad = bad or bool(failed)
    if bad:
        raise typer.Exit(1)


def _failing(strict: bool) -> tuple[str, ...]:
    return ("empty", "error", "needs") if strict else ("empty", "error")


def _line(answer: Answer) -> str:
    detail = {
        "data": f"{answer.series} series",
        "needs": f"empty; needs {answer.detail}",
        "empty": answer.detail or "no data",
        "error": answer.detail,
    }[answer.status]
    said = f"  {_MARKS[answer.status]} {answer.panel} {answer.ref}: {detail}"
    if answer.status == "data":
        return said
    query = " ".join(answer.query.split())
    return f"{said}\n        {query}"


def check_rules_command(prometheus: PrometheusUrl = "http://127.0.0.1:9090") -> None:
    """Asks a real Prometheus whether it has the rules, evaluates them, and tells an Alertmanager.

    Rules with thresholds of your own are told as changed, which is no failure.

    Exit codes: 0 all there and well; 1 a rule is missing or fails, or no Alertmanager answers;
    2 Prometheus does not answer.
    """
    server = Prometheus(prometheus)
    loaded: dict[str, list[dict[str, Any]]] = {}
    for rule in server.rules():
        loaded.setdefault(rule["name"], []).append(rule)
    counts = {"ok": 0, "changed": 0}
    failed = 0
    for group in rule_groups(THRESHOLDS)["groups"]:
        for wanted in group["rules"]:
            name = wanted.get("alert") or wanted["record"]
            problem = _problem(name, loaded.get(name, []))
            if problem:
                failed += 1
                print(f"  {problem}")
            elif _same(server, wanted["expr"], loaded[name][0]["query"]):
                counts["ok"] += 1
            else:
                counts["changed"] += 1
                print(f"  changed {name}: another expression than this version writes")
    told = server.alertmanagers()
    if not told:
        failed += 1
        print("  MISSING Alertmanager: Prometheus sends alerts to none; see alerting: in its file")
    for address in told:
        if not _is_ready(address):
            failed += 1
            print(f"  SILENT  Alertmanager {address}: does not answer here; is it running?")
    print(
        f"{prometheus}: {counts['ok']} rules as written, {counts['changed']} changed, "
        f"{failed} failed; alerts go to {len(told)} Alertmanager{'' if len(told) == 1 else 's'}"
    )
    if failed:
        raise typer.Exit(1)


def _problem(name: str, found: list[dict[str, Any]]) -> str:
    if not found:
        return f"MISSING {name}: is its file among rule_files?"
    if len(found) > 1:
        return f"TWICE   {name}: loaded {len(found)} times, so it would page as often"
    if found[0]["health"] == "err":
        return f"ERROR   {name}: {found[0].get('lastError', 'evaluation fails')}"
    return ""


def _is_ready(alertmanager: str) -> bool:
    """Whether the Alertmanager with this address of its API answers here."""
    try:
        base = ServerUrl.of(re.sub(r"/api/v\d+/alerts$", "", alertmanager), "the Alertmanager")
        base.ask("/-/ready", seconds=READY_SECONDS)
    except FAILURES:
        return False
    return True


def _same(server: Prometheus, wanted: str, loaded: str) -> bool:
    """Both as Prometheus writes them, without spaces."""
    return re.sub(r"\s", "", server.formatted(wanted)) == re.sub(
        r"\s", "", server.formatted(loaded)
    )
