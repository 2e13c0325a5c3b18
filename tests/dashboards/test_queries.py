"""Every query of every dashboard: it parses, names what is exported, and finds something."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import promql_parser as promql
import pytest

from gradwatch.dashboards import build_dashboards
from gradwatch.dashboards.promql import metric_of, selecting
from gradwatch.export.metrics import AGENT_METRICS, END_METRICS, METRICS, MetricSpec

FROM_PROMETHEUS = {"job", "instance", "run", "rank"}
OF_TARGETS = {"job", "instance"}
OF_PROMETHEUS = {"up", "scrape_duration_seconds", "scrape_samples_post_metric_relabeling"}
OF_ALERTS = FROM_PROMETHEUS | {"alertname", "alertstate", "severity"}


def _nodes(query: promql.Expr, kind: type) -> Iterator[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(query, lambda node: found.append(node) or True)
    for node in found:
        if isinstance(node, kind):
            yield node
        if isinstance(node, promql.MatrixSelector) and kind is promql.VectorSelector:
            yield node.vector_selector


def _labels_of(series: str) -> set[str]:
    if series == "ALERTS":
        return OF_ALERTS
    if series in OF_PROMETHEUS:
        return OF_TARGETS
    if metric_of(series).name in AGENT_METRICS:
        return OF_TARGETS | set(metric_of(series).labels)
    own = set(metric_of(series).labels)
    return FROM_PROMETHEUS | own | ({"le"} if series.endswith("_bucket") else set())


def test_every_query_parses(queries: dict[str, str]) -> None:
    for where, query in queries.items():
        try:
            promql.parse(query)
        except ValueError as error:
            pytest.fail(f"{where}: {error}\n{query}")


def test_every_series_is_exported_and_has_the_labels_that_select_it(
    queries: dict[str, str],
) -> None:
    for where, query in queries.items():
        for selector in _nodes(promql.parse(query), promql.VectorSelector):
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= _labels_of(selector.name), where


def test_every_aggregation_groups_by_labels_that_its_series_have(queries: dict[str, str]) -> None:
    for where, query in queries.items():
        for aggregate in _nodes(promql.parse(query), promql.AggregateExpr):
            if aggregate.modifier is None:
                continue
            for selector in _nodes(aggregate.expr, promql.VectorSelector):
                assert set(aggregate.modifier.labels) <= _labels_of(selector.name), where


def test_every_selector_carries_the_chosen_job_and_run(queries: dict[str, str]) -> None:
    for where, query in queries.items():
        for selector in _nodes(promql.parse(query), promql.VectorSelector):
            chosen = {matcher.name for matcher in selector.matchers.matchers}
            has_run = "run" in _labels_of(selector.name)
            assert ({"job", "run"} if has_run else {"job"}) <= chosen, where


def test_every_metric_of_the_table_is_shown_on_some_dashboard() -> None:
    text = " ".join(build_dashboards().values())
    shown = {metric_of(name).name for name in re.findall(r"\bgradwatch_\w+(?=\{)", text)}
    assert shown == set(METRICS) | set(AGENT_METRICS) | set(END_METRICS)


def test_counters_are_never_shown_as_they_stand(queries: dict[str, str]) -> None:
    for where, query in queries.items():
        tree = promql.parse(query)
        ranged = {node.vector_selector.name for node in _nodes(tree, promql.MatrixSelector)}
        for selector in _nodes(tree, promql.VectorSelector):
            if selector.name.endswith(("_total", "_bucket")):
                assert selector.name in ranged, where


LABEL_VALUES = {
    "layer": ("x", "head"),
    "rule": ("global", "embedding"),
    "event": ("exploding", "rank_outlier", "spike"),
    "level": ("alert",),
    "state": ("running", "finished", "stopped", "crashed"),
    "mode": ("enforce",),
}


def _series_of(spec: MetricSpec, rank: int) -> Iterator[str]:
    endings = {"histogram": ("_bucket", "_sum", "_count")}.get(spec.type, ("",))
    labels = [f'job="j",instance="i:{rank}",run="r",rank="{rank}"']
    for name in spec.labels:
        labels = [
            f'{one},{name}="{value}"' for one in labels for value in LABEL_VALUES.get(name, ("v",))
        ]
    for ending in endings:
        edges = ("0.1", "+Inf") if ending == "_bucket" else (None,)
        for one in labels:
            for edge in edges:
                yield f"{spec.full_name}{ending}{{{one}" + (f',le="{edge}"}}' if edge else "}")


def _a_run_of_two_ranks() -> list[dict[str, str]]:
    series = [
        one
        for spec in (*METRICS.values(), *END_METRICS.values())
        for rank in ((0,) if "layer" in spec.labels else (0, 1))
        for one in _series_of(spec, rank)
    ]
    alert = 'alertname="GradwatchX",alertstate="firing",severity="critical"'
    series.append(f'ALERTS{{{alert},job="j",run="r"}}')
    for rank in (0, 1):
        series += [f'{name}{{job="j",instance="i:{rank}"}}' for name in sorted(OF_PROMETHEUS)]
    for spec in AGENT_METRICS.values():
        own = "".join(f',{name}="{LABEL_VALUES.get(name, ("v",))[0]}"' for name in spec.labels)
        series.append(f'{spec.full_name}{{job="j",instance="node:8050"{own}}}')
    return [{"series": one, "values": "1+1x400"} for one in series]


@pytest.mark.servers
def test_every_query_finds_something_in_a_run_of_two_ranks(
    queries: dict[str, str], promtool: Callable[..., None], tmp_path: Path
) -> None:
    found = {"labels": "{}", "value": 1}
    asked = [
        {"expr": f"count(({query})) > bool 0", "eval_time": "60m", "exp_samples": [found]}
        for query in queries.values()
    ]
    test = {"interval": "15s", "input_series": _a_run_of_two_ranks(), "promql_expr_test": asked}
    (tmp_path / "queries.yml").write_text(json.dumps({"tests": [test]}))
    promtool("test", "rules", tmp_path / "queries.yml")


def test_the_selection_stands_before_a_querys_own_matchers() -> None:
    assert selecting('sum(rate(gradwatch_events_total{event="spike"}[5m]))') == (
        'sum(rate(gradwatch_events_total{job=~"$job",run=~"$run",rank=~"$rank",event="spike"}[5m]))'
    )


def test_a_layers_series_are_not_narrowed_to_a_rank_because_rank_0_alone_has_them() -> None:
    assert selecting("gradwatch_grad_norm") == 'gradwatch_grad_norm{job=~"$job",run=~"$run"}'


@pytest.mark.parametrize(
    "name",
    ["gradwatch_grad_norms", "gradwatch_total_norm_bucket", "gradwatch_step_duration_seconds"],
    ids=["unknown", "bucket of a gauge", "histogram without its part"],
)
def test_a_series_that_is_not_exported_is_refused_by_name(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        selecting(f"max({name})")
