"""Who hears of an end: the options, and what a run does when the servers are not as they should."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gradwatch.alerting import HELD_SECONDS, DirectAlerts
from gradwatch.dashboards.alerts import alerts
from gradwatch.ends import Ends
from gradwatch.errors import AttachError
from gradwatch.export.alertmanager import Alertmanagers
from gradwatch.export.exporter import Exporter
from gradwatch.export.urls import ServerUrl
from gradwatch.records import Anomaly


class TestOptions:
    def test_without_any_nobody_is_told(self, monkeypatch):
        for name in ("LINGER", "PUSHGATEWAY", "ALERTMANAGER", "ALERT_LABELS"):
            monkeypatch.delenv(f"GRADWATCH_{name}", raising=False)
        ends = Ends.of()
        assert (ends.linger, ends.insists) == (20.0, False)
        assert (ends.pushgateway, ends.alertmanagers) == (None, ())
        assert ends.labels == {"job": "gradwatch"}

    def test_the_environment_stands_for_what_is_left_out(self, monkeypatch):
        monkeypatch.setenv("GRADWATCH_LINGER", "3.5")
        monkeypatch.setenv("GRADWATCH_PUSHGATEWAY", "http://push:9091/")
        monkeypatch.setenv("GRADWATCH_ALERTMANAGER", "http://a:9093, https://b/am")
        monkeypatch.setenv("GRADWATCH_ALERT_LABELS", "job=nodes,cluster=a")
        ends = Ends.of()
        assert (ends.linger, ends.insists) == (3.5, True)
        assert str(ends.pushgateway) == "http://push:9091"
        assert list(map(str, ends.alertmanagers)) == ["http://a:9093", "https://b/am"]
        assert ends.labels == {"job": "nodes", "cluster": "a"}

    def test_an_argument_goes_before_the_environment_and_an_empty_one_switches_off(
        self, monkeypatch
    ):
        monkeypatch.setenv("GRADWATCH_PUSHGATEWAY", "http://push:9091")
        monkeypatch.setenv("GRADWATCH_ALERTMANAGER", "http://a:9093")
        ends = Ends.of(linger=0, pushgateway="", alertmanager=())
        assert (ends.linger, ends.pushgateway, ends.alertmanagers) == (0.0, None, ())

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("linger", "soon"), ("linger", "-1"), ("linger", "nan"), ("pushgateway", "push:9091"),
            ("alertmanager", "http://a:9093,b"), ("alert_labels", "job"),
            ("alert_labels", "run=other"), ("alert_labels", "a-b=c"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used_is_refused_by_the_name_it_was_given_under(
        self, monkeypatch, option, value
    ):
        with pytest.raises(AttachError, match=rf"^{option} must be "):
            Ends.of(**{option: value})
        monkeypatch.setenv(f"GRADWATCH_{option.upper()}", value)
        with pytest.raises(AttachError, match=rf"^GRADWATCH_{option.upper()} must be "):
            Ends.of()


class TestDirectAlerts:
    def alerts_at(self, times: dict[str, float], now: list[float]) -> DirectAlerts:
        return DirectAlerts(
            "bad\ud800name", {"job": "j", "cluster": "c"}, lambda: times, clock=lambda: now[0]
        )

    def test_labels_are_those_of_the_rule_and_what_prometheus_adds(self):
        direct = self.alerts_at({}, [1000.0])
        assert direct.note(Anomaly(kind="exploding", level="alert", step=1, message="boom"))
        (alert,) = direct.current()
        assert alert["labels"] == {
            "alertname": "GradwatchExplodingGradient", "severity": "critical",
            "job": "j", "cluster": "c", "run": r"bad\ud800name",
        }  # fmt: skip
        assert alert["annotations"]["summary"] == r"Gradients of run bad\ud800name are exploding."
        assert alert["annotations"]["description"] == "boom"
        assert alert["startsAt"] == "1970-01-01T00:16:40.000+00:00"
        assert alert["endsAt"] == "1970-01-01T00:21:40.000+00:00"

    def test_what_no_rule_pages_for_is_not_posted(self):
        direct = self.alerts_at({}, [1000.0])
        assert not direct.note(Anomaly(kind="spike", level="event", step=1))
        assert not direct.note(Anomaly(kind="exploding", level="warning", step=1))
        assert direct.current() == []

    def test_an_alert_holds_as_long_as_the_episode_and_the_window_of_the_rule(self):
        times, now = {"exploding": 0.0}, [1000.0]
        direct = self.alerts_at(times, now)
        direct.note(Anomaly(kind="exploding", level="alert", step=1))
        times["exploding"] = 1200.0  # steps of the same episode
        now[0] = 1200.0 + HELD_SECONDS - 1
        (alert,) = direct.current()
        assert alert["startsAt"] == "1970-01-01T00:16:40.000+00:00"
        now[0] += 2
        assert direct.current() == []
        direct.note(Anomaly(kind="exploding", level="alert", step=9))
        (again,) = direct.current()
        assert again["startsAt"] > alert["startsAt"]

    def test_every_alert_names_the_kinds_that_its_rule_asks_for(self):
        for alert in alerts():
            asked = re.findall(r'events_total\{event=~?"([\w|]+)"', alert.expr)
            kinds = {kind for one in asked for kind in one.split("|")} - {"policy"}
            measured = {"GradwatchClippingSaturated"}  # by shares of steps, as its event is
            assert kinds == set(alert.events) or alert.name in measured, alert.name

    def test_two_kinds_of_one_alert_are_one_alert(self):
        direct = self.alerts_at({}, [1000.0])
        assert direct.note(Anomaly(kind="vanishing", level="alert", step=3))
        assert direct.note(Anomaly(kind="dead", level="alert", step=4))
        (alert,) = direct.current()
        assert alert["labels"]["alertname"] == "GradwatchVanishingGradient"


@contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple]:
    """Its address, and what was posted to it."""
    posted: list[object] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", posted
        listening.shutdown()


def good(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestAlertmanagers:
    ALERT = ({"labels": {"alertname": "A"}},)

    def test_one_that_hangs_keeps_the_others_from_nothing_and_the_end_waits_seconds_only(self):
        errors = []
        with socket.create_server(("127.0.0.1", 0)) as silent, server(good) as (url, posted):
            hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
            servers = [ServerUrl.of(one, "alertmanager") for one in (hanging, url)]
            managers = Alertmanagers(servers, lambda: list(self.ALERT), lambda: errors.append(1))
            managers.tell()
            eventually(lambda: posted)
            assert posted == [list(self.ALERT)]
            started = time.monotonic()
            managers.close()
            assert time.monotonic() - started < 10

    def test_what_was_refused_is_tried_again_counted_and_said_once(self, caplog):
        errors, answers = [], [500, 503, 200]

        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(answers.pop(0))
            handler.end_headers()

        with server(answer) as (url, posted):
            url = url.replace("http://", "http://me:secret@")
            managers = Alertmanagers(
                [ServerUrl.of(url, "alertmanager")], lambda: list(self.ALERT),
                lambda: errors.append(1),
            )  # fmt: skip
            managers.tell()
            eventually(lambda: len(posted) == 3)
            managers.close()
        assert len(errors) == 2
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "cannot be told of alerts (HTTP 500" in said[0]
        assert "secret" not in said[0]

    def test_what_was_told_as_the_run_ends_is_sent_before_it_has_ended(self):
        with server(good) as (url, posted):
            managers = Alertmanagers(
                [ServerUrl.of(url, "alertmanager")], lambda: list(self.ALERT), lambda: None
            )
            managers.tell()
            managers.close()
            assert posted == [list(self.ALERT)]


class TestLingerForNews:
    ANOMALY = Anomaly(kind="nonfinite", level="alert", step=2)

    def test_a_killed_run_waits_for_what_was_not_scraped_yet_alone(self, busy_tally, get):
        exporter = Exporter(busy_tally(), port=0)
        exporter.note(self.ANOMALY)
        get(exporter.url)
        time.sleep(0.1)
        started = time.monotonic()
        exporter.close(linger_seconds=30, only_for_news=True)
        assert time.monotonic() - started < 5

    def test_news_that_came_behind_the_last_scrape_is_waited_with(self, busy_tally, get):
        exporter = Exporter(busy_tally(), port=0)
        get(exporter.url)
        time.sleep(0.05)
        exporter.note(self.ANOMALY)
        closing = threading.Thread(
            target=exporter.close, kwargs={"linger_seconds": 30, "only_for_news": True}
        )
        closing.start()
        time.sleep(0.3)
        assert closing.is_alive()
        get(exporter.url)
        closing.join(10)
        assert not closing.is_alive()

    @pytest.mark.parametrize(("insists", "is_news"), [(True, False), (False, True)])
    def test_a_scraper_that_never_came_is_not_waited_for_unless_asked_and_in_need(
        self, busy_tally, insists, is_news
    ):
        exporter = Exporter(busy_tally(), port=0)
        if is_news:
            exporter.note(self.ANOMALY)
        started = time.monotonic()
        exporter.close(linger_seconds=30, insists=insists)
        assert time.monotonic() - started < 5

    def test_where_it_is_asked_for_the_first_scrape_is_waited_for(self, busy_tally, get):
        exporter = Exporter(busy_tally(), port=0)
        exporter.note(self.ANOMALY)
        closing = threading.Thread(
            target=exporter.close, kwargs={"linger_seconds": 30, "insists": True}
        )
        closing.start()
        time.sleep(0.3)
        assert closing.is_alive()
        get(exporter.url)
        closing.join(10)
        assert not closing.is_alive()
