"""Each way in which a push can fail: one line that says where, what came and what to do."""

from __future__ import annotations

import base64
import json
import logging
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from gradwatch.errors import GradwatchError, MonitoringError
from gradwatch.grafana import Credentials, Server, credentials
from gradwatch.grafana.server import PAUSES
from gradwatch.records import Anomaly

SECRET = "glsa_wrong-token-of-somebody"


def only_line(done: Any) -> str:
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_a_wrong_token_is_named_and_never_said(push, stand_in) -> None:
    line = only_line(push(environment={"GRAFANA_TOKEN": SECRET}))
    assert f"GET {stand_in.url}/api/folders (folders): expected 2xx. Received: 401" in line
    assert "(Invalid API key). What is in GRAFANA_TOKEN is not known there" in line
    assert SECRET not in line


def test_a_wrong_password_is_named_and_never_said(push) -> None:
    line = only_line(push(environment={"GRAFANA_USER": "ann", "GRAFANA_PASSWORD": SECRET}))
    assert "(Invalid username or password). What is in GRAFANA_USER and GRAFANA_PASSWORD" in line
    assert SECRET not in line


def test_without_credentials_nothing_is_sent(push, stand_in) -> None:
    assert "put the token of a service account into" in only_line(push(environment={}))
    assert "GRAFANA_TOKEN" in only_line(push(environment={"GRAFANA_USER": "ann"}))
    assert stand_in.asked == []


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "tökén"])
def test_a_token_that_is_none_is_refused_without_saying_it(token: str) -> None:
    with pytest.raises(MonitoringError, match="GRAFANA_TOKEN: expected a token") as caught:
        credentials({"GRAFANA_TOKEN": token})
    assert token not in str(caught.value)


def test_a_token_from_a_file_may_end_in_a_line_break() -> None:
    assert credentials({"GRAFANA_TOKEN": "abc\n"}).token == "abc"


def test_credentials_are_in_no_repr() -> None:
    for who in (credentials({"GRAFANA_TOKEN": SECRET}),
                credentials({"GRAFANA_USER": "ann", "GRAFANA_PASSWORD": SECRET})):  # fmt: skip
        assert SECRET not in repr(who)


@pytest.mark.parametrize(
    "url", [f"http://ann:{SECRET}@127.0.0.1:3000", f"http://ann:{SECRET[:4]}/x{SECRET}@h"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(push, stand_in, url) -> None:
    for given in ({"url": url}, {}):
        line = only_line(push(*(() if given else ("--datasource-url", url)), **given))
        assert "must not hold a user or a password" in line
        assert SECRET[5:] not in line
    assert stand_in.asked == []


@pytest.mark.parametrize(
    "url", ["127.0.0.1:3000", "ftp://h", "http://", "http://h:0x", "http://h:99999", "http://[::1"]
)
def test_what_is_no_address_is_refused(push, url: str) -> None:
    assert "must be like http://127.0.0.1:3000. Received: " in only_line(push(url=url))


def test_what_stands_behind_an_address_is_not_repeated(push) -> None:
    line = only_line(push(url=f"http://h/?api_key={SECRET}"))
    assert SECRET not in line


def test_a_permission_that_is_missing_is_named(connect, stand_in) -> None:
    stand_in.role = 0
    with pytest.raises(MonitoringError) as caught:
        connect().ensure_folder("gradwatch")
    assert "Received: 403 (You'll need additional permissions" in str(caught.value)
    assert "GRAFANA_TOKEN may not do that: it needs folders:create, of the role Editor" in str(
        caught.value
    )
    stand_in.role = 1
    with pytest.raises(MonitoringError, match="datasources:read, of the role Admin"):
        connect().ensure_datasource("http://prometheus:9090")


def test_a_folder_that_is_gone_is_explained(connect) -> None:
    with pytest.raises(MonitoringError, match="The folder was removed meanwhile: push again"):
        connect().push_dashboard({"uid": "mine", "title": "Mine"}, "gone")


def test_an_address_without_that_api_is_explained(connect, stand_in) -> None:
    stand_in.broken = lambda verb, path: (404, '{"message": "Not found"}', {})
    with pytest.raises(MonitoringError, match="Is this a Grafana, and is its path"):
        connect().version()


def test_a_name_that_is_taken_is_explained(connect, stand_in) -> None:
    stand_in.datasources["other"] = {"uid": "other", "name": "gradwatch Prometheus"}
    with pytest.raises(MonitoringError, match=r"409 \(data source with the same name already"):
        connect().ensure_datasource("http://prometheus:9090")


def test_a_dashboard_of_a_plugin_is_explained(connect, stand_in) -> None:
    body = json.dumps(
        {"message": "The dashboard belongs to plugin x", "status": "plugin-dashboard"}
    )
    connect().ensure_folder("gradwatch")
    stand_in.broken = lambda verb, path: (412, body, {}) if path.endswith("/db") else None
    with pytest.raises(MonitoringError, match=r"412 .*plugin-dashboard\)"):
        connect().push_dashboard({"uid": "mine", "title": "Mine"}, "gradwatch")


def test_what_comes_from_files_there_is_explained(connect, stand_in) -> None:
    grafana = connect()
    folder, _ = grafana.ensure_folder("gradwatch")
    stand_in.provisioned.add("mine")
    with pytest.raises(MonitoringError, match=r"from a file of that Grafana \(provisioning\)"):
        grafana.push_dashboard({"uid": "mine", "title": "Mine"}, folder)
    grafana.ensure_datasource("http://a:9090")
    stand_in.datasources["gradwatch-prometheus"]["readOnly"] = True
    with pytest.raises(MonitoringError, match=r"from a file of that Grafana \(provisioning\)"):
        grafana.ensure_datasource("http://b:9090")
    assert grafana.ensure_datasource("http://a:9090") == "unchanged"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_fails_for_a_moment_is_asked_again(connect, stand_in, pauses, status) -> None:
    failures = iter([(status, "<html>a message from a proxy</html>", {})] * 2)
    stand_in.broken = lambda verb, path: next(failures, None)
    assert connect().version() == "13.2.0"
    assert pauses == list(PAUSES[:2])


def test_a_server_that_keeps_failing_is_given_up(connect, stand_in, pauses) -> None:
    stand_in.broken = lambda verb, path: (502, "<html>\nBad Gateway</html>", {})
    with pytest.raises(MonitoringError) as caught:
        connect().version()
    assert "Received: 502 (a page of HTML). Tried 4 times. Grafana, or a proxy" in str(caught.value)
    assert pauses == list(PAUSES)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 413, 418])
def test_what_will_not_change_is_asked_once(connect, stand_in, pauses, status) -> None:
    stand_in.broken = lambda verb, path: (status, "[]", {})
    with pytest.raises(MonitoringError, match=f"Received: {status} "):
        connect().version()
    assert (len(stand_in.asked), pauses) == (1, [])


def test_an_annotation_whose_answer_failed_is_not_written_twice(push, stand_in, recorded) -> None:
    """It had been written, and the answer was lost on the way."""
    recording = recorded("gpt", [Anomaly(kind="exploding", level="alert", step=7, message="m")])

    def written_but(verb: str, path: str) -> tuple[int, str, dict[str, str]] | None:
        if (verb, path) != ("POST", "/api/annotations"):
            return None
        stand_in.annotations.append(
            {"time": 1_700_000_007_000, "text": "m",
             "tags": ["gradwatch", "run:gpt", "rank:0", "exploding"]}
        )  # fmt: skip
        return 504, "", {}

    stand_in.broken = written_but
    assert "Received: 504. Grafana, or a proxy before it" in only_line(
        push("--recording", recording)
    )
    stand_in.broken = lambda verb, path: None
    assert "0 created, 1 unchanged" in push("--recording", recording).stdout


@pytest.mark.parametrize(
    ("body", "received"),
    [
        ("<html>Sign in</html>", "what is no JSON"),
        ("", "an empty body"),
        ('{"status": "ok"}', "JSON of something else"),
        ("[1, 2]", "JSON of something else"),
        ("null", "JSON of something else"),
    ],
)
def test_what_is_no_grafana_is_told(connect, stand_in, body: str, received: str) -> None:
    stand_in.broken = lambda verb, path: (200, body, {})
    with pytest.raises(MonitoringError, match=f"Received: {received}"):
        connect().version()


def test_a_login_page_in_between_is_told_and_not_followed(connect, stand_in) -> None:
    to = {"Location": f"https://ann:{SECRET}@sso.example/login?next={SECRET}"}
    stand_in.broken = lambda verb, path: (302, "", to)
    with pytest.raises(MonitoringError) as caught:
        connect().version()
    assert "It leads to https://sso.example/login: give the address" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(stand_in.asked) == 1


@pytest.mark.parametrize(
    "given", [{"token": SECRET}, {"user": "ann", "password": SECRET}], ids=["token", "password"]
)
def test_an_answer_that_says_the_credentials_back_is_not_passed_on(
    connect, stand_in, caplog, given: dict[str, str]
) -> None:
    pair = base64.b64encode(f"ann:{SECRET}".encode()).decode()
    said = {"message": f"bad header Basic {pair}, {SECRET}\x1b[31m"}
    stand_in.broken = lambda verb, path: (400, json.dumps(said), {})
    with caplog.at_level(logging.DEBUG), pytest.raises(MonitoringError) as caught:
        connect(**given).version()
    assert "bad header Basic" in str(caught.value)
    for text in (str(caught.value), caplog.text):
        assert SECRET not in text
        assert "\x1b" not in text
    assert (pair in str(caught.value)) == ("token" in given)


def test_a_refused_connection_is_told(connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(MonitoringError, match="no answer, Connection refused"):
        connect(f"http://127.0.0.1:{port}").version()


def test_a_server_that_says_nothing_is_given_up(connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MonitoringError, match=r"no answer, not a word within 0\.2 s"):
            connect(url, timeout=0.2).version()


def test_a_server_that_hangs_up_is_told(connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as rude:
        hang_up = threading.Thread(target=lambda: rude.accept()[0].close())
        hang_up.start()
        with pytest.raises(MonitoringError, match="no answer, "):
            connect(f"http://127.0.0.1:{rude.getsockname()[1]}").version()
        hang_up.join()


def test_a_missing_extra_is_told_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "grafana_api", None)
    monkeypatch.setitem(sys.modules, "grafana_api.grafana_face", None)
    with pytest.raises(GradwatchError, match=r"pip install 'gradwatch\[grafana\]'"):
        Server("http://127.0.0.1:3000", Credentials("GRAFANA_TOKEN", token="x"))


def test_the_client_is_imported_only_when_it_is_used() -> None:
    code = "import sys, gradwatch.cli; print({'grafana_api', 'requests'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", "no dashboard: it has no title"),
        ('{"title": "A"}', "the uid must be 1 to 40 letters"),
        ('{"title": "A", "uid": "../../admin"}', "the uid must be 1 to 40 letters"),
        ('{"title": "A", "uid": "a", "__inputs": []}', "exported for sharing"),
    ],
)
def test_a_file_that_cannot_be_pushed_is_named_before_anything_is_sent(
    push, stand_in, tmp_path, text: str, why: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.json").write_text('{"title": "Fine", "uid": "fine"}')
    (tmp_path / "mine" / "b.json").write_text(text)
    line = only_line(push("mine"))
    assert line.startswith(f"mine/b.json: {why}")
    assert stand_in.asked == []


def test_two_files_of_one_uid_and_an_empty_directory_are_refused(push, stand_in, tmp_path) -> None:
    assert "no dashboard (*.json) here" in only_line(push(tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.json").write_text('{"title": "A", "uid": "a"}')
    assert (
        only_line(push(tmp_path))
        == f"{tmp_path}/b.json: has the uid of a.json: give it one of its own"
    )
    assert "no recording" in only_line(push("--recording", tmp_path))
    assert "must be a name" in only_line(push("--folder", " "))
    assert stand_in.asked == []
