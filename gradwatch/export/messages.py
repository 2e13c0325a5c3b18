"""HTTP as values: the head of a request in, the bytes of a response out."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit

__all__ = ["END_OF_HEAD", "PLAIN", "Answer", "Request", "Response", "encoded", "parsed"]

END_OF_HEAD = b"\r\n\r\n"
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its body."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name."""

    query: str = ""
    """What stands behind the question mark, as it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    status: int = 200
    body: bytes = b""
    content_type: str = PLAIN
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Response | Awaitable[Response]
"""Now, or once it is there: what takes long is made on another thread."""


def parsed(head: bytes) -> Request:
    """Reads a request up to its empty line.

    Raises:
        ValueError: it is no HTTP/1 request.
    """
    first, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"expected HTTP/1. Received: {version!r}")
    pairs = (line.partition(":")[::2] for line in rest)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    where = urlsplit(target)
    return Request(method, where.path or "/", headers, where.query)


def encoded(response: Response, *, with_body: bool = True) -> bytes:
    """One response, after which the connection closes; a HEAD is answered without the body."""
    headers = {
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **response.headers,
    }
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines).encode("latin-1", "replace") + END_OF_HEAD
    return head + response.body if with_body else head
