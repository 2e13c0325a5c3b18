"""Alerts in, posted to each Alertmanager by a thread of its own, again and again while they hold.

    tell -> current() -> POST /api/v2/alerts   at once, then every minute until they end

Alertmanager forgets an alert when it restarts, and the members of a cluster do not tell each other
of alerts, so each of them is told, and told again. Nobody waits for one that is down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradwatch.export.urls import ServerUrl
from gradwatch.saying import say

__all__ = ["Alertmanagers"]

PATH, READY = "/api/v2/alerts", "/-/ready"
ANSWER_SECONDS = 2.0
AGAIN_SECONDS = 60.0
CHECK_SECONDS = 2.0
"""Until it is asked whether it is there: a run that is short has other things to do."""

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
CLOSE_SECONDS = 3.0
"""For the last ones to go out when the run ends."""

Payload = Mapping[str, Any]
"""One alert as the API wants it."""


class Alertmanagers:
    """The senders of one run."""

    def __init__(
        self,
        servers: Sequence[ServerUrl],
        current: Callable[[], list[Payload]],
        on_error: Callable[[], None],
    ) -> None:
        """
        Args:
            current: the alerts that hold at this moment; asked for by the senders' threads.
            on_error: called for each post that failed.
        """
        self._senders = [_Sender(server, current, on_error) for server in servers]

    def tell(self) -> None:
        """There is a new alert: sent from now on, at once, by each thread."""
        for sender in self._senders:
            sender.tell()

    def close(self) -> None:
        """Gives what was not sent yet its last chance, for 3 seconds at most, and ends."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for sender in self._senders:
            sender.close()
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))


class _Sender:
    """Of one Alertmanager, so that one that hangs keeps the others from nothing."""

    def __init__(
        self,
        server: ServerUrl,
        current: Callable[[], list[Payload]],
        on_error: Callable[[], None],
    ) -> None:
        self._server = server
        self._current = current
        self._on_error = on_error
        self._woken = threading.Event()
        self._is_unsent = False
        self._is_closing = False
        self._failures = 0
        self._is_told_of_failures = False
        self._thread = threading.Thread(target=self._run, name="gradwatch-alerts", daemon=True)
        self._thread.start()

    def tell(self) -> None:
        self._is_unsent = True
        self._woken.set()

    def close(self) -> None:
        self._is_closing = True
        self._woken.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        pause: float | None = None
        if not self._woken.wait(CHECK_SECONDS):
            self._try(READY)  # whoever has a wrong address is to know before it is needed
        while True:
            self._woken.wait(pause)
            self._woken.clear()
            is_last = self._is_closing
            if self._is_unsent or not is_last:
                pause = self._send()
            if is_last:
                return

    def _send(self) -> float | None:
        """Posts what holds; the seconds until that is to be done again, None for never."""
        self._is_unsent = False  # what comes while it is sent is sent again
        alerts = self._current()
        if not alerts:
            return None
        if self._try(PATH, alerts):
            self._failures = 0
            return AGAIN_SECONDS
        self._is_unsent = True
        self._failures += 1
        return RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1]

    def _try(self, path: str, posted: object = None) -> bool:
        try:
            self._server.ask(path, seconds=ANSWER_SECONDS, posted=posted)
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._on_error()
        if not self._is_told_of_failures:
            self._is_told_of_failures = True
            say(
                logging.WARNING,
                "the Alertmanager %s cannot be told of alerts (%s); each is tried again while it "
                "holds, and further failures are counted in gradwatch_hook_errors_total only",
                self._server, error,
            )  # fmt: skip
