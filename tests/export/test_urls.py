"""Addresses of other servers: checked when they are given, and never a password in a message."""

from __future__ import annotations

import base64
import http.server
import threading

import pytest

from gradwatch.export.urls import ServerUrl


def test_credentials_move_from_the_address_to_a_header():
    server = ServerUrl.of("https://me%40home:p%2Fw@alerts.example:9093/prefix/", "alertmanager")
    assert str(server) == "https://alerts.example:9093/prefix"
    expected = base64.b64encode(b"me@home:p/w").decode()
    assert server.authorization == f"Basic {expected}"
    assert "p/w" not in repr(server)
    assert expected not in repr(server)


@pytest.mark.parametrize(
    "text",
    ["", "alerts:9093", "ftp://me:secret@x", "http://", "http://me:secret@h:port", "http://h?a=b",
     "http://me:secret@h:99999", "http://h:0"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_its_credentials(text):
    with pytest.raises(ValueError, match="alertmanager must be an address such as") as refused:
        ServerUrl.of(text, "alertmanager")
    assert "secret" not in str(refused.value)


def test_a_redirect_is_a_failure_since_it_would_lose_what_is_posted():
    posted = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(302)
            self.send_header("Location", "/login")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = ServerUrl.of(f"http://127.0.0.1:{server.server_port}", "alertmanager")
        with pytest.raises(OSError, match="HTTP 302"):
            url.ask("/api/v2/alerts", seconds=5, posted=[])
        server.shutdown()
    assert posted == [b"[]"]
