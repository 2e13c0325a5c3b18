"""The address of another server, as a user writes it, checked; asked without waiting for long.

Credentials leave the address for a header, so that no message can hold them.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from typing import IO

__all__ = ["FAILURES", "ServerUrl"]

FAILURES = (OSError, http.client.HTTPException, ValueError)
"""What asking a server may raise: it is away, silent, or answers nonsense."""

MOST_TOLD = 200


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """Where a server is; `str` of it may be logged."""

    url: str
    """Without credentials and without a slash at its end."""

    authorization: str | None = field(default=None, repr=False)
    """The header, where the address held a name and a password."""

    @classmethod
    def of(cls, text: str, what: str) -> ServerUrl:
        """
        Args:
            what: the option that the address was given for.

        Raises:
            ValueError: it is no address of a server.
        """
        parts = urllib.parse.urlsplit(text.strip())
        name, _, place = parts.netloc.rpartition("@")
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            usable = False
        if not usable or parts.query or parts.fragment:
            shown = urllib.parse.urlunsplit(parts._replace(netloc=place, query="", fragment=""))
            raise ValueError(
                f"{what} must be an address such as http://127.0.0.1:9093, without a query. "
                f"Received: {shown!r}{' and credentials' * bool(name)}"
            )
        url = urllib.parse.urlunsplit((parts.scheme, place, parts.path, "", "")).rstrip("/")
        if not name:
            return cls(url)
        user, _, password = (urllib.parse.unquote(part) for part in name.partition(":"))
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        return cls(url, f"Basic {encoded}")

    def __str__(self) -> str:
        return self.url

    def ask(self, path: str, *, seconds: float, posted: object = None) -> bytes:
        """The body of the answer to a GET, or to a POST of JSON.

        Args:
            seconds: for the server to say anything at all, each time that it is waited for.

        Raises:
            FAILURES: among them an OSError that quotes an answer that is not 2xx.
        """
        request = urllib.request.Request(f"{self.url}{path}")
        if posted is not None:
            request.data = json.dumps(posted).encode()
            request.add_header("Content-Type", "application/json")
        if self.authorization is not None:
            request.add_header("Authorization", self.authorization)
        try:
            with _opener.open(request, timeout=seconds) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            with error:
                told = " ".join(error.read(MOST_TOLD).decode("utf-8", "replace").split())
            raise OSError(f"HTTP {error.code} {error.reason} {told}".rstrip()) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A POST that is led elsewhere becomes a GET, and what was posted is lost without a word."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)
