"""`gradwatch dashboards check` and `rules check` where Prometheus is missing, refuses or is none.

Where it answers is shown with a real one in tests/e2e/test_dashboards.py.
"""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from gradwatch.dashboards.check import Window, _filled
from gradwatch.dashboards.prometheus import Prometheus
from gradwatch.errors import MonitoringError

Answering = Callable[[int, bytes], AbstractContextManager[str]]


@pytest.fixture
def answering() -> Answering:
    """A server that gives the same answer to everything, and the token that it was sent."""

    @contextmanager
    def server(status: int, body: bytes) -> Iterator[str]:
        class Always(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always) as always:
            threading.Thread(target=always.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{always.server_port}"
            always.shutdown()

    return server


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>hello</html>", "not the API of a Prometheus"),
        (200, b'{"status": "odd"}', "not the API of a Prometheus"),
        (200, b"[]", "not the API of a Prometheus"),
        (401, b"no", "GRADWATCH_PROMETHEUS_TOKEN"),
        (403, b"no", "GRADWATCH_PROMETHEUS_TOKEN"),
        (404, b"no", "path prefix"),
        (502, b"bad gateway", "answered 502"),
        (400, b'{"status":"error","errorType":"bad_data","error":"1:3: oh"}', "1:3: oh"),
    ],
)
def test_an_answer_that_is_none_is_one_line_with_what_to_do(
    answering: Answering, status: int, body: bytes, said: str
) -> None:
    with answering(status, body) as url, pytest.raises(MonitoringError) as raised:
        Prometheus(url).query("up", 0)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_nobody_listens_it_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(MonitoringError, match=r"no answer .*Is Prometheus running there"):
        Prometheus(url).rules()


@pytest.mark.parametrize("url", ["prometheus:9090", "ftp://x", "", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(MonitoringError, match=r"like http://127\.0\.0\.1:9090"):
        Prometheus(url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(MonitoringError) as raised:
        Prometheus("http://me:secret@127.0.0.1:9090")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("query", "filled"),
    [
        ('a{b=~"$run"}', 'a{b=~"gpt"}'),
        ('a{b=~"${run}"}', 'a{b=~"gpt"}'),
        ('a{b=~"${run:regex}"}', 'a{b=~"gpt"}'),
        ('a{b=~"[[run]]"}', 'a{b=~"gpt"}'),
        ('a{b=~"$runner"}', 'a{b=~"$runner"}'),
        ("rate(a[$__rate_interval])", "rate(a[60000ms])"),
    ],
)
def test_variables_are_filled_in_as_grafana_does(query: str, filled: str) -> None:
    assert _filled(query, {"run": "gpt", **Window(end=0.0, seconds=600).own()}) == filled


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nothing.txt", "", "gradwatch dashboards build"),
        ("broken.json", "{", "not JSON"),
        ("other.json", "[]", "no dashboard"),
        ("other.json", '{"panels": 1}', "no dashboard"),
    ],
)
def test_a_directory_without_dashboards_is_an_error_in_one_line(
    tmp_path: Path, answering: Answering, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with answering(200, json.dumps({"status": "success", "data": []}).encode()) as url:
        command = [sys.executable, "-m", "gradwatch", "dashboards", "check", str(tmp_path)]
        done = subprocess.run(
            [*command, "--prometheus", url], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
