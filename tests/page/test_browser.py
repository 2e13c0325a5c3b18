"""The live page in a real browser, over real recordings."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from gradwatch.recording.store import Store
from gradwatch.records import Layout, Parameter, RunInfo, StepRecord

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "../../../etc/passwd",
    "x" * 10_000,
    "🔥 \N{RIGHT-TO-LEFT OVERRIDE}gradient\N{ZERO WIDTH SPACE}",
    "{{ 7 * 7 }} ${7 * 7} @{norm} \x1b[31m</script><!--",
]

TRAINER = """
import sys, torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
watch = gradwatch.attach(
    model, optimizer, {"version": 1, "clip": [{"limit": 1.0}], "detect": {"culprit": "replay"}},
    run="trained", port=None, recording=sys.argv[1],
)
for line in sys.stdin:
    for _ in range(int(line.split()[0])):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean() * float(line.split()[1])
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()
    watch.flush()
    print("done", flush=True)
watch.close()
"""


@pytest.fixture
def trainer(runs):
    """A training process that steps when it is told to: `trainer(100, 1.0)`."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(runs)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def steps(count: int, factor: float = 1.0) -> None:
        process.stdin.write(f"{count} {factor}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    steps.process = process
    yield steps
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def shown_range(page) -> list[float]:
    return page.evaluate(
        "(() => { const r = Bokeh.documents[0].get_model_by_name('steps');"
        " return [r.start, r.end]; })()"
    )


def test_a_run_is_followed_through_a_nan_and_to_its_end(trainer, serve, look, runs):
    trainer(120)
    (name,) = (path.name for path in runs.glob("*.sqlite"))
    server, looked = serve(), look()
    page = looked.open(f"{server.url}run?r={name}")
    assert "Healthy" in page.inner_text("#verdict")
    # Nothing is stored twice over: the newest steps are drawn without a reload.
    page.evaluate("window.still = true")
    trainer(50)
    looked.until("Bokeh.documents[0].get_model_by_name('norm').data.x.at(-1) >= 168", seconds=15)
    trainer(1, math.nan)
    looked.until("document.querySelector('#verdict').innerText.includes('nonfinite')", seconds=15)
    trainer(60)
    looked.until("document.querySelector('h1').innerText.includes('Healthy again')")
    assert "skipped" in page.inner_text("#verdict")
    bars = "Bokeh.documents[0].get_model_by_name('nonfinite').data.x.length"
    looked.until(f"{bars} === 1")
    trainer.process.stdin.close()
    trainer.process.wait(60)
    looked.until("document.querySelector('#facts').innerText.includes('finished')")
    assert page.evaluate("window.still")
    assert looked.errors == []
    assert looked.elsewhere(server.url) == []


def test_a_run_that_is_killed_says_so(trainer, serve, look, runs):
    trainer(80)
    (name,) = (path.name for path in runs.glob("*.sqlite"))
    server, looked = serve(), look()
    looked.open(f"{server.url}run?r={name}")
    os.kill(trainer.process.pid, signal.SIGKILL)
    looked.until(
        "document.querySelector('#verdict').innerText.includes('Crashed at step 79')",
        seconds=20,
    )
    assert looked.errors == []


def test_every_page_draws_and_says_nothing_on_the_console(record, serve, look):
    one, two = record("one", rank=0), record("one", rank=1)
    one.steps(300, spikes=dict.fromkeys(range(200, 205), 300.0))
    two.steps(300)
    other = record("two")
    other.steps(150)
    other.pipeline.close("finished")
    server, looked = serve(), look()
    names = [run.path.name for run in (one, two, other)]
    page = looked.page
    page.goto(server.url)
    assert page.locator("table.runs tbody tr").count() == 3
    assert "exploding in block.3, at step 200" in page.inner_text("table.runs")
    for link in (
        f"run?r={names[0]}", f"layer?r={names[0]}&layer=3", f"ranks?r={names[0]}",
        f"compare?r={names[0]}&r={names[2]}", f"run?r={names[2]}&from=20&to=60",
    ):  # fmt: skip
        looked.open(server.url + link)
        plots = page.locator(".plot canvas")
        assert plots.count() > 0
        assert all(box and box["height"] > 100 for box in
                   (plot.bounding_box() for plot in page.locator(".plot").all()))  # fmt: skip
    looked.open(f"{server.url}run?r={names[0]}")
    page.click("text=the whole card")
    page.wait_for_selector("html[data-drawn=yes]")
    assert "alert exploding in block.3" in page.inner_text("h1")
    assert looked.errors == []
    assert looked.elsewhere(server.url) == []


def test_keys_zoom_find_switch_and_lead_on_with_the_same_steps(record, serve, look):
    run = record("one", layers=12)
    run.steps(1500, spikes=dict.fromkeys(range(900, 905), 300.0))
    run.pipeline.close("finished")
    server, looked = serve(), look()
    page = looked.open(f"{server.url}run?r={run.path.name}")
    whole = shown_range(page)
    page.keyboard.press("+")
    start, end = shown_range(page)
    assert end - start == pytest.approx((whole[1] - whole[0]) / 2)
    page.keyboard.press("n")
    start, end = shown_range(page)
    assert start < 902 < end
    assert end - start <= 201
    looked.until("Bokeh.documents[0].get_model_by_name('norm').data.x.length <= 203")
    assert f"from={round(start)}&to={round(end)}" in page.url
    assert page.evaluate("Bokeh.documents[0].get_model_by_name('picture departure').visible")
    page.keyboard.press("h")
    assert not page.evaluate("Bokeh.documents[0].get_model_by_name('picture departure').visible")
    link = page.locator("table.layers a").first
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-drawn=yes]")
    page.wait_for_url("**/layer?*")
    assert shown_range(page) == [round(start), round(end)]
    page.keyboard.press("u")
    page.wait_for_url("**/run?*")
    page.wait_for_selector("html[data-drawn=yes]")
    page.keyboard.press("0")
    assert shown_range(page) == whole
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    assert looked.errors == []


def test_dark_is_as_the_machine_has_it_or_as_was_chosen(record, serve, look):
    run = record("one")
    run.steps(60)
    server = serve()
    looked = look(color_scheme="dark")
    page = looked.open(f"{server.url}run?r={run.path.name}")
    back = "getComputedStyle(document.body).backgroundColor"
    colours = "Bokeh.documents[0].get_model_by_name('colours departure').palette[64]"
    dark, dark_centre = page.evaluate(back), page.evaluate(colours)
    page.keyboard.press("d")
    assert page.evaluate(back) == "rgb(255, 255, 255)" != dark
    assert page.evaluate(colours) != dark_centre
    page.reload()
    page.wait_for_selector("html[data-drawn=yes]")
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    assert looked.errors == []


def test_a_recording_without_steps_shows_the_first_one_when_it_is_there(record, serve, look):
    run = record("one")
    server, looked = serve(), look()
    page = looked.open(f"{server.url}run?r={run.path.name}")
    assert "No step yet" in page.inner_text("main")
    run.steps(5)
    page.wait_for_selector(".plot canvas", timeout=15_000)
    assert looked.errors == []


def test_a_long_recording_says_that_it_is_read_and_then_shows_itself(serve, look, runs):
    layout = Layout.of([Parameter(name=f"b.{i}.weight") for i in range(1000)])
    ones, present = np.ones(1000, dtype=np.float32), np.ones(1000, dtype=np.bool_)
    store = Store(runs / "long.sqlite", RunInfo(run="long", layout=layout, started=1.0))
    store.add(
        [
            StepRecord(
                step=step, time=float(step), layout=layout, total_norm=1.0, total_norm_clipped=1.0,
                tensor_norms_P=ones * (500 if step == 2345 else 1), tensor_coefs_P=ones,
                present_P=present,
            )
            for step in range(4500)
        ]
    )  # fmt: skip
    store.note_state("finished")
    store.close()
    server, looked = serve(), look()
    page = looked.page
    answer = page.goto(f"{server.url}run?r=long.sqlite&from=2000&to=3000")
    assert " MB of steps for the first time" in answer.text()
    page.wait_for_selector("html[data-drawn=yes]", timeout=30_000)
    assert "Healthy" in page.inner_text("h1")
    assert shown_range(page) == [2000, 3000]
    assert page.locator(".plot canvas").count() > 2
    page.keyboard.press("0")
    assert shown_range(page) == [0, 4499]
    assert looked.errors == []


def test_what_cannot_be_read_is_named_and_takes_no_other_run_with_it(record, serve, look, runs):
    record("good").steps(20)
    (runs / "corrupt.sqlite").write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    (runs / "empty.sqlite").touch()
    server, looked = serve(), look()
    page = looked.page
    page.goto(server.url)
    text = page.inner_text("table.runs")
    assert "corrupt.sqlite cannot be read" in text
    assert "empty.sqlite cannot be read" in text
    assert page.locator("table.runs a").count() == 1
    answer = page.goto(f"{server.url}run?r=corrupt.sqlite")
    assert answer.status == 422
    assert "cannot be read" in page.inner_text("main")


def test_hostile_names_are_shown_and_do_nothing(record, serve, look, samples_of):
    for place, name in enumerate(HOSTILE):
        layers = [name, f"{name}.weight", f"b.{name}"]
        run = record(name, layers=layers, model=name, host=name, started=1e9 + place)
        run.steps(120, spikes=dict.fromkeys(range(100, 105), 300.0))
        run.pipeline.close("finished")
    server, looked = serve(), look()
    page = looked.page
    wide = "document.documentElement.scrollWidth - innerWidth"
    page.goto(server.url)
    assert page.evaluate(wide) <= 0
    links = [link.get_attribute("href") for link in page.locator("table.runs a").all()]
    assert len(links) == len(HOSTILE)
    for link in links:
        looked.open(server.url + link)
        assert page.evaluate(wide) <= 0
        further = [
            page.locator(some).first.get_attribute("href")
            for some in ("table.layers a", "table.findings a.keep")
        ]
        for one in further:
            looked.open(one if one.startswith("http") else server.url + one)
            assert page.evaluate(wide) <= 0
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert looked.errors == []
    assert looked.elsewhere(server.url) == []
    with urllib.request.urlopen(f"{server.url}metrics") as answer:
        assert samples_of(answer.read().decode())


def test_a_page_says_when_nobody_answers_and_goes_on_when_somebody_does(record, serve, look):
    run = record("one")
    run.steps(30)
    server, looked = serve(), look()
    page = looked.open(f"{server.url}run?r={run.path.name}")
    os.kill(server.process.pid, signal.SIGSTOP)
    server.process.kill()
    page.wait_for_selector("#link.lost", timeout=15_000)
    assert "trying again" in page.inner_text("#link")
