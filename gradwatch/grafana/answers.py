"""What a Grafana answers, when it is not what was asked for: one line that says what to do.

where: what was expected. What came. What to do
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

from gradwatch.report.card import printable

__all__ = ["RETRIED", "Refusal", "Request", "no_answer", "not_an_answer", "refused"]

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that may be others in a moment."""

_MOST_SAID = 200
_FROM_FILES = (
    "It comes from a file of that Grafana (provisioning): change the file, or take it out there"
)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, as far as errors tell of it: no credentials, no query."""

    verb: str
    url: str
    about: str
    """What it is of, e.g. `dashboard gradwatch-run`."""

    needs: str
    """The permission, e.g. `folders:create, of the role Editor`."""

    credentials: str
    """The environment variables that were used."""

    def __str__(self) -> str:
        return f"{self.verb} {self.url} ({self.about})"


class Refusal(Exception):
    """An answer whose status is not 2xx; never leaves the adapter."""

    def __init__(self, status: int, body: str, location: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.location = location


def refused(request: Request, refusal: Refusal, tries: int, hidden: Callable[[str], str]) -> str:
    """A status that is not 2xx; `hidden` takes secrets out of what came."""
    message = _one_line(hidden(_message(refusal.body)))
    place = _one_line(hidden(_place(refusal.location)))
    advice = _advice(request, refusal.status, message, place, tries)
    came = f"Received: {refusal.status}" + (f" ({message})" if message else "")
    return f"{request}: expected 2xx. {came}. {advice}"


def not_an_answer(request: Request, received: str) -> str:
    """A status of 2xx with something else than Grafana's JSON."""
    return (
        f"{request}: expected JSON as of a Grafana. Received: {received}. Is this address a "
        "Grafana, without a login page of something else before it?"
    )


def no_answer(request: Request, why: str) -> str:
    """No answer at all."""
    return f"{request}: no answer, {why}. Does Grafana run there, and can it be reached from here?"


def _advice(request: Request, status: int, message: str, place: str, tries: int) -> str:
    said = message.lower()
    if "provisioned" in said or "read-only" in said:
        return _FROM_FILES
    if "folder" in said and "not found" in said:
        return "The folder was removed meanwhile: push again, which makes it"
    if 300 <= status < 400:
        return f"It leads to {place or 'nowhere'}: give the address that answers itself"
    if status >= 500 or status == 429:
        tried = f"Tried {tries} times. " if tries > 1 else ""
        return f"{tried}Grafana, or a proxy before it, fails: its log says why. Then push again"
    return _BY_STATUS.get(status, "The log of Grafana says more").format(request=request)


_BY_STATUS = {
    400: "Grafana does not take this content; what came says why",
    401: "What is in {request.credentials} is not known there: make a token under Administration > "
    "Users and access > Service accounts",
    403: "{request.credentials} may not do that: it needs {request.needs}",
    404: "There is no such thing. Is this a Grafana, and is its path, as in http://host/grafana, "
    "part of the address?",
    409: "Something else there has this name or uid: rename it, or remove it",
    412: "It is not as it was a moment ago, or belongs to something else there: push again, or "
    "remove it",
    413: "A proxy before Grafana takes no request of this size: raise its limit",
}  # fmt: skip


def _message(body: str) -> str:
    """What the server says of it, which may be anything."""
    try:
        said = json.loads(body)
    except ValueError:
        return body if not body.lstrip().startswith("<") else "a page of HTML"
    if not isinstance(said, dict):
        return body
    parts = (said.get("message"), said.get("status"))
    return ", ".join(part for part in parts if isinstance(part, str) and part)


def _place(location: str) -> str:
    """Without what may be secret in an address."""
    try:
        parts = urllib.parse.urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()), _MOST_SAID)
