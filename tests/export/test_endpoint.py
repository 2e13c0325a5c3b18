"""The endpoint over real sockets: what a scraper, a browser and a bad client get."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from gradwatch.export import server as server_module
from gradwatch.export.endpoint import Endpoint
from gradwatch.export.exporter import Exporter
from gradwatch.export.renderer import OPENMETRICS, TEXT


@pytest.fixture
def exporter(busy_tally) -> Iterator[Exporter]:
    exporter = Exporter(busy_tally(600), port=0)
    yield exporter
    exporter.close()


def raw(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def free_ports(count: int) -> int:
    """The first of so many that nobody listens on."""
    for first in range(20_000, 30_000, count):
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError(f"no {count} free ports in a row")


def everything(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def test_metrics_are_served_on_loopback(exporter, get):
    answer = get(exporter.url)
    assert exporter.url == f"http://127.0.0.1:{exporter.port}/metrics"
    assert answer.status == 200
    assert answer.headers["content-type"] == TEXT
    assert 'gradwatch_steps_total{run="test-run",rank="0"} 3' in answer.text


def test_openmetrics_is_served_where_it_is_asked_for(exporter, get):
    answer = get(exporter.url, Accept="application/openmetrics-text;version=1.0.0")
    assert answer.headers["content-type"] == OPENMETRICS
    assert answer.text.endswith("# EOF\n")


def test_healthz_is_json_that_says_which_run(exporter, get):
    answer = get(exporter.url, "/healthz")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == {
        "status": "ok", "run": "test-run", "rank": 0, "state": "running", "step": 2,
    }  # fmt: skip


def test_the_page_leads_to_both_and_escapes_the_name_of_the_run(get):
    with closing(Endpoint(lambda _: (TEXT, b""), port=0, title="<script>1</script>")) as endpoint:
        answer = get(endpoint.url, "/")
    assert "<script>" not in answer.text
    assert "&lt;script&gt;" in answer.text
    assert 'href="/metrics"' in answer.text
    assert 'href="/healthz"' in answer.text


def test_head_has_the_headers_of_get_and_no_body(exporter, get):
    answer = get(exporter.url, method="HEAD")
    assert answer.status == 200
    assert answer.body == b""
    assert int(answer.headers["content-length"]) > 1000


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/nothing", "GET", 404), ("/metrics", "POST", 405)]
)
def test_what_does_not_exist_is_refused_by_its_number(exporter, get, path, method, status):
    assert get(exporter.url, path, method).status == status


def test_on_loopback_a_foreign_name_is_refused_since_a_web_page_may_have_it(exporter, get):
    assert get(exporter.url, Host="evil.example").status == 421
    assert get(exporter.url, Host=f"localhost:{exporter.port}").status == 200


def test_on_all_interfaces_every_name_is_answered_and_large_answers_are_packed(busy_tally, get):
    with closing(Exporter(busy_tally(600), host="0.0.0.0", port=0)) as exporter:
        url = f"http://127.0.0.1:{exporter.port}/metrics"
        packed = get(url, Host="trainer:9464", Accept_Encoding="gzip")
        plain = get(url, Host="trainer:9464")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body


def test_a_taken_port_means_the_next_one_and_one_warning(busy_tally, caplog, get):
    with closing(Exporter(busy_tally(), port=0)) as first:
        with closing(Exporter(busy_tally(), port=first.port)) as second:
            assert second.port is not None
            assert first.port < second.port < first.port + 16
            assert get(second.url).status == 200
    warnings = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert warnings == [
        f"port {first.port} is taken, metrics are served on port {second.port} instead; "
        "choose one with port="
    ]


@pytest.mark.parametrize(
    "environment",
    [{"LOCAL_RANK": "3"}, {"SLURM_LOCALID": "3"}, {"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}],
    ids=["torchrun", "SLURM", "torchrun under SLURM"],
)
def test_each_process_of_a_machine_has_its_own_port_without_a_warning(
    busy_tally, caplog, monkeypatch, environment
):
    first = free_ports(4)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with closing(Exporter(busy_tally(), port=first)) as exporter:
        assert exporter.port == first + 3
    assert caplog.records == []


def test_a_process_whose_port_is_taken_leaves_the_others_theirs(busy_tally, monkeypatch):
    first = free_ports(6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with socket.create_server(("127.0.0.1", first + 1)):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with closing(Exporter(busy_tally(), port=first)) as displaced:
            assert displaced.port == first + 4
            monkeypatch.setenv("LOCAL_RANK", "2")
            with closing(Exporter(busy_tally(), port=first)) as next_one:
                assert next_one.port == first + 2


def test_a_port_that_does_not_exist_is_said_to_be_none(busy_tally, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "9999")
    with closing(Exporter(busy_tally(), port=60_000)) as exporter:
        assert exporter.port is not None
    assert "port 69999 does not exist, metrics are served on port" in caplog.text


def test_behind_its_own_port_a_process_tries_the_ports_of_its_machine(
    busy_tally, caplog, monkeypatch
):
    first = free_ports(16)
    monkeypatch.setenv("LOCAL_RANK", "15")
    with closing(Exporter(busy_tally(), port=first)) as last:
        assert last.port == first + 15
        with closing(Exporter(busy_tally(), port=first)) as another:
            assert another.port == first
    (warning,) = caplog.messages
    assert f"port {first + 15} is taken, metrics are served on port {first} instead" in warning


def test_a_local_rank_that_is_no_number_is_none(busy_tally, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    first = free_ports(1)
    with closing(Exporter(busy_tally(), port=first)) as exporter:
        assert exporter.port == first


@pytest.mark.parametrize("host", ["256.0.0.1", "203.0.113.7", "no such host"])
def test_an_address_that_cannot_be_had_is_one_warning_and_no_exception(busy_tally, caplog, host):
    with closing(Exporter(busy_tally(), host=host, port=9464)) as exporter:
        assert exporter.url is None
        assert exporter.port is None
    assert len(caplog.records) == 1
    assert "metrics are not served: cannot listen on" in caplog.text


def test_an_answer_that_raises_is_a_500_is_counted_and_logged_once(get, caplog):
    errors: list[Exception] = []

    def broken(_: str) -> tuple[str, bytes]:
        raise RuntimeError("no\nsuch thing")

    with closing(Endpoint(broken, port=0, on_error=errors.append)) as endpoint:
        answers = [get(endpoint.url) for _ in range(3)]
        assert get(endpoint.url, "/healthz").status == 200
    assert {answer.status for answer in answers} == {500}
    assert answers[0].text == "gradwatch failed to answer: RuntimeError: no such thing\n"
    assert len(errors) == 3
    assert len(caplog.records) == 1


def test_slow_and_silent_clients_keep_nobody_waiting(exporter, get):
    silent = [raw(exporter.port) for _ in range(20)]
    for client in silent[:10]:
        client.sendall(b"GET /metrics HT")
    started = time.monotonic()
    assert get(exporter.url).status == 200
    assert time.monotonic() - started < 2
    for client in silent:
        client.close()


def test_a_client_that_sends_no_request_is_let_go_in_time(exporter, monkeypatch):
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.2)
    with raw(exporter.port) as client:
        assert everything(client) == b""


def test_a_client_that_takes_no_answer_is_let_go_in_time(get, monkeypatch):
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.2)
    large = b"x" * 50_000_000
    with closing(Endpoint(lambda _: (TEXT, large), port=0)) as endpoint, raw(endpoint.port) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.6)
        assert get(endpoint.url, "/healthz").status == 200
        try:
            received = len(everything(slow))
        except ConnectionResetError:
            received = 0
        assert received < len(large)


def test_hundreds_of_idle_connections_do_not_shut_a_scraper_out(exporter, get):
    idle = [raw(exporter.port) for _ in range(200)]
    assert get(exporter.url).status == 200
    for client in idle:
        client.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"hello\r\n\r\n", b"400"),
        (b"GET / HTTP/2\r\n\r\n", b"400"),
        (b"\xff\xfe\x00\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_is_refused_by_its_number(exporter, get, sent, status):
    with raw(exporter.port) as client:
        client.sendall(sent)
        assert everything(client).startswith(b"HTTP/1.1 " + status)
    assert get(exporter.url).status == 200


def test_many_scrapers_at_once_get_whole_answers(exporter, get):
    answers: list[bytes] = []
    asking = [
        threading.Thread(target=lambda: answers.append(get(exporter.url).body)) for _ in range(16)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(20)
    assert len(answers) == 16
    assert len(set(answers)) == 1


def test_after_close_the_port_is_free_and_no_thread_is_left(busy_tally):
    exporter = Exporter(busy_tally(), port=0)
    port = exporter.port
    exporter.close()
    exporter.close()
    assert "gradwatch-endpoint" not in {thread.name for thread in threading.enumerate()}
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_holds_no_socket_and_the_parent_goes_on_serving(exporter, get):
    open_connection = raw(exporter.port)
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        exporter.close(linger_seconds=30)  # must do nothing
        time.sleep(30)
        os._exit(0)
    try:
        open_connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert everything(open_connection).startswith(b"HTTP/1.1 200")  # ends: the child has none
        assert get(exporter.url).status == 200
        exporter.close()
        with pytest.raises(ConnectionRefusedError):
            raw(exporter.port)
    finally:
        open_connection.close()
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_client_that_connects_while_it_closes_is_not_left_hanging(busy_tally):
    for delay in range(20):
        exporter = Exporter(busy_tally(), port=0)
        closing_ = threading.Thread(target=exporter.close)
        with suppress(ConnectionRefusedError), raw(exporter.port) as client:
            closing_.start()
            time.sleep(delay * 1e-4)
            client.sendall(b"GET /metrics HTTP/1.1\r\n")  # and never the rest
            with suppress(ConnectionError):
                everything(client)
        closing_.join(10)
        assert not closing_.is_alive()


def test_an_interpreter_that_forgets_to_close_ends_at_once():
    code = (
        "from gradwatch.export.endpoint import Endpoint\n"
        "print(Endpoint(lambda _: ('text/plain', b''), port=0).url)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - started < 10


class TestLinger:
    """An ending run waits for one last scrape, where there is somebody to wait for."""

    def close_with_scrapes_every(self, busy_tally, get, seconds: float, linger: float) -> float:
        exporter = Exporter(busy_tally(), port=0)
        url, ended = exporter.url, threading.Event()

        def scrape() -> None:
            with suppress(OSError):
                while not ended.wait(seconds):
                    get(url)

        scraper = threading.Thread(target=scrape)
        for _ in range(4):
            get(url)
            time.sleep(seconds)
        scraper.start()
        started = time.monotonic()
        exporter.close(linger_seconds=linger)
        waited = time.monotonic() - started
        ended.set()
        scraper.join(5)
        return waited

    def test_the_last_scrape_ends_the_wait(self, busy_tally, get):
        assert 0.05 < self.close_with_scrapes_every(busy_tally, get, 0.2, linger=20) < 1.5

    def test_where_nobody_scraped_there_is_no_waiting(self, busy_tally):
        exporter = Exporter(busy_tally(), port=0)
        started = time.monotonic()
        exporter.close(linger_seconds=20)
        assert time.monotonic() - started < 2

    def test_a_scraper_that_is_gone_is_waited_for_no_longer_than_two_and_a_half_intervals(
        self, busy_tally, get
    ):
        exporter = Exporter(busy_tally(), port=0)
        for _ in range(4):
            get(exporter.url)
            time.sleep(0.2)
        started = time.monotonic()
        exporter.close(linger_seconds=20)
        assert time.monotonic() - started < 3

    def test_what_is_scraped_last_says_that_the_run_is_over(self, busy_tally, get):
        tally = busy_tally()
        exporter = Exporter(tally, port=0)
        get(exporter.url)
        time.sleep(0.1)
        tally.set_state("finished")
        closing_ = threading.Thread(target=exporter.close, kwargs={"linger_seconds": 20})
        closing_.start()
        text, url = "", f"http://127.0.0.1:{exporter.port}/metrics"
        with suppress(OSError):
            while closing_.is_alive():
                text = get(url).text
        closing_.join(10)
        assert 'gradwatch_run_state{run="test-run",rank="0",state="finished"} 1' in text
