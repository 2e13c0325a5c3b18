"""Requests to one Grafana through grafana-api; every failure is one line without credentials."""

from __future__ import annotations

import base64
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from gradwatch.errors import GradwatchError, MonitoringError
from gradwatch.grafana.answers import (
    RETRIED,
    Refusal,
    Request,
    no_answer,
    not_an_answer,
    refused,
)

__all__ = ["Credentials", "Server", "checked_url", "credentials"]

PAUSES = (0.5, 1.0, 2.0)
"""Seconds before each new try, where a server fails."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of a service account or a user; no `repr` shows them."""

    source: str
    """The environment variables that they are from."""

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def secrets(self) -> list[str]:
        """What must not be seen, in each form that a server could say it back."""
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return [text for text in (self.token, self.password, self.user and pair) if text]


def credentials(environment: Mapping[str, str] = os.environ) -> Credentials:
    """GRAFANA_TOKEN, or else GRAFANA_USER and GRAFANA_PASSWORD.

    Raises:
        MonitoringError: neither is set, or the token is none.
    """
    if token := environment.get("GRAFANA_TOKEN", "").strip():
        if not re.fullmatch(r"[!-~]+", token):
            raise MonitoringError(
                "GRAFANA_TOKEN: expected a token, letters and digits without a space. Received "
                "something else: copy it again"
            )
        return Credentials("GRAFANA_TOKEN", token=token)
    user, password = (environment.get(f"GRAFANA_{name}", "") for name in ("USER", "PASSWORD"))
    if user and password:
        return Credentials("GRAFANA_USER and GRAFANA_PASSWORD", user=user, password=password)
    raise MonitoringError(
        "no credentials for Grafana: put the token of a service account into the environment "
        "variable GRAFANA_TOKEN, or a user into GRAFANA_USER and GRAFANA_PASSWORD"
    )


def checked_url(url: str, of: str) -> str:
    """An http(s) address without a slash at its end.

    Raises:
        MonitoringError: it is none, or holds a password, which is then not said.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if "@" in url:
        raise MonitoringError(
            f"the address of {of} must not hold a user or a password: a command line is seen by "
            "everybody on this machine"
        )
    shown, *behind = re.split(r"[?#]", url)
    if not is_address or behind:
        raise MonitoringError(
            f"the address of {of} must be like http://127.0.0.1:3000. Received: {shown!a}"
            + (" and more behind it" if behind else "")
        )
    return url.rstrip("/")


class Server:
    """One Grafana's API."""

    def __init__(
        self,
        url: str,
        credentials: Credentials,
        *,
        timeout: float = 10.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            url: with the path below which Grafana is, if it has one.
            timeout: seconds without a word from the server.
            pause: what waits between two tries.

        Raises:
            GradwatchError: grafana-api is not installed.
            MonitoringError: `url` is no address.
        """
        self.url = checked_url(url, "Grafana")
        self._credentials = credentials
        self._timeout = timeout
        self._pause = pause
        self._api = _runner(self.url, credentials, timeout)

    def close(self) -> None:
        self._api.s.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def ask(
        self,
        verb: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        about: str,
        needs: str = "",
        kind: type = dict,
        keys: Sequence[str] = (),
        or_none: bool = False,
        retry: bool = True,
    ) -> Any:
        """The JSON of an answer.

        Args:
            path: below /api.
            about: what it is of, for errors.
            needs: the permission, for errors.
            kind: `dict`, or `list` of such.
            keys: what each dict must have.
            or_none: whether 404 is an answer too: None.
            retry: whether it may be asked again where the server fails.

        Raises:
            MonitoringError: any other answer, or none.
        """
        request = self._request(verb, path, about, needs)
        pauses = PAUSES if retry else ()
        for tries, wait in enumerate((*pauses, None), 1):
            try:
                return self._once(request, path, body, kind, keys)
            except Refusal as refusal:
                if refusal.status == 404 and or_none:
                    return None
                if wait is None or refusal.status not in RETRIED:
                    raise MonitoringError(refused(request, refusal, tries, self._hidden)) from None
            self._pause(wait)
        raise AssertionError("the last try returns or raises")

    def _once(
        self,
        request: Request,
        path: str,
        body: Mapping[str, Any] | None,
        kind: type,
        keys: Sequence[str],
    ) -> Any:
        import requests

        try:
            answer = getattr(self._api, request.verb)(path, json=body)
        except requests.exceptions.JSONDecodeError as error:
            text = error.doc.strip()
            received = "an empty body" if not text else "what is no JSON"
            raise MonitoringError(not_an_answer(request, received)) from None
        except requests.exceptions.RequestException as error:
            raise MonitoringError(no_answer(request, self._why(error))) from None
        parts = answer if kind is list and isinstance(answer, list) else [answer]
        if not all(isinstance(part, dict) and part.keys() >= set(keys) for part in parts):
            received = f"JSON of something else, {type(answer).__name__}"
            raise MonitoringError(not_an_answer(request, received))
        return answer

    def _why(self, error: BaseException) -> str:
        """The reason at the root; the words of what is above it name addresses with all in them."""
        reasons = []
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
                return f"not a word within {self._timeout:g} s"
            if isinstance(cause, OSError) and cause.strerror:
                reasons.append(str(cause.strerror))
            cause = cause.__cause__ or cause.__context__
        return reasons[-1] if reasons else type(error).__name__

    def _hidden(self, text: str) -> str:
        """What came from the server, which may say back what it was sent."""
        for secret in self._credentials.secrets():
            text = text.replace(secret, "***")
        return text

    def _request(self, verb: str, path: str, about: str, needs: str) -> Request:
        url = f"{self.url}/api{path.partition('?')[0]}"
        return Request(verb, url, about, needs, self._credentials.source)


def _runner(url: str, credentials: Credentials, timeout: float) -> Any:
    """grafana-api's, which judges no status by itself: it trips over errors that are no JSON."""
    try:
        from grafana_api.grafana_face import GrafanaFace
    except ImportError:
        raise GradwatchError(
            "pushing to Grafana needs grafana-api: pip install 'gradwatch[grafana]'"
        ) from None
    parts = urllib.parse.urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    auth = credentials.token or (credentials.user.encode(), credentials.password.encode())
    runner = GrafanaFace(
        auth,
        host=host,
        port=parts.port,
        url_path_prefix=f"{parts.path.strip('/')}/".lstrip("/"),
        protocol=parts.scheme,
        timeout=timeout,
    ).api
    runner.s.hooks["response"].append(_judge)
    return runner


def _judge(response: Any, *args: object, **kwargs: object) -> None:
    """
    Raises:
        Refusal: not 2xx; a redirection is not followed, since a POST would become a GET.
    """
    if not 200 <= response.status_code < 300:
        location = response.headers.get("Location", "")
        body = response.content.decode(errors="replace")
        raise Refusal(response.status_code, body, location)
