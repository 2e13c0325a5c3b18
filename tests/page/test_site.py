"""What the page answers, without a browser: who may ask, what is let out, what is refused."""

from __future__ import annotations

import http.client
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from gradwatch.export.messages import Request
from gradwatch.page.site import Pages

TOKEN = "abcdefghijklmnop-0123456789"


@pytest.fixture
def asked(serve):
    """`asked(server, "/run?r=x", header=...)`: status, headers and body, as they were sent."""

    def ask(server, path: str, method: str = "GET", **headers: str):
        where = urlsplit(server.url)
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, answer.headers, body

    return ask


@pytest.fixture
def pages(runs):
    errors: list[Exception] = []
    made = Pages(runs, errors.append)
    made.errors = errors
    return made


def get(pages: Pages, path: str, query: str = ""):
    return pages.answer(Request("GET", path, {}, query))


def test_page_and_metrics_are_on_one_port(record, serve, asked):
    record("one").steps(20)
    server = serve()
    assert asked(server, "/")[0] == 200
    status, headers, body = asked(server, "/metrics")
    assert status == 200
    assert b"gradwatch_agent_recordings{" in body
    assert headers["Content-Type"].startswith("text/plain")
    assert asked(server, "/agent")[0] == 200


def test_who_is_not_of_this_machine_or_of_this_page_is_refused(record, serve, asked):
    server = serve()
    assert asked(server, "/", Host="evil.example")[0] == 421
    assert asked(server, "/list", Origin="http://evil.example")[0] == 403
    assert asked(server, "/metrics", Origin="null")[0] == 403
    own = server.url.rstrip("/")
    assert asked(server, "/list", Origin=own)[0] == 200
    assert asked(server, "/list", method="POST")[0] == 404
    assert asked(server, "/metrics", method="DELETE")[0] == 405


def test_no_page_may_run_foreign_scripts_or_be_framed(record, pages):
    run = record("one")
    run.steps(10)
    for path, query in (("/", ""), ("/run", f"r={run.path.name}"), ("/run", "r=none")):
        policy = get(pages, path, query).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("known", [True, False])
def test_ranks_are_compared_by_their_own_norms_where_they_have_some(known, record, pages):
    one, two = (record("one", rank=rank) for rank in (0, 1))
    for run in (one, two):
        if known:
            run.pipeline.recorder.local_norms.append((10, 1.5))
        run.steps(30)
    text = get(pages, "/ranks", f"r={one.path.name}").body.decode()
    assert ("Own gradients" in text) == known


def test_ranks_of_one_run_lead_to_each_other_and_other_runs_do_not(record, pages):
    one, two = (record("one", rank=rank) for rank in (0, 1))
    other = record("other", rank=2)
    for run in (one, two, other):
        run.steps(5)
    text = get(pages, "/run", f"r={one.path.name}").body.decode()
    ranks = text[text.index("Ranks of this run") :]
    assert f"run?r={two.path.name}" in ranks
    assert other.path.name not in ranks
    assert "Ranks of this run" not in get(pages, "/run", f"r={other.path.name}").body.decode()


def test_without_bokeh_there_are_metrics_and_a_word_about_it(runs):
    code = (
        "import sys; sys.modules['bokeh'] = None\n"
        "from gradwatch.serve.front import pages_of\n"
        "print(pages_of(sys.argv[1], print))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"


class TestToken:
    def test_everything_but_health_wants_it(self, record, serve, asked):
        server = serve(environment={"GRADWATCH_TOKEN": TOKEN})
        for path in ("/", "/metrics", "/list", "/static/page.js", "/agent", "/?token=wrong"):
            status, _, body = asked(server, path)
            assert status == 401, path
            assert b"token" in body
        assert asked(server, "/healthz")[0] == 200

    def test_prometheus_sends_it_and_a_browser_keeps_it(self, record, serve, asked):
        server = serve("--token", TOKEN)
        assert asked(server, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
        status, headers, _ = asked(server, f"/run?r=x&token={TOKEN}&from=3")
        assert (status, headers["Location"]) == (303, "run?r=x&from=3")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert asked(server, "/list", Cookie=cookie.partition(";")[0])[0] == 200
        assert asked(server, "/list", Cookie="gradwatch_token=other")[0] == 401


class TestPaths:
    @pytest.mark.parametrize(
        "name",
        ["../secret.sqlite", "/etc/passwd", "..%2fsecret.sqlite", "sub/../../secret.sqlite", "",
         "secret.sqlite%00", "linked.sqlite", "%ff"],
    )  # fmt: skip
    def test_nothing_outside_of_the_directory_is_opened(self, name, record, runs, pages, tmp_path):
        outside = record("secret", folder=tmp_path)
        outside.steps(5)
        outside.path.rename(tmp_path / "secret.sqlite")
        (runs / "linked.sqlite").symlink_to(tmp_path / "secret.sqlite")
        answer = get(pages, "/run", f"r={name}")
        assert answer.status == (400 if name == "%ff" else 404)
        assert b"secret" not in answer.body.replace(b"secret.sqlite", b"")

    @pytest.mark.parametrize("name", ["../site.py", "..%2fsite.py", "page.js/../../site.py", "x"])
    def test_no_file_but_the_pages_own_is_handed_out(self, name, pages):
        assert get(pages, f"/static/{name}").status == 404

    @pytest.mark.parametrize(
        ("path", "query", "status"),
        [("/layer", "layer=99", 404), ("/layer", "layer=-1", 404), ("/layer", "layer=x", 400),
         ("/card", "step=3&kind=exploding", 404), ("/compare", "", 400),
         ("/run", f"from={10**30}", 400), ("/run", "from=5&to=2", 200),
         ("/run", "from=-9&to=99999999999", 200), ("/news", "version=1&from=100", 200)],
    )  # fmt: skip
    def test_an_odd_address_has_an_answer_and_is_no_error_of_ours(
        self, path, query, status, record, pages
    ):
        run = record("one")
        run.steps(30)
        answer = get(pages, path, f"r={run.path.name}&{query}" if path != "/compare" else query)
        assert answer.status in (status, 204 if path == "/news" else status)
        assert pages.errors == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE meta SET value = json_set(value, '$.started', 'never') WHERE key = 'info'",
        "UPDATE meta SET value = json_set(value, '$.rank', json('[1]')) WHERE key = 'info'",
        "UPDATE meta SET value = 'no json' WHERE key = 'info'",
        "UPDATE steps SET norms = x'00'",
        "UPDATE steps SET scalars = 'no json'",
        "UPDATE steps SET step = 'x'",
        "UPDATE steps SET total_norm = 'x'",
        "DROP TABLE anomalies",
        "DROP TABLE steps",
    ],
)
def test_a_damaged_recording_is_refused_and_the_others_are_listed(damage, record, pages):
    broken, whole = record("broken"), record("whole")
    for run in (broken, whole):
        run.steps(10)
        run.pipeline.close("finished")
    with closing(sqlite3.connect(broken.path, isolation_level=None)) as connection:
        connection.execute(damage)
    answer = get(pages, "/run", f"r={broken.path.name}")
    assert answer.status == 422
    assert b"cannot be read" in answer.body
    assert get(pages, "/").status == 200
    assert b">whole</a>" in get(pages, "/").body
    assert get(pages, "/run", f"r={whole.path.name}").status == 200
    assert pages.errors == []


def test_a_card_that_cannot_be_read_is_left_out(record, pages):
    run = record("one")
    run.steps(120, spikes=dict.fromkeys(range(100, 105), 300.0))
    run.pipeline.close("finished")
    with closing(sqlite3.connect(run.path, isolation_level=None)) as connection:
        connection.execute("UPDATE cards SET card = '[]'")
    answer = get(pages, "/run", f"r={run.path.name}")
    assert answer.status == 200
    assert b"exploding" in answer.body
    assert b"the whole card" not in answer.body


class TestNews:
    def test_there_are_none_while_nothing_happens(self, record, pages):
        run = record("one")
        run.steps(30)
        first = json.loads(get(pages, "/news", f"r={run.path.name}").body)
        query = f"r={run.path.name}&version={first['version']}"
        assert get(pages, "/news", query).status == 204

    def test_steps_that_came_meanwhile_are_in_them(self, record, pages, monkeypatch):
        monkeypatch.setattr("gradwatch.page.watched.FRESH_SECONDS", 0.0)
        run = record("one")
        run.steps(30)
        first = json.loads(get(pages, "/news", f"r={run.path.name}").body)
        run.steps(30)
        query = f"r={run.path.name}&version={first['version']}"
        news = json.loads(get(pages, "/news", query).body)
        # A record closes when the next one comes, and the last one does when the run ends.
        assert news["last"] >= 58
        assert first["last"] < 30


def test_the_steps_that_only_the_ring_of_a_killed_run_holds_are_drawn(record, pages, runs):
    run = record("one", pid=2**22 + 1, process_table=table())
    run.steps(40)
    news = json.loads(get(pages, "/news", f"r={run.path.name}").body)
    assert news["last"] == 39
    assert "Crashed at step 39" in news["now"]


def table() -> str:
    from gradwatch.recording.writer import process_table

    return process_table()
