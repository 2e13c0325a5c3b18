"""Alertmanager's webhook in, one line per alert on standard output.

    python pager.py 9095              on the loopback interface
    python pager.py 9095 0.0.0.0      on all of them, as within a container

Stands in for the receiver that a team really uses; needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BYTES = 1 << 20


class Pager(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Answers the health check."""
        self._answer(200)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        if size > MAX_BYTES:
            self._answer(413)
            return
        try:
            alerts = json.loads(self.rfile.read(size))["alerts"]
            lines = [_line(alert) for alert in alerts]
        except (ValueError, KeyError, TypeError, AttributeError):
            self._answer(400)
            return
        for line in lines:
            print(line, flush=True)
        self._answer(200)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line, alerts are."""

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _line(alert: dict[str, dict[str, str]]) -> str:
    labels, notes = alert["labels"], alert.get("annotations", {})
    severity = labels.get("severity", "none")
    return f"{alert['status']} {severity} {labels['alertname']}: " + " ".join(
        notes[key] for key in ("summary", "description", "runbook_url") if key in notes
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints a line for each alert that it is posted.")
    parser.add_argument("port", type=int)
    parser.add_argument("host", nargs="?", default="127.0.0.1")
    given = parser.parse_args()
    with ThreadingHTTPServer((given.host, given.port), Pager) as server:
        server.serve_forever()
