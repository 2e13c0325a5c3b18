"""Reports: one file that says first what happened and what to do, wherever it is opened."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys

import pytest
import torch

import gradwatch
from gradwatch.cli import app
from gradwatch.page.picture import SIZE
from gradwatch.page.report import html_report, markdown_report

HOSTILE = "</script><script>hacked</script> `x` | @all #1 <b> \x1b[31m" + "y" * 10_000
MEGABYTE = 10**6


@pytest.fixture
def exploding(record):
    run = record("one", layers=12)
    run.steps(400, spikes=dict.fromkeys(range(300, 400), 300.0))
    run.pipeline.close("finished")
    return run


def said(capsys, *arguments, code=0) -> str:
    with pytest.raises(SystemExit) as ended:
        app([*map(str, arguments)])
    assert (ended.value.code or 0) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


@pytest.mark.browser
class TestHtml:
    def test_it_draws_from_a_file_with_no_request_and_no_error(self, exploding, look, tmp_path):
        report = tmp_path / "report.html"
        report.write_text(html_report(exploding.path), encoding="utf-8")
        looked = look()
        page = looked.open(report.as_uri())
        assert page.locator(".plot canvas").count() > 4
        assert "Not healthy since step 300 (" in page.inner_text("h1")
        assert "exploding in block.6" in page.inner_text("h1")
        page.keyboard.press("d")
        page.keyboard.press("h")
        page.keyboard.press("+")
        page.keyboard.press("n")
        assert looked.errors == []
        assert [
            url for url in looked.asked if not url.startswith(("file:", "data:", "blob:"))
        ] == []

    def test_a_legend_has_an_entry_for_what_can_be_seen_alone(
        self, exploding, record, look, tmp_path
    ):
        well = record("well")
        well.steps(80)
        well.pipeline.close("finished")
        for run, levels in ((exploding, ["alert"]), (well, [])):
            report = tmp_path / "report.html"
            report.write_text(html_report(run.path), encoding="utf-8")
            entries = (
                look()
                .open(report.as_uri())
                .evaluate(
                    "Bokeh.documents[0].get_model_by_name('figure total norm').above"
                    ".flatMap((one) => one.items || []).filter((item) => item.visible)"
                    ".map((item) => item.label.value)"
                )
            )
            assert entries[:2] == ["before clipping", "after clipping"]
            assert [one for one in entries if one in ("alert", "warning")] == levels

    def test_hostile_names_do_nothing_in_it(self, record, look, tmp_path):
        run = record(HOSTILE, layers=[HOSTILE, f"b.{HOSTILE}"], model=HOSTILE, host=HOSTILE)
        run.steps(120, spikes=dict.fromkeys(range(100, 105), 300.0))
        report = tmp_path / "report.html"
        report.write_text(html_report(run.path), encoding="utf-8")
        looked = look()
        page = looked.open(report.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate("document.scripts.length") == 4
        assert page.evaluate("typeof hacked") == "undefined"
        assert looked.errors == []


def test_a_report_of_a_large_run_is_below_five_megabytes(record):
    run = record("large", layers=1000)
    run.steps(600, spikes=dict.fromkeys(range(300, 600, 20), 300.0))
    assert len(html_report(run.path)) < 5 * MEGABYTE


def test_it_says_when_the_run_began_and_when_its_last_step_was(exploding):
    head = html_report(exploding.path).partition("<header>")[2].partition("</header>")[0]
    assert re.search(r"rank 0, started \S+ \S+ UTC, last step at \S+ \S+ UTC", head)


def test_a_healthy_run_has_no_layers_that_are_far_from_usual(record, exploding):
    run = record("well")
    run.steps(200)
    run.pipeline.close("finished")
    assert "furthest from" not in html_report(run.path)
    assert "furthest from" in html_report(exploding.path)


def test_it_has_policy_environment_first_card_and_what_is_around_each_finding(exploding):
    text = html_report(exploding.path)
    shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    for part in (
        "The steps before step 302",
        "Around step 302",
        "limit: 1.0",
        "here",
        "Environment",
    ):
        assert part in shown
    order = [
        shown.index(part) for part in ("Not healthy", "The steps before step 302", "Environment")
    ]
    assert order == sorted(order)


class TestMarkdown:
    def test_its_first_lines_say_what_happened_and_what_to_do(self, exploding):
        lines = markdown_report(exploding.path).splitlines()
        assert lines[0].startswith("## Not healthy since step 300 ")
        assert "exploding in block.6" in lines[0]
        assert [line for line in lines[:6] if line.startswith("- **to do**")]

    def test_a_healthy_run_says_that_there_is_nothing_to_do(self, record):
        run = record("well")
        run.steps(80)
        run.pipeline.close("finished")
        lines = markdown_report(run.path).splitlines()
        assert lines[:3] == [
            "## Healthy: no alert and no warning up to step 79", "", "- **to do**: nothing"
        ]  # fmt: skip

    def test_a_nan_is_told_with_what_was_done(self, record):
        run = record("bad")
        run.steps(80)
        run.steps(1, spikes={80: float("nan")})
        run.steps(60)
        run.pipeline.close("finished")
        first = "\n".join(markdown_report(run.path).splitlines()[:5])
        assert "nonfinite" in first
        assert "it was skipped" in first

    def test_words_can_be_read_without_a_renderer(self, exploding):
        words = markdown_report(exploding.path).partition("| run |")[0]
        assert " (" in words
        assert "\\" not in words
        assert "&gt;" not in words

    def test_names_are_neither_markup_nor_mentions(self, record):
        run = record(HOSTILE, layers=[HOSTILE, f"b.{HOSTILE}"])
        run.steps(120, spikes=dict.fromkeys(range(100, 105), 300.0))
        text = markdown_report(run.path)
        fences = re.split(r"^`{3,}(?:text)?$", text, flags=re.MULTILINE)
        assert len(fences) % 2 == 1
        outside = "".join(fences[::2])
        outside = re.sub(r"`[^`\n]*`", "", outside).replace("<details><summary>", "")
        assert not re.search(r"<script|<b>|@all|#1|\x1b", outside)
        assert len(text) < 50_000


class TestCommand:
    def test_without_a_file_it_prints_what_it_did(self, exploding, capsys):
        assert said(capsys, "report", exploding.path).startswith("run one, rank 0: finished")

    def test_the_name_of_the_file_says_what_it_becomes(self, exploding, tmp_path, capsys):
        for suffix, begins in ((".html", "<!doctype html>"), (".md", "## Not healthy")):
            output = tmp_path / f"report{suffix}"
            assert said(capsys, "report", exploding.path, "-o", output).split() == [str(output)]
            assert output.read_text().startswith(begins)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-o", "report.pdf"], "ends in .html, .md or .png"),
            (["--format", "html"], "needs a file: -o report.html"),
            (["--format", "md", "--last-anomaly"], "goes with text only"),
            (["-o", "x.png", "--browser", "/none/such"], "/none/such took no picture"),
        ],
    )
    def test_what_cannot_be_is_said_in_a_line(self, arguments, message, exploding, capsys):
        assert message in said(capsys, "report", exploding.path, *arguments, code=2)

    def test_without_a_browser_a_picture_says_what_to_install(
        self, exploding, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setenv("PATH", str(tmp_path))
        error = said(capsys, "report", exploding.path, "-o", tmp_path / "x.png", code=2)
        assert "none is installed here" in error

    @pytest.mark.browser
    @pytest.mark.usefixtures("chromium")
    def test_a_picture_is_a_png_of_its_beginning(self, exploding, tmp_path, capsys):
        from PIL import Image

        output = tmp_path / "report.png"
        said(capsys, "report", exploding.path, "-o", output)
        with Image.open(output) as picture:
            assert picture.size == SIZE
            # Not a blank page: the heat map, the line and the verdict have colours of their own.
            assert len(picture.convert("RGB").getcolors(10**6)) > 200


def test_nothing_of_the_page_is_imported_before_it_is_needed():
    code = (
        "import sys, gradwatch.cli, gradwatch.serve.command\n"
        "print({'bokeh', 'jinja2', 'PIL', 'tornado'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert importlib.util.find_spec("bokeh")


@pytest.mark.parametrize("mode", [None, "shadow", "enforce"])
def test_a_run_that_stays_nonfinite_to_its_end_has_every_form_of_a_report(mode, tmp_path, capsys):
    policy = None if mode is None else {"version": 1, "mode": mode, "clip": [{"limit": 1.0}]}
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, optimizer, policy, port=None, recording=tmp_path) as watch:
        for step in range(80):
            optimizer.zero_grad()
            inputs = torch.randn(8, 4) * (math.nan if step >= 40 else 1.0)
            model(inputs).square().mean().backward()
            optimizer.step()
    since = "Not healthy since step 40 "
    assert since in said(capsys, "report", watch.recording)
    assert since in said(capsys, "top", "--once", watch.recording)
    assert since in html_report(watch.recording)
    assert since in markdown_report(watch.recording)
