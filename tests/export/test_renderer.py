"""Our own renderer says what prometheus_client would say, and a parser reads it back."""

from __future__ import annotations

import math
import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from gradwatch.export.collector import TallyCollector
from gradwatch.export.exporter import content_type
from gradwatch.export.metrics import METRICS
from gradwatch.export.renderer import OPENMETRICS, TEXT, Renderer

FORMS = {TEXT: (read_text, generate_latest), OPENMETRICS: (read_openmetrics, generate_openmetrics)}

any_name = st.text(min_size=1, max_size=20)
names_from_outside = st.lists(any_name, min_size=1, max_size=5, unique=True)


def samples(text: str, form: str) -> dict:
    """Each series with its value and exemplar; NaN compares equal."""
    read, _ = FORMS[form]
    found = {}
    for family in read(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"twice: {key}"
            found[key] = (family.type, repr(float(sample.value)), repr(sample.exemplar))
    return found


def rendered(tally, form: str = TEXT, **options) -> str:
    return Renderer(tally.info, **options).render(tally.snapshot(), form).decode()


def by_the_client(tally, form: str, **options) -> str:
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally, **options))
    return FORMS[form][1](registry).decode()


@pytest.mark.parametrize("form", FORMS, ids=["text", "openmetrics"])
def test_the_renderer_says_what_prometheus_client_says(busy_tally, form):
    tally = busy_tally(["conv", 'quo"te', "back\\slash", "new\nline", "schön"])
    assert samples(rendered(tally, form), form) == samples(by_the_client(tally, form), form)


@pytest.mark.parametrize("form", FORMS, ids=["text", "openmetrics"])
def test_help_and_type_lines_are_those_of_prometheus_client(busy_tally, form):
    def comments(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.startswith("#")}

    tally = busy_tally()
    assert comments(rendered(tally, form)) == comments(by_the_client(tally, form))


@given(names=names_from_outside, run=any_name)
@pytest.mark.parametrize("form", FORMS, ids=["text", "openmetrics"])
def test_any_name_from_outside_comes_back_as_it_was(busy_tally, form, names, run):
    tally = busy_tally(names, run=run)
    found = samples(rendered(tally, form), form)
    # What UTF-8 or a scraper cannot hold is written as an escape.
    expected = {
        name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
        for name in tally.info.layout.layers
    }
    shown = {dict(labels)["layer"] for name, labels in found if name == "gradwatch_grad_norm"}
    assert shown == expected


def test_every_metric_of_the_table_is_exported_with_its_labels(busy_tally):
    found = samples(rendered(busy_tally(), OPENMETRICS), OPENMETRICS)
    suffix = {"histogram": "_count"}
    for spec in METRICS.values():
        name = spec.full_name + suffix.get(spec.type, "")
        labels = [dict(labels) for sample, labels in found if sample == name]
        assert labels, f"{name} is missing"
        assert all(set(one) == {"run", "rank", *spec.labels} for one in labels), name


def test_nothing_is_exported_that_the_table_does_not_name(busy_tally):
    families = {family.name for family in read_openmetrics(rendered(busy_tally(), OPENMETRICS))}
    assert families == {spec.family for spec in METRICS.values()}


def test_before_the_first_step_unknown_values_are_absent_and_counters_are_0(info_of):
    from gradwatch.rules.detection import KINDS
    from gradwatch.tally import Tally

    found = samples(rendered(Tally(info_of(), kinds=KINDS)), TEXT)
    names = {name for name, _ in found}
    assert "gradwatch_total_norm" not in names
    assert "gradwatch_grad_norm" not in names
    counters = {key: value for key, (kind, value, _) in found.items() if kind == "counter"}
    assert counters
    assert set(counters.values()) == {"0.0"}
    reasons = {
        dict(labels)["reason"] for name, labels in found if name == "gradwatch_skipped_steps_total"
    }
    assert reasons == {"nonfinite", "overflow", "global"}


def test_numbers_that_are_not_finite_are_spelled_as_prometheus_does(busy_tally, step_of):
    tally = busy_tally()
    tally.add(step_of(tally.info.layout, 3, [math.inf, math.nan, 1.0]))
    text = rendered(tally)
    assert 'gradwatch_grad_norm{run="test-run",rank="0",layer="block.0"} +Inf\n' in text
    assert 'gradwatch_grad_norm{run="test-run",rank="0",layer="block.1"} NaN\n' in text


def test_over_the_cap_layers_are_left_out_and_counted(busy_tally):
    tally = busy_tally(20)
    tally.set_active({})
    found = samples(rendered(tally, max_layers=5), TEXT)
    shown = {dict(labels)["layer"] for name, labels in found if name == "gradwatch_grad_norm"}
    assert shown == {f"block.{i}" for i in range(5)}
    dropped = [value for (name, _), value in found.items() if name == "gradwatch_series_dropped"]
    assert [value[1] for value in dropped] == ["15.0"]


def test_a_layer_over_the_cap_has_its_series_while_it_is_in_an_episode(busy_tally):
    tally = busy_tally(20)
    renderer = Renderer(tally.info, max_layers=5)

    def shown() -> set[str]:
        found = samples(renderer.render(tally.snapshot()).decode(), TEXT)
        return {dict(labels)["layer"] for name, labels in found if name == "gradwatch_grad_norm"}

    tally.set_active({"exploding": ("block.17",)})
    assert shown() == {*(f"block.{i}" for i in range(5)), "block.17"}
    tally.set_active({})
    assert shown() == {f"block.{i}" for i in range(5)}


def test_layers_come_from_rank_0_only(busy_tally):
    found = samples(rendered(busy_tally(rank=1)), TEXT)
    assert "gradwatch_grad_norm" not in {name for name, _ in found}
    assert {dict(labels)["rank"] for _, labels in found} == {"1"}


@pytest.mark.parametrize("form", FORMS, ids=["text", "openmetrics"])
def test_the_cached_prefixes_never_show_an_old_value(busy_tally, step_of, form):
    tally = busy_tally()
    renderer = Renderer(tally.info)
    for step in range(3, 6):
        renderer.render(tally.snapshot(), form)
        tally.add(step_of(tally.info.layout, step, [step, 2 * step, 3 * step]))
        text = renderer.render(tally.snapshot(), form).decode()
        assert samples(text, form) == samples(by_the_client(tally, form), form)


def test_large_answers_let_the_trainer_run_between_chunks(busy_tally):
    pauses: list[None] = []
    tally = busy_tally(2000)
    rendered(tally, max_layers=2000, pause=lambda: pauses.append(None))
    assert len(pauses) >= 2 * 2000 // 250 - 2


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", TEXT),
        ("text/html,*/*", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", OPENMETRICS),
        ("application/openmetrics-text;version=what", None),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily", TEXT),
        ("\xff;;;==,", TEXT),
    ],
)
def test_the_form_is_negotiated_and_anything_unknown_gets_a_known_one(accept, form):
    assert content_type(accept) in (TEXT, OPENMETRICS)
    if form is not None:
        assert content_type(accept) == form


@pytest.mark.parametrize("layers", [3, 600])
def test_promtool_finds_nothing_to_mend(busy_tally, layers):
    if shutil.which("promtool") is None:
        message = "not installed: promtool; apt-get install prometheus"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=rendered(busy_tally(layers)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
